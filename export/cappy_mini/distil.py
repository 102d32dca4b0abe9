"""Teach the starting checkpoint, which has a new vocabulary, to read as all-MiniLM-L6-v2 does.

    python -m cappy_mini.distil START MINILM TRAIN.jsonl OUT

Both models read the same pairs, one for each instruction of TRAIN.jsonl. The student's last hidden states, averaged
over the tokens of each word, are to equal the teacher's; its first token, which the head will read, is to equal the
mean over all of the teacher's tokens. Losses are relative: 0 is the teacher, 1 is no better than zeros.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaForSequenceClassification,
    RobertaTokenizerFast,
    get_linear_schedule_with_warmup,
)

from cappy_engine.bulk.formats.json_lines import open_lines, read_rows
from cappy_export.adaptation.schedule import plan_window
from cappy_export.checkpoints.hub import TOKENIZER_FILES

MAX_LENGTH = 128
"""Pairs of more tokens, to either model, are left out."""

Pair = tuple[str, str]


@dataclass(frozen=True)
class Tokens:
    """One pair as a model reads it: token `ids` and, for each, the number of its `words` (-1: a special token)."""

    ids: list[int]
    words: list[int]


def tokenize(tokenizer: PreTrainedTokenizerFast, pair: Pair, *, between: int) -> Tokens:
    """Tokenise `pair` with special tokens around, and `between` separators in the middle.

        >>> tokenize(tokenizer, ("Is it good?", "Yes"), between=2).words
        [-1, 0, 1, 2, 2, -1, -1, 3, -1]

    Words are separated by white space and counted through both texts, so that they are the same for every tokenizer. A
    token of white space alone belongs to the word before it.
    """
    ids, words, counted = [tokenizer.cls_token_id], [-1], 0
    for text, separators in zip(pair, (between, 1), strict=True):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        is_space = np.array([True, *(letter.isspace() for letter in text)])
        word_of_letter = counted - 1 + np.cumsum(is_space[:-1] & ~is_space[1:])
        ids += [*encoded["input_ids"], *[tokenizer.sep_token_id] * separators]
        words += [int(word_of_letter[end - 1]) if end > start else -1 for start, end in encoded["offset_mapping"]]
        words += [-1] * separators
        counted = int(word_of_letter[-1]) + 1 if len(text) else counted
    return Tokens(ids, words)


def hidden_states(model: PreTrainedModel, batch: Sequence[Tokens]) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute last hidden states (batch, length, hidden) float32 and the attention mask (batch, length) int64.

    >>> hidden, mask = hidden_states(model, [Tokens([0, 5, 2], [-1, 0, -1])])
    """
    rows = [torch.tensor(row.ids) for row in batch]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=model.config.pad_token_id)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    hidden: torch.Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return hidden.float(), mask


def word_means(hidden: torch.Tensor, batch: Sequence[Tokens], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Average hidden states over the tokens of each word: (batch * width, hidden), and which words have any token.

    >>> word_means(torch.ones(1, 3, 4), [Tokens([0, 5, 2], [-1, 0, -1])], 1)[1]
    tensor([True])
    """
    places = [
        (row, column, row * width + word)
        for row, tokens in enumerate(batch)
        for column, word in enumerate(tokens.words)
        if word >= 0
    ]
    rows, columns, words = torch.tensor(places).T
    sums = hidden.new_zeros(len(batch) * width, hidden.shape[-1]).index_add(0, words, hidden[rows, columns])
    counts = hidden.new_zeros(len(batch) * width).index_add(0, words, torch.ones(len(words)))
    return sums / counts.clamp(min=1).unsqueeze(1), counts > 0


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Compute the mean squared error over the mean square of the wanted values.

    >>> relative_error(torch.tensor([0.0]), torch.tensor([2.0]))
    tensor(1.)
    """
    return (found - wanted).square().mean() / wanted.square().mean()


def distil(
    student: RobertaForSequenceClassification,
    teacher: BertModel,
    tokens: Sequence[tuple[Tokens, Tokens]],
    *,
    batch_size: int,
    learning_rate: float,
    is_bf16: bool,
    seed: int,
) -> None:
    """Train one epoch over `tokens`, (student's, teacher's) for each pair. Word embeddings learn five times as fast.

    >>> distil(student, teacher, tokens, batch_size=32, learning_rate=1e-4, is_bf16=False, seed=0)
    """
    encoder = student.roberta
    words = encoder.embeddings.word_embeddings.weight
    others = [value for value in encoder.parameters() if value is not words]
    groups = [{"params": [words], "lr": 5 * learning_rate}, {"params": others, "lr": learning_rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    lengths = np.array([len(mine.ids) for mine, _ in tokens])
    steps = plan_window(lengths, np.arange(len(tokens)), batch_size=batch_size, seed=seed, epoch=0)
    schedule = get_linear_schedule_with_warmup(optimizer, len(steps) // 20, len(steps))
    bar = tqdm(steps, unit="step", mininterval=10)
    for step in bar:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16):
            by_word, by_pair = losses(encoder, teacher, [tokens[row] for row in step])
        torch.autograd.backward(by_word + by_pair)
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(words=f"{by_word.item():.3f}", pairs=f"{by_pair.item():.3f}", refresh=False)


def losses(
    encoder: PreTrainedModel, teacher: PreTrainedModel, batch: Sequence[tuple[Tokens, Tokens]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the relative errors of the words' means and of the first token.

    >>> by_word, by_pair = losses(student.roberta, teacher, tokens[:32])
    """
    mine, theirs = zip(*batch, strict=True)
    width = 1 + max(max(row.words) for row in theirs)
    with torch.no_grad():
        wanted, mask = hidden_states(teacher, theirs)
        pooled = (wanted * mask.unsqueeze(2)).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    found, _ = hidden_states(encoder, mine)
    means, have = word_means(found, mine, width)
    wanted_means, wanted_have = word_means(wanted, theirs, width)
    both = have & wanted_have
    return relative_error(means[both], wanted_means[both]), relative_error(found[:, 0], pooled)


def load_teacher(minilm: Path) -> BertModel:
    """Load all-MiniLM-L6-v2 from its folder, without its pooler, which was never trained.

    >>> load_teacher(Path("model")).config.num_hidden_layers
    6
    """
    config = BertConfig.from_json_file(str(minilm / "config.json"))
    config._attn_implementation = "eager"
    teacher = BertModel(config, add_pooling_layer=False)
    weights = {
        name.removeprefix("bert."): value
        for name, value in load_file(minilm / "model.safetensors").items()
        if "pooler" not in name
    }
    weights.pop("embeddings.position_ids", None)
    teacher.load_state_dict(weights)
    return teacher.eval()


def read_pairs(path: Path, *, seed: int) -> list[Pair]:
    """Read one pair for each instruction, drawn and shuffled by the seed.

    >>> pairs = read_pairs(Path("stage2.jsonl"), seed=0)
    """
    responses: dict[str, list[str]] = {}
    with open_lines(path) as lines:
        for row in read_rows(lines):
            responses.setdefault(row.pair[0], []).append(row.pair[1])
    draw = random.Random(seed)  # noqa: S311 - a sample, no secret
    pairs = [(instruction, draw.choice(choices)) for instruction, choices in responses.items()]
    random.Random(seed).shuffle(pairs)  # noqa: S311
    return pairs


def _tokenize_all(
    pairs: Iterable[Pair], student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast
) -> list[tuple[Tokens, Tokens]]:
    both = ((tokenize(student, pair, between=2), tokenize(teacher, pair, between=1)) for pair in pairs)
    return [
        (mine, theirs)
        for mine, theirs in both
        if max(len(mine.ids), len(theirs.ids)) <= MAX_LENGTH and max(theirs.words) >= 0
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", type=Path)
    parser.add_argument("minilm", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--bf16", action="store_true", help="mixed precision; faster on CPUs with AVX512_BF16 or AMX")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True)
    tokens = _tokenize_all(
        read_pairs(options.train, seed=options.seed),
        RobertaTokenizerFast.from_pretrained(options.start),
        BertTokenizerFast(str(options.minilm / "vocab.txt"), do_lower_case=True),
    )
    torch.manual_seed(options.seed)
    student = RobertaForSequenceClassification.from_pretrained(options.start, attn_implementation="eager")
    distil(
        student.train(),
        load_teacher(options.minilm),
        tokens,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        is_bf16=options.bf16,
        seed=options.seed,
    )
    student.save_pretrained(options.out)
    for name in TOKENIZER_FILES:
        if (options.start / name).exists():
            shutil.copyfile(options.start / name, options.out / name)
    print(options.out)


if __name__ == "__main__":
    main()
