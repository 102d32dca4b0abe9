"""Scores with OpenVINO through optimum-intel: OVModelForSequenceClassification, and OVQuantizer's static int8 (NNCF).

Where a CPU has bfloat16, OpenVINO computes in it unless told otherwise (INFERENCE_PRECISION_HINT), also in the parts of
a quantised model that stay in floating point. Float32 is asked for, so that fp32 is fp32. One stream (LATENCY) with all
threads is optimum-intel's own default.

Int8 is what sentence-transformers' `export_static_quantized_openvino_model` makes: weights and activations, by
OVQuantizationConfig's defaults (SmoothQuant, fast bias correction, 128 samples in random order), calibrated here on the
exporter's parity pairs: pairs of the model's own kind that no workload has. Of the other options tried on cappy-mini
only 8-bit weights (OVWeightQuantizationConfig) ranked better by more than 0.001 of Spearman's correlation: 0.999 for
0.992, at 1.4 times the time.
"""

from __future__ import annotations

import shutil
from typing import Any

import nncf
import numpy as np
from optimum.intel import OVConfig, OVModelForSequenceClassification, OVQuantizationConfig, OVQuantizer

from cappy_bench.peers.batches import Batched, Inputs
from cappy_bench.peers.peer import Model, Scores
from cappy_bench.peers.worker import serve
from cappy_engine.tokenizer import PairTokenizer
from cappy_export.proof.pairs import default_pairs

SEED = 42


def prepare(model: Model, precision: str) -> None:
    """Export the checkpoint, and quantise it for int8."""
    folder = model.folder / precision
    if folder.exists():
        return
    making = model.folder / f"{precision}-making"
    shutil.rmtree(making, ignore_errors=True)
    loaded = OVModelForSequenceClassification.from_pretrained(
        str(model.require_checkpoint()), export=True, load_in_8bit=False, compile=False
    )
    if precision == "int8":
        config = OVConfig(quantization_config=OVQuantizationConfig())
        OVQuantizer.from_pretrained(loaded).quantize(nncf.Dataset(_calibration(model)), ov_config=config)
    loaded.save_pretrained(making)
    making.rename(folder)


def open_runner(model: Model, precision: str) -> Batched:
    """Load and compile what `prepare` made."""
    options = {
        "INFERENCE_NUM_THREADS": str(model.threads),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    loaded = OVModelForSequenceClassification.from_pretrained(str(model.folder / precision), ov_config=options)

    def run(inputs: Inputs) -> Scores:
        output = loaded(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        scores: Scores = output.logits[:, 0]
        return scores

    return Batched(model, run, pad_token_id=int(loaded.config.pad_token_id))


def _calibration(model: Model) -> list[dict[str, Any]]:
    """Make the inputs of each parity pair, in random order; OVQuantizer takes the first 128."""
    tokenizer = PairTokenizer.from_file(model.bundle / "tokenizer.json", max_length=model.max_length)
    encoded = tokenizer.encode(default_pairs())
    order = np.random.default_rng(SEED).permutation(len(encoded.token_ids))
    rows_ids = [encoded.token_ids[row][None] for row in order]
    return [{"input_ids": ids, "attention_mask": np.ones_like(ids)} for ids in rows_ids]


if __name__ == "__main__":
    serve(open_runner, prepare)
