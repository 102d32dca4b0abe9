"""Shows why int8 is made as it is: one thing changed at a time.

Every option quantises the same float32 graph; each scores the same pairs, one pair per run, since ONNX Runtime's own
dynamic quantisation, here for comparison, lets a batch's pairs change each other's scores. Errors are against the
float32 graph (itself within 1e-4 of PyTorch). Options take turns, round by round, and the median time counts. On a CPU
without VNNI, 8-bit weights that may saturate do.

    python -m cappy_bench.studies.int8_options CHECKPOINT [--pairs PAIRS.jsonl] [--count 64]
        [--rounds 3] [--option NAME] [--each-product]

All options are calibrated on the package's own pairs. With --option only those that are named are tried. With
--each-product the chosen option is tried again with each matrix product left in float32 in turn: which of them
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cappy_bench.needed import needed
from cappy_engine.batching import Grouping
from cappy_engine.dispatcher import Dispatcher
from cappy_engine.pairs import Pair
from cappy_engine.scorer import Scorer
from cappy_engine.session import open_session
from cappy_engine.tokenizer import PairTokenizer

with needed("bench", __name__):
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from cappy_export.checkpoints.checkpoint import open_checkpoint
    from cappy_export.checkpoints.fast_tokenizer import load_tokenizer
    from cappy_export.graphs.build import build_graph
    from cappy_export.graphs.files import head_nodes, quiet
    from cappy_export.precisions.calibration import INT8_CALIBRATION_PAIRS, CalibrationPairs, Inputs
    from cappy_export.precisions.embeddings import Bits, quantize_embeddings
    from cappy_export.precisions.int8 import products_with_weights, quantize_products
    from cappy_export.precisions.int8_graph import Int8Options
    from cappy_export.precisions.rounding import Floats, Int8, quantize_weights
    from cappy_export.proof.pairs import default_pairs, read_pairs
    from cappy_export.proof.parity import measure

Make = Callable[[Path, Path, Sequence[Inputs]], object]
"""Writes the option's model: from the float32 graph, to a path, with model inputs of the pairs to calibrate on."""
CHOSEN = "chosen"


def _nearest(bits: int) -> Callable[[Floats, Floats], tuple[Int8, Floats]]:
    """Make a function that rounds each weight alone, to steps of so many bits.

    It does so whether neighbours may saturate or not.
    """
    limit = 2 ** (bits - 1) - 1

    def rounded(weights: Floats, moments: Floats) -> tuple[Int8, Floats]:
        scales = np.maximum(np.abs(weights).max(axis=0) / limit, np.finfo(np.float32).tiny).astype(np.float32)
        return np.clip(np.rint(weights / scales), -limit, limit).astype(np.int8), scales

    return rounded


def _ours(options: Int8Options, *, words: Bits | None = 12) -> Make:
    def make(fp32: Path, out: Path, calibration: Sequence[Inputs]) -> None:
        quantize_products(fp32, out, options, calibration)
        if words is not None:
            quantize_embeddings(out, words)

    return make


def _runtimes(weight_type: QuantType) -> Make:
    """ONNX Runtime's dynamic quantisation, per channel, of the same products."""

    def make(fp32: Path, out: Path, calibration: Sequence[Inputs]) -> None:
        head = head_nodes(onnx.load(str(fp32), load_external_data=False))
        with quiet():
            quantize_dynamic(
                fp32,
                out,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                weight_type=weight_type,
                nodes_to_exclude=sorted({*head, *(f"{name}_MatMul" for name in head)}),
                extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
            )

    return make


OPTIONS: dict[str, Make] = {
    CHOSEN: _ours(Int8Options()),
    "weights of 7 bits": _ours(Int8Options(rounds=_nearest(7))),
    "weights that may saturate": _ours(Int8Options(rounds=_nearest(8))),
    "weights not compensated": _ours(Int8Options(rounds=lambda weights, _: quantize_weights(weights))),
    "word embeddings in 8 bits": _ours(Int8Options(), words=8),
    "word embeddings in fp32": _ours(Int8Options(), words=None),
    "layer 0 in fp32": _ours(Int8Options(["layer.0/"])),
    "quantize_dynamic, signed": _runtimes(QuantType.QInt8),
    "quantize_dynamic, unsigned": _runtimes(QuantType.QUInt8),
}


def _compare(
    checkpoint: str,
    pairs: Sequence[Pair],
    rounds: int,
    *,
    chosen: Sequence[str],
    is_each_product: bool,
) -> dict[str, Any]:
    """Quantise, score and time the `chosen` options; return one row per option, float32 first."""
    opened = open_checkpoint(checkpoint)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved = load_tokenizer(opened, max_length=512)
        saved.save_pretrained(folder)
        tokenizer = PairTokenizer.from_file(folder / "tokenizer.json", max_length=saved.model_max_length)
        fp32 = folder / "fp32.onnx"
        build_graph(opened, fp32)
        known = CalibrationPairs(tokenizer.encode(default_pairs()), pad_token_id=int(saved.pad_token_id))
        calibration = list(known.inputs(INT8_CALIBRATION_PAIRS))
        options = {name: OPTIONS[name] for name in chosen}
        if is_each_product:
            for product in products_with_weights(fp32):
                options[f"{product} fp32"] = _ours(Int8Options([product]))
        sizes: dict[str, int] = {}
        scorers: dict[str, Scorer] = {}
        for option in ("fp32", *options):
            path = fp32
            if option != "fp32":
                path = folder / f"{len(sizes)}.onnx"  # of its own: ONNX Runtime maps the weights of large ones
                options[option](fp32, path, calibration)
            sizes[option] = sum(file.stat().st_size for file in folder.glob(f"{path.name}*"))
            session = open_session(path, device="cpu")
            scorers[option] = Scorer(
                tokenizer, Dispatcher(session, Grouping(1, "removed"), pad_token_id=int(saved.pad_token_id))
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
    parser.add_argument(
        "--option", action="append", choices=OPTIONS, dest="options", metavar="NAME",
        help=f"repeatable (default: all): {'; '.join(OPTIONS)}",
    )  # fmt: skip
    parser.add_argument("--each-product", action="store_true", help="find the product that costs the accuracy")
    options = parser.parse_args(argv)
    pairs = default_pairs() if options.pairs is None else read_pairs(options.pairs)
    pairs = pairs[:: max(1, len(pairs) // options.count)]
    result = _compare(
        options.checkpoint,
        pairs,
        options.rounds,
        chosen=options.options or tuple(OPTIONS),
        is_each_product=options.each_product,
    )
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
