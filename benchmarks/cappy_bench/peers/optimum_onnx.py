"""Scores with optimum's ORTModelForSequenceClassification: its own export, optimised to O2, or in dynamic int8.

O2 is the highest level that changes no score; O3 approximates GELU. Int8 follows optimum's ready-made configuration for
the CPU: signed weights where the CPU has VNNI, unsigned (`avx2`) where signed ones would saturate. It is made from the
raw export: ORTQuantizer refuses the optimised one ("Unable to find data type for weight_name").

One batch on all threads is what a user gets; as many batches as threads, side by side on one session that gives each a
thread, is how OpenVINO's streams and our scorer compute many pairs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnxruntime
import torch
from optimum.onnxruntime import (
    AutoOptimizationConfig,
    AutoQuantizationConfig,
    ORTModelForSequenceClassification,
    ORTOptimizer,
    ORTQuantizer,
)
from optimum.onnxruntime.configuration import QuantizationConfig

from cappy_bench.peers.batches import Batched, Inputs
from cappy_bench.peers.conversions import convert_once
from cappy_bench.peers.peer import Model, Scores
from cappy_bench.peers.worker import serve
from cappy_engine.cpu.cores import cpu_flags

FILES = {"fp32": "model_optimized.onnx", "int8": "model_quantized.onnx"}


def prepare(model: Model, precision: str) -> None:
    """Export and optimise the checkpoint, and quantise it for int8."""
    convert_once(model.folder / precision, lambda folder: _convert(model, precision, folder), sources=[Path(__file__)])


def _convert(model: Model, precision: str, folder: Path) -> None:
    exported = ORTModelForSequenceClassification.from_pretrained(
        model.require_checkpoint(), export=True, local_files_only=True
    )
    if precision == "fp32":
        ORTOptimizer.from_pretrained(exported).optimize(AutoOptimizationConfig.O2(), save_dir=folder)
    else:
        quantizer = ORTQuantizer.from_pretrained(exported)
        quantizer.quantize(save_dir=folder, quantization_config=_int8())
        exported.config.save_pretrained(folder)


def open_runner(model: Model, precision: str) -> Batched:
    """Load what `prepare` made, for one batch at a time on all threads."""
    return _open(model, precision, at_once=1)


def open_streams(model: Model, precision: str) -> Batched:
    """Load what `prepare` made, for as many batches at a time as threads."""
    return _open(model, precision, at_once=model.threads)


WAYS = {"one-batch": open_runner, "streams": open_streams}


def _open(model: Model, precision: str, *, at_once: int) -> Batched:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = model.threads if at_once == 1 else 1
    loaded = ORTModelForSequenceClassification.from_pretrained(
        Path(model.folder, precision), file_name=FILES[precision], session_options=options, local_files_only=True
    )

    def run(inputs: Inputs) -> Scores:
        output = loaded(**{name: torch.from_numpy(inputs[name]) for name in loaded.input_names})
        scores: Scores = output.logits[:, 0].numpy()
        return scores

    return Batched(model, run, pad_token_id=int(loaded.config.pad_token_id), at_once=at_once)


def _int8() -> QuantizationConfig:
    if cpu_flags() & {"avx512_vnni", "avx_vnni"}:
        return AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
    return AutoQuantizationConfig.avx2(is_static=False, per_channel=True)


if __name__ == "__main__":
    serve(WAYS[sys.argv[1]], prepare)
