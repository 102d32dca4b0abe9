#!/usr/bin/env bash
# Cappy's loop on one task, from an LLM's samples to ROUGE-L: sample, adapt, export, evaluate (arXiv 2311.06720).
#
#   bash docs/examples/loop/run.sh
#
# As it stands it runs on a made-up task with a tiny LLM (toy.py) and cappy-mini. It needs the extras cpu (or gpu),
# export, train and llm, and says at once if one is missing. A step whose output exists is skipped: a run that was stopped
# goes on when it is started again. Remove OUT (or choose another) to start afresh, also after changing a variable.
#
# For a real run, set (files with rows {dataset, example_idx, instruction, references}, one BIG-Bench task):
#
#   TRAIN=task_train.jsonl VALIDATION=task_validation.jsonl LLM=google/flan-t5-xxl CHECKPOINT=btan2/cappy-large \
#     ADAPT_OPTIONS= OUT=loop-task bash docs/examples/loop/run.sh
#
# An empty ADAPT_OPTIONS takes the defaults of `cappy adapt`, which are the paper's: batches of 128, learning rate 2e-5,
# one epoch. THIS WAS NOT RUN BY US. What it takes, by reckoning:
# - sample: FLAN-T5-XXL has 11.3 B parameters: 22.5 GB in bf16, 45 GB in float32, besides activations. In bf16 that is one
#   GPU of 40 GB or more, in float32 one of 80 GB, or several GPUs that share the layers (device_map). Each example is
#   answered 17 times.
# - adapt: cappy-large has 355 M parameters, 1.4 GB in float32. With gradients and AdamW's two moments that is four times
#   as much, 5.7 GB, and activations, which --max-batch-tokens bounds.
# - export: once, on the CPU, some 7 GB of memory.
# - evaluate: on the CPU; the int8 model has 389 MB, the fp32 model 1.42 GB.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

OUT=${OUT:-loop}                 # everything is written here
TRAIN=${TRAIN:-$OUT/toy/toy_train.jsonl}
VALIDATION=${VALIDATION:-$OUT/toy/toy_validation.jsonl}
LLM=${LLM:-$OUT/toy/llm}         # a folder or hub id
CHECKPOINT=${CHECKPOINT:-$here/../../../export/cappy_mini/checkpoint}
SEED=${SEED:-0}
SAMPLE_OPTIONS=${SAMPLE_OPTIONS-}
# Unset: what the toy needs to be learnt in 80 small steps. Set but empty: the paper's.
ADAPT_OPTIONS=${ADAPT_OPTIONS---batch-size 16 --epochs 20 --max-steps 80 --learning-rate 3e-4 --dropout 0}
EXPORT_OPTIONS=${EXPORT_OPTIONS-}
PYTHON=${PYTHON:-python}
CAPPY=${CAPPY:-cappy}

say() { printf '%s\n' "== $*" >&2; }

# All packages of the steps below, before the first step works for minutes.
"$PYTHON" - <<'END'
import sys
from importlib.util import find_spec

NEEDED = "cappy_engine onnxruntime torch transformers optimum onnx accelerate rouge_score matplotlib".split()
missing = [name for name in NEEDED if find_spec(name) is None]
if missing:
    sys.exit(
        f"run.sh needs the packages {', '.join(missing)}; in a clone of cappy-engine, run: "
        "pip install -c constraints.txt '.[cpu,export,train,llm]'"
    )
END

# Samples appear under their name when they are complete; a run that was stopped goes on.
sample() { # INPUT OUTPUT
    [[ -e $2 ]] && { say "$2 exists"; return; }
    say "sampling for $1"
    local resume=()
    [[ -e $2.partial ]] && resume=(--resume)
    # shellcheck disable=SC2086 # options are words
    "$CAPPY" sample "$1" --llm "$LLM" -o "$2" --seed "$SEED" ${resume[@]+"${resume[@]}"} $SAMPLE_OPTIONS
}

mkdir -p "$OUT/samples"
# The toy is made only if it is used. Its LLM is written last.
if [[ "$TRAIN $VALIDATION $LLM" == *"$OUT/toy/"* && ! -e $OUT/toy/llm/tokenizer_config.json ]]; then
    say "making the toy"
    "$PYTHON" "$here/toy.py" "$OUT/toy" --seed "$SEED"
fi

# 1 and 2: 17 answers of the LLM to each instruction.
sample "$TRAIN" "$OUT/train-samples.jsonl"
task=$(basename "${VALIDATION%.gz}")
sample "$VALIDATION" "$OUT/samples/${task%.*}.jsonl"

# 3: the scorer learns the task from references and from the ROUGE-L of the samples.
if [[ -e $OUT/adapted ]]; then
    say "$OUT/adapted exists"
else
    say "adapting $CHECKPOINT"
    resume=()
    [[ -e $OUT/adapted.training ]] && resume=(--resume)
    # shellcheck disable=SC2086
    "$CAPPY" adapt "$CHECKPOINT" "$OUT/train-samples.jsonl" "$OUT/adapted" --from-samples ${resume[@]+"${resume[@]}"} $ADAPT_OPTIONS
fi

# 4: a bundle that production runs, proven to score as the checkpoint does.
if [[ -e $OUT/bundle ]]; then
    say "$OUT/bundle exists"
else
    say "exporting"
    # shellcheck disable=SC2086
    "$CAPPY" export "$OUT/adapted" "$OUT/bundle" --precision fp32 --precision int8 $EXPORT_OPTIONS
fi

# 5: ROUGE-L of the best-scoring answers, beside a random pick, the LLM's own likelihood and the best possible.
say "evaluating"
"$CAPPY" evaluate bigbench "$OUT/samples" --bundle "$OUT/bundle" --precision fp32 --precision int8 --plot "$OUT/rouge.svg" --force
