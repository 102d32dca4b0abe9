"""Compare the engine's token ids with transformers' on made-up pairs, for each family's tokenizer.

    python -m cappy_bench.studies.token_ids --pairs 100000

Texts mix words, special tokens, spaces, controls and code points of all planes; some are longer than a model takes. The
last line is a JSON object with the counts of pairs that differ. The exit status is 1 if one differs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cappy_bench.needed import needed
from cappy_engine.tokenizer import PairTokenizer
from cappy_export.proof.pairs import default_pairs

with needed("bench", __name__):
    from transformers import AutoTokenizer

    from cappy_bench.families import FAMILIES

Pair = tuple[str, str]

SPECIAL = ("<s>", "</s>", "<pad>", "<mask>", "<unk>", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]")
SPACES = (" ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "\u200b", "\u200d", "\ufeff", "\x00", "\x1c", "▁")
PLANES = ((0x20, 0x7F), (0x80, 0x250), (0x300, 0x370), (0x370, 0x2000), (0x2000, 0x3000), (0x3000, 0xD800))
HIGH = ((0xE000, 0x10000), (0x1F300, 0x1FB00), (0x10000, 0x110000))
CHUNK = 500


def made_up_pairs(count: int, seed: int) -> Iterator[Pair]:
    """Make up `count` pairs from a seed; one in fifty is longer than 512 tokens.

    >>> len(list(made_up_pairs(3, seed=0)))
    3
    """
    choose = random.Random(seed)  # noqa: S311 - texts, no secrets
    words = [word for pair in default_pairs() for text in pair for word in text.split()[:60]]
    for _ in range(count):
        is_long = choose.random() < 0.02
        lengths = [choose.randint(200, 900) if is_long else choose.randint(0, 12) for _ in range(2)]
        yield _text(choose, words, lengths[0]), _text(choose, words, lengths[1])


def _differing(tokenizer: Any, engine: PairTokenizer, pairs: Sequence[Pair]) -> list[Pair]:
    """List the pairs whose ids or token types are not transformers'. Types count where the model takes them."""
    found, types = engine.encode(pairs), "token_type_ids" in tokenizer.model_input_names
    wanted = tokenizer(list(pairs), truncation=True, max_length=engine.max_length, return_token_type_ids=types)
    return [
        pair
        for row, pair in enumerate(pairs)
        if found.token_ids[row].tolist() != wanted["input_ids"][row]
        or (types and found.type_ids[row].tolist() != wanted["token_type_ids"][row])
    ]


def compare(family: str, folder: Path, count: int, seed: int) -> list[Pair]:
    """Write the tokenizer of `family` to `folder`, and list made-up pairs that differ.

    >>> compare("bge-reranker-base", Path("made"), 1000, seed=0)
    []

    It makes up `count` pairs, and lists those whose ids or token types are not transformers'.
    """
    FAMILIES[family].write_tokenizer(folder, None, 512).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = PairTokenizer.from_file(folder / "tokenizer.json", max_length=512)
    pairs = list(made_up_pairs(count, seed))
    return [pair for at in range(0, count, CHUNK) for pair in _differing(tokenizer, engine, pairs[at : at + CHUNK])]


def _text(choose: random.Random, words: Sequence[str], pieces: int) -> str:
    made = []
    for _ in range(pieces):
        kind = choose.random()
        if kind < 0.5:
            made.append(choose.choice(words))
        elif kind < 0.6:
            made.append(choose.choice(SPECIAL))
        elif kind < 0.85:
            made.append(choose.choice(SPACES) if kind < 0.7 else " ")
        else:
            made += [chr(choose.randrange(*choose.choice(PLANES + HIGH))) for _ in range(choose.randint(1, 5))]
    return "".join(made)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", dest="families", action="append", choices=sorted(FAMILIES))
    options = parser.parse_args(argv)
    kinds = {FAMILIES[family].write_tokenizer: family for family in sorted(FAMILIES, reverse=True)}
    counts = {}
    for family in options.families or sorted(kinds.values()):
        with tempfile.TemporaryDirectory() as folder:
            found = compare(family, Path(folder), options.pairs, options.seed)
        for pair in found[:3]:
            print(f"{family}: {pair!a}", file=sys.stderr)
        counts[family] = len(found)
    print(json.dumps({"pairs": options.pairs, "seed": options.seed, "differ": counts}))
    return 1 if any(counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
