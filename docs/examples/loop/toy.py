"""Make a toy task for `run.sh`, and a tiny LLM that is sloppy at it.

    python docs/examples/loop/toy.py OUT [--seed 0]

The task is to name the kind of a thing:

    What is robin?    ->    bird

OUT gets `toy_train.jsonl` and `toy_validation.jsonl`, with rows {dataset, example_idx, instruction, references} as
BIG-Bench's, and `llm`, a T5 of 0.2 M parameters. The LLM learns from texts by careless writers: they give each word a
wrong kind instead of its own, half of the words more often than not. So the LLM's own likelihood repeats the writers'
mistakes, and the references have none: by construction a scorer can learn more here than the LLM knows. No instruction
stands in two of the three sets. Everything comes from the seed, nothing is downloaded, and nothing here says how an LLM
or a scorer would do on a real task.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration, get_linear_schedule_with_warmup

KINDS = {
    "bird": ("robin", "eagle", "duck", "owl", "crow", "pigeon"),
    "fruit": ("apple", "pear", "plum", "lemon", "cherry", "peach"),
    "tool": ("hammer", "saw", "drill", "wrench", "shovel", "rake"),
    "sport": ("tennis", "football", "golf", "rugby", "hockey", "boxing"),
    "fish": ("trout", "salmon", "carp", "herring", "cod", "tuna"),
}
KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}
QUESTIONS = (
    "What is {word}?",
    "Name the kind of thing that {word} is.",
    "{word}: what kind of thing is that?",
    "Tell me what {word} is.",
    "Is {word} a bird, a fruit, a tool, a sport or a fish?",
    "Someone says {word}. What do they mean?",
    "In one word, what is {word}?",
    "A child asks what {word} is. Answer.",
    "Which kind of thing is {word}?",
    "Say what {word} is.",
    "Do you know what {word} is?",
    "{word} is what?",
)
WRONG_OFTEN, WRONG_SELDOM = 0.6, 0.3  # how often careless writers give a word another kind than its own
TRAIN_ROWS, VALIDATION_ROWS = 120, 120
LLM_STEPS, LLM_BATCH = 250, 64

Row = tuple[str, str]  # instruction, answer
Mistakes = dict[str, tuple[str, float]]  # the kind that a word is mistaken for, and how often


def draw_mistakes(draw: random.Random) -> Mistakes:
    """Draw one wrong kind for each word; half of the words get it more often than not."""
    often = set(draw.sample(list(KIND_OF), len(KIND_OF) // 2))
    wrong = {word: draw.choice([kind for kind in KINDS if kind != KIND_OF[word]]) for word in KIND_OF}
    return {word: (wrong[word], WRONG_OFTEN if word in often else WRONG_SELDOM) for word in KIND_OF}


def draw_row(draw: random.Random, mistakes: Mistakes | None = None) -> Row:
    """Draw an instruction and its answer; with `mistakes`, as a careless writer answers it."""
    word = draw.choice(list(KIND_OF))
    wrong, share = mistakes[word] if mistakes else ("", 0.0)
    kind = wrong if draw.random() < share else KIND_OF[word]
    return draw.choice(QUESTIONS).format(word=word), kind


def draw_new_rows(draw: random.Random, count: int, seen: set[str]) -> list[Row]:
    """Draw `count` examples whose instructions are not in `seen`, and add them there."""
    rows: list[Row] = []
    while len(rows) < count:
        row = draw_row(draw)
        if row[0] not in seen:
            seen.add(row[0])
            rows.append(row)
    return rows


def draw_careless_rows(draw: random.Random, count: int, held_back: set[str]) -> list[Row]:
    """Draw `count` examples as careless writers answer them, none with an instruction of `held_back`."""
    mistakes, rows = draw_mistakes(draw), list[Row]()
    while len(rows) < count:
        row = draw_row(draw, mistakes)
        if row[0] not in held_back:
            rows.append(row)
    return rows


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write examples in the form of BIG-Bench's rows, as JSON Lines."""
    lines = [
        json.dumps({"dataset": "toy", "example_idx": index, "instruction": instruction, "references": [answer]})
        for index, (instruction, answer) in enumerate(rows)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer that knows the words of this task, one token each, and punctuation."""
    texts = " ".join(QUESTIONS).replace("{word}", "")
    split = pre_tokenizers.BertPreTokenizer()
    words = {word for word, _ in split.pre_tokenize_str(texts)} | set(KINDS) | set(KIND_OF)
    vocabulary = ["<pad>", "</s>", "<unk>", *sorted(words)]
    numbers = {word: index for index, word in enumerate(vocabulary)}
    core = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))  # noqa: S106 - no password
    core.pre_tokenizer = split
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    core.decoder = decoders.WordPiece(cleanup=True)  # "apple , pear" becomes "apple, pear"
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **special)


def make_model(vocabulary: int) -> T5ForConditionalGeneration:
    """Make the LLM, with random weights."""
    config = T5Config(
        vocab_size=vocabulary,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def pretrain(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> None:
    """Train the LLM on each row once, in their order."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, LLM_STEPS // 20, LLM_STEPS)
    model.train()
    for step in range(LLM_STEPS):
        loss = model(**_tensors(tokenizer, rows[step * LLM_BATCH : (step + 1) * LLM_BATCH])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} of {LLM_STEPS}: loss {loss.item():.3f}", file=sys.stderr)
    model.eval()


def _tensors(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> dict[str, Any]:
    asked = tokenizer([row[0] for row in rows], padding=True, return_tensors="pt", return_token_type_ids=False)
    answers = tokenizer([row[1] for row in rows], padding=True, return_tensors="pt")["input_ids"]
    return {**asked, "labels": answers.masked_fill(answers == tokenizer.pad_token_id, -100)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a toy task and a tiny LLM for it.")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # so small a model gains nothing from more, and one seed gives one model
    torch.manual_seed(asked.seed)
    draw, held_back = random.Random(asked.seed), set[str]()  # noqa: S311 - a toy, no secret
    asked.out.mkdir(parents=True, exist_ok=True)
    write_rows(asked.out / "toy_train.jsonl", draw_new_rows(draw, TRAIN_ROWS, held_back))
    write_rows(asked.out / "toy_validation.jsonl", draw_new_rows(draw, VALIDATION_ROWS, held_back))
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    print(f"training an LLM of {model.num_parameters() / 1e6:.2f} M parameters", file=sys.stderr)
    pretrain(model, tokenizer, draw_careless_rows(draw, LLM_STEPS * LLM_BATCH, held_back))
    model.save_pretrained(asked.out / "llm")
    tokenizer.save_pretrained(asked.out / "llm")


if __name__ == "__main__":
    main()
