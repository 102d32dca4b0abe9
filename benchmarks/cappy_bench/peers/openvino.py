"""Scores with OpenVINO on models that optimum-intel exported.

They run in float32, in OpenVINO's default precision, or in NNCF's static int8. Where a CPU has bfloat16, OpenVINO
computes in it unless told otherwise (INFERENCE_PRECISION_HINT), also in the parts of a quantised model that stay in
floating point. So fp32 is asked for. bf16 is OpenVINO's own choice, and fails on a CPU where OpenVINO chooses something
else. One stream (LATENCY) with all threads is optimum-intel's own default; with as many streams as threads each batch
has one thread, and batches run side by side.

Int8 is made as by sentence-transformers' `export_static_quantized_openvino_model`: weights and activations, by
OVQuantizationConfig's defaults (SmoothQuant, fast bias correction, 128 samples in random order). It is calibrated here
on the exporter's parity pairs. They are of the model's own kind, and no workload has them. Of the other options tried
on cappy-mini only 8-bit weights (OVWeightQuantizationConfig) ranked better by more than 0.001 of Spearman's
correlation: 0.999 instead of 0.992, at 1.4 times the time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import openvino

from cappy_bench.peers.batches import Batched, Inputs
from cappy_bench.peers.conversions import convert_once
from cappy_bench.peers.peer import Model, Scores
from cappy_bench.peers.worker import serve
from cappy_engine.batching import Batch
from cappy_engine.inputs import model_inputs
from cappy_engine.tokenizer import PairTokenizer
from cappy_export.proof import pairs

SEED = 42
MODELS = {"fp32": "fp32", "bf16": "fp32", "int8": "int8"}
"""Which model a precision computes: bfloat16 is made of float32 when that is compiled."""


def prepare(model: Model, precision: str) -> None:
    """Export the checkpoint, and quantise it for int8."""
    made = MODELS[precision]
    calibration = Path(pairs.__file__).with_name("parity_pairs.jsonl")
    sources = [Path(__file__), calibration, model.bundle / "tokenizer.json"]
    convert_once(model.folder / made, lambda folder: _convert(model, made, folder), sources=sources)


def _convert(model: Model, made: str, folder: Path) -> None:
    import nncf
    from optimum.intel import OVConfig, OVModelForSequenceClassification, OVQuantizationConfig, OVQuantizer

    loaded = OVModelForSequenceClassification.from_pretrained(
        str(model.require_checkpoint()), export=True, load_in_8bit=False, compile=False
    )
    if made == "int8":
        config = OVConfig(quantization_config=OVQuantizationConfig())
        OVQuantizer.from_pretrained(loaded).quantize(
            nncf.Dataset(_calibration(model, loaded.input_names)), ov_config=config
        )
    loaded.save_pretrained(folder)


def open_runner(model: Model, precision: str) -> Batched:
    """Compile what `prepare` made, for one batch at a time on all threads."""
    return _open(model, precision, streams=1)


def open_streams(model: Model, precision: str) -> Batched:
    """Compile what `prepare` made, for as many batches at a time as threads."""
    return _open(model, precision, streams=model.threads)


WAYS = {"one-stream": open_runner, "streams": open_streams}


def _open(model: Model, precision: str, *, streams: int) -> Batched:
    folder = model.folder / MODELS[precision]
    options: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": model.threads,
        "NUM_STREAMS": streams,
        "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
    }
    if precision == "fp32":
        options["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", options)
    if precision == "bf16":
        _require_bf16(compiled)
    names = [port.any_name for port in compiled.inputs]
    requests: SimpleQueue[openvino.InferRequest] = SimpleQueue()
    for _ in range(streams):
        requests.put(compiled.create_infer_request())

    def run(inputs: Inputs) -> Scores:
        request = requests.get()
        try:
            output = request.infer({name: inputs[name] for name in names}, share_inputs=True)
            scores: Scores = output["logits"][:, 0].copy()
        finally:
            requests.put(request)
        return scores

    return Batched(model, run, pad_token_id=_pad_token_id(folder), at_once=streams)


def _require_bf16(compiled: openvino.CompiledModel) -> None:
    chosen = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if chosen != "bf16":
        raise RuntimeError(f"OpenVINO's default precision on this CPU is {chosen}, not bf16")


def _pad_token_id(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["pad_token_id"])


def _calibration(model: Model, names: Iterable[str]) -> list[dict[str, Any]]:
    """Make the inputs of each parity pair, in random order; OVQuantizer takes the first 128."""
    tokenizer = PairTokenizer.from_file(model.bundle / "tokenizer.json", max_length=model.max_length)
    encoded = tokenizer.encode(pairs.default_pairs())
    order = np.random.default_rng(SEED).permutation(len(encoded.token_ids))
    batches = [Batch(np.array([row]), int(encoded.lengths[row])) for row in order]
    inputs = [model_inputs(encoded, batch, pad_token_id=0) for batch in batches]  # nothing is padded
    return [{name: values[name] for name in names} for values in inputs]


if __name__ == "__main__":
    serve(WAYS[sys.argv[1]], prepare)
