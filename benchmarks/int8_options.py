"""Why int8 is made the way it is: ONNX Runtime's dynamic quantisation, option by option, on this CPU.

Every option quantises the same float32 graph; each scores the same pairs, one pair per run, so that no neighbour shifts
the activation scale. Errors are against the float32 graph (itself within 1e-4 of PyTorch). Options take turns, round by
round, and the median time counts. On a CPU without VNNI, the signed kernel (u8s8) saturates with 8-bit weights.

    python -m benchmarks.int8_options CHECKPOINT [--pairs PAIRS.jsonl] [--count 64] [--rounds 3] [--each-product]

With --each-product the chosen option is tried again with each matrix product left in float32 in turn: which of them
costs the accuracy?

The last line of the output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.quantization import QuantType

from cappy_engine.pairs import Pair
from cappy_engine.scorer import Scorer
from cappy_engine.session import open_session
from cappy_engine.tokenizer import PairTokenizer
from cappy_export.checkpoint import load_tokenizer, open_checkpoint
from cappy_export.graph import build_graph
from cappy_export.pairs import default_pairs, read_pairs
from cappy_export.parity import measure
from cappy_export.quantize import QUANTIZED, products_with_weights, quantize_with

OPTIONS: dict[str, dict[str, Any]] = {
    "u8 per channel (chosen)": {"weight_type": QuantType.QUInt8, "per_channel": True, "reduce_range": False},
    "u8 per tensor": {"weight_type": QuantType.QUInt8, "per_channel": False, "reduce_range": False},
    "s8 per channel": {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": False},
    "s8 per channel, 7 bits": {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": True},
    "s8 per tensor, 7 bits": {"weight_type": QuantType.QInt8, "per_channel": False, "reduce_range": True},
    "u8 per channel, attention fp32": {
        "weight_type": QuantType.QUInt8,
        "per_channel": True,
        "reduce_range": False,
        "op_types": ("MatMul",),
    },
}


def product_options(fp32: Path) -> dict[str, dict[str, Any]]:
    """The chosen option with one matrix product in float32, for each of them."""
    chosen = OPTIONS["u8 per channel (chosen)"]
    return {
        f"{name.removesuffix('/MatMul')} fp32": {**chosen, "excluded": [name]} for name in products_with_weights(fp32)
    }


def compare(checkpoint: str, pairs: Sequence[Pair], rounds: int, *, is_each_product: bool = False) -> dict[str, Any]:
    """Quantise, score and time every option; returns one row per option, float32 first."""
    opened = open_checkpoint(checkpoint)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved = load_tokenizer(opened, max_length=512)
        saved.save_pretrained(folder)
        tokenizer = PairTokenizer.from_file(folder / "tokenizer.json", max_length=saved.model_max_length)
        build_graph(opened, folder / "fp32.onnx")
        sizes, scorers = {}, {}
        options = OPTIONS | (product_options(folder / "fp32.onnx") if is_each_product else {})
        for option in ("fp32", *options):
            path = folder / "fp32.onnx"
            if option != "fp32":
                path = folder / "option.onnx"
                quantize_with(folder / "fp32.onnx", path, **{"op_types": QUANTIZED, **options[option]})
            sizes[option] = path.stat().st_size
            session = open_session(path, device="cpu")
            scorers[option] = Scorer(
                tokenizer=tokenizer, session=session, pad_token_id=int(saved.pad_token_id), max_batch_tokens=1
            )
            print(f"ready: {option}", file=sys.stderr, flush=True)
        return _rows(scorers, sizes, pairs, rounds)


def _rows(scorers: dict[str, Scorer], sizes: dict[str, int], pairs: Sequence[Pair], rounds: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {option: [] for option in scorers}
    scores: dict[str, npt.NDArray[np.float32]] = {}
    counts = scorers["fp32"].score_pairs(pairs[:1]).token_counts
    for _ in range(rounds):
        for option, scorer in scorers.items():
            started = time.perf_counter()
            scored = scorer.score_pairs(pairs)
            seconds[option].append(time.perf_counter() - started)
            scores[option], counts = scored.scores, scored.token_counts
    rows = {}
    for option in scorers:
        measured = measure(scores["fp32"], scores[option], pairs, counts)
        rows[option] = {name: measured[name] for name in ("max_error", "mean_error", "spearman", "winner_agreement")}
        rows[option] |= {"seconds": statistics.median(seconds[option]), "bytes": sizes[option]}
    return {"tokens": int(counts.sum()), "score_std": float(scores["fp32"].std()), "options": rows}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--pairs", type=Path, help="JSON Lines (default: the package's parity pairs)")
    parser.add_argument("--count", type=int, default=64, help="score about so many of the pairs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--each-product", action="store_true", help="find the product that costs the accuracy")
    options = parser.parse_args(argv)
    pairs = default_pairs() if options.pairs is None else read_pairs(options.pairs)
    pairs = pairs[:: max(1, len(pairs) // options.count)]
    result = compare(options.checkpoint, pairs, options.rounds, is_each_product=options.each_product)
    fp32 = result["options"]["fp32"]["seconds"]
    print(
        f"{len(pairs)} pairs, {result['tokens']} tokens, score std {result['score_std']:.3f}, {options.rounds} rounds"
    )
    width = max(map(len, result["options"]))
    print(f"{'option':<{width}}  max error  mean error  Spearman  seconds  speed-up      MB")
    for name, row in result["options"].items():
        print(
            f"{name:<{width}}  {row['max_error']:>9.4f}  {row['mean_error']:>10.4f}  {row['spearman']:>8.4f}  "
            f"{row['seconds']:>7.2f}  {fp32 / row['seconds']:>8.2f}  {row['bytes'] / 1e6:>6.1f}"
        )
    versions = {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__}
    print(json.dumps({"checkpoint": options.checkpoint, "pairs": len(pairs), "versions": versions, **result}))


if __name__ == "__main__":
    main()
