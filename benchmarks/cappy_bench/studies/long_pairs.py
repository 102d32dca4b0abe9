"""Measures how far scores of long pairs are from PyTorch's. Also measures the memory that the engine takes for them.

    python -m cappy_bench.studies.long_pairs BUNDLE CHECKPOINT [--pairs 24] [--shortest 512]
        [--longest 8192] [--kept FILE.jsonl] [--attention sdpa]

The package's parity pairs are short, because PyTorch takes long for each. These are made of their words: lengths from
`--shortest` tokens to `--longest`, or to the most that the bundle takes, the instruction a quarter of each. Twice the
length comes half as often, so that pairs of 512 to 1,024 tokens have as many tokens together as those of 4,096 to
8,192. Every precision scores all of them in one call.

PyTorch takes a minute and more for a pair of 8,192 tokens on two cores. `--kept` keeps its scores, pair by pair, and a
run that was stopped goes on from there. `--attention eager` is what the parity of a bundle is measured by, and the only
one that DeBERTa has; "sdpa", transformers' default for other models, takes a third of its time for long pairs.

The last line of the output is one JSON document.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from cappy_bench.machine import describe_machine
from cappy_bench.memory import forget_peak, peak_bytes
from cappy_engine.bundle import open_bundle
from cappy_engine.errors import BenchmarkError
from cappy_engine.options import Precision, ScorerOptions
from cappy_engine.pairs import Pair
from cappy_engine.scorer import Scorer
from cappy_engine.storage import sha256_of
from cappy_engine.tokenizer import PairTokenizer
from cappy_export.proof.pairs import default_pairs


def make_long_pairs(tokenizer: PairTokenizer, *, count: int, shortest: int, longest: int) -> Iterator[Pair]:
    """Make `count` pairs of `shortest` to `longest` tokens, or a few less.

    >>> list(make_long_pairs(tokenizer, count=2, shortest=512, longest=8192))
    """
    choose = random.Random(0)  # noqa: S311 - texts, no secrets
    words = [word for pair in default_pairs() for text in pair for word in text.split() if len(word) < 20]
    for length in (1 / np.linspace(1 / shortest, 1 / longest, count)).round():
        drawn = [choose.choice(words) for _ in range(int(length))]  # a word has one token or more
        low, high = 1, len(drawn)
        while low < high:  # the most words that are not too many tokens
            middle = (low + high + 1) // 2
            encoded = tokenizer.encode([_split(drawn[:middle])])
            low, high = (low, middle - 1) if encoded.truncated[0] or encoded.lengths[0] > length else (middle, high)
        yield _split(drawn[:low])


def _measure(bundle: Path, precision: str, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Open the bundle and score `pairs` in one call; returns the scores, seconds, and this process's peak of memory."""
    forget_peak()
    with Scorer.open_with(bundle, ScorerOptions(device="cpu", precision=cast(Precision, precision))) as scorer:
        started = time.perf_counter()
        scores = scorer.score(pairs)
        return {"scores": scores, "seconds": round(time.perf_counter() - started, 1), "peak_bytes": peak_bytes()}


def _score_by_torch(
    checkpoint: Path, pairs: Sequence[Pair], *, max_length: int, attention: str, kept: Path | None
) -> npt.NDArray[np.float32]:
    """Score pairs with PyTorch, (n,) float32; those whose scores lie in the file `kept` are not scored again."""
    # Not imported before the engine's memory is measured.
    from cappy_export.checkpoints.checkpoint import digest_of_files, open_checkpoint
    from cappy_export.proof.reference import each_score

    opened = open_checkpoint(checkpoint)
    weights = digest_of_files({path.name: sha256_of(path) for path in opened.weight_paths})
    called = {pair: _digest([weights, max_length, attention, *pair]) for pair in pairs}
    found: dict[str, float] = {}
    if kept and kept.exists():
        for line in kept.read_text(encoding="utf-8").splitlines():
            found.update(json.loads(line))
    missing = [pair for pair, name in called.items() if name not in found]
    scored = each_score(opened, missing, max_length=max_length, attention=attention)
    for pair, each in zip(missing, scored, strict=True):
        found[called[pair]] = each.score
        if kept:
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps({called[pair]: each.score}) + "\n")
    return np.array([found[called[pair]] for pair in pairs], dtype=np.float32)


def compare(
    bundle: Path,
    checkpoint: Path,
    *,
    count: int,
    shortest: int,
    longest: int | None = None,
    attention: str = "eager",
    kept: Path | None = None,
) -> dict[str, Any]:
    """Score long pairs with every precision of the bundle and with PyTorch; returns errors, seconds and memory.

    >>> compare(Path("bundle"), Path("checkpoint"), count=24, shortest=512)["precisions"]["fp32"]["max_error"]
    """
    opened = open_bundle(bundle)
    max_length = opened.manifest.max_length
    tokenizer = PairTokenizer.from_file(opened.file("tokenizer.json"), max_length=max_length)
    pairs = list(make_long_pairs(tokenizer, count=count, shortest=shortest, longest=longest or max_length))
    found = {precision: _measure(bundle, precision, pairs) for precision in opened.manifest.precisions}

    from cappy_export.proof.parity import spearman  # PyTorch, too, now that the engine's memory is measured

    started = time.perf_counter()
    wanted = _score_by_torch(checkpoint, pairs, max_length=max_length, attention=attention, kept=kept)
    strange = wanted[~np.isfinite(wanted)]
    if strange.size:
        raise BenchmarkError(f"PyTorch itself gives {strange[0]} for {strange.size} pairs; compare another checkpoint")
    for each in found.values():
        scores = each.pop("scores")
        each["max_error"] = float(np.abs(scores - wanted).max())
        each["spearman"] = spearman(wanted, scores)
    return {
        "tokens": tokenizer.encode(pairs).lengths.tolist(),
        "deviation_of_scores": float(wanted.std()),
        "attention": attention,
        "torch_seconds": round(time.perf_counter() - started, 1),
        "precisions": found,
    }


def _digest(what: Sequence[str | int]) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _split(words: Sequence[str]) -> Pair:
    quarter = max(1, len(words) // 4)
    return " ".join(words[:quarter]), " ".join(words[quarter:])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--shortest", type=int, default=512)
    parser.add_argument("--longest", type=int)
    parser.add_argument("--kept", type=Path)
    parser.add_argument("--attention", default="sdpa")
    options = parser.parse_args(argv)
    found = compare(
        options.bundle,
        options.checkpoint,
        count=options.pairs,
        shortest=options.shortest,
        longest=options.longest,
        attention=options.attention,
        kept=options.kept,
    )
    for precision, each in found["precisions"].items():
        print(
            f"{precision}: max error {each['max_error']:.1e}, peak {each['peak_bytes'] / 2**20:.0f} MiB",
            file=sys.stderr,
        )
    print(json.dumps({"machine": describe_machine(), **found}))


if __name__ == "__main__":
    main()
