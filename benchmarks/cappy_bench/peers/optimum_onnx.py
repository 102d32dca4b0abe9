"""Scores with optimum's ORTModelForSequenceClassification: its own export, optimised to O2, or in dynamic int8.

O2 is the highest level that changes no score; O3 approximates GELU. Int8 follows optimum's ready-made configuration for
the CPU: signed weights where the CPU has VNNI, unsigned (`avx2`) where signed ones would saturate. It is made from the
raw export: ORTQuantizer refuses the optimised one ("Unable to find data type for weight_name").
"""

from __future__ import annotations

import shutil
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
from cappy_bench.peers.peer import Model, Scores
from cappy_bench.peers.worker import serve
from cappy_engine.cpu.cores import cpu_flags

FILES = {"fp32": "model_optimized.onnx", "int8": "model_quantized.onnx"}


def prepare(model: Model, precision: str) -> None:
    """Export and optimise the checkpoint, and quantise it for int8."""
    folder = model.folder / precision
    if (folder / FILES[precision]).exists():
        return
    making = model.folder / f"{precision}-making"
    shutil.rmtree(making, ignore_errors=True)
    exported = ORTModelForSequenceClassification.from_pretrained(
        model.require_checkpoint(), export=True, local_files_only=True
    )
    if precision == "fp32":
        ORTOptimizer.from_pretrained(exported).optimize(AutoOptimizationConfig.O2(), save_dir=making)
    else:
        quantizer = ORTQuantizer.from_pretrained(exported)
        quantizer.quantize(save_dir=making, quantization_config=_int8())
        exported.config.save_pretrained(making)
    making.rename(folder)


def open_runner(model: Model, precision: str) -> Batched:
    """Load what `prepare` made."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = model.threads
    loaded = ORTModelForSequenceClassification.from_pretrained(
        Path(model.folder, precision), file_name=FILES[precision], session_options=options, local_files_only=True
    )

    def run(inputs: Inputs) -> Scores:
        output = loaded(**{name: torch.from_numpy(inputs[name]) for name in loaded.input_names})
        scores: Scores = output.logits[:, 0].numpy()
        return scores

    return Batched(model, run, pad_token_id=int(loaded.config.pad_token_id))


def _int8() -> QuantizationConfig:
    if cpu_flags() & {"avx512_vnni", "avx_vnni"}:
        return AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
    return AutoQuantizationConfig.avx2(is_static=False, per_channel=True)


if __name__ == "__main__":
    serve(open_runner, prepare)
