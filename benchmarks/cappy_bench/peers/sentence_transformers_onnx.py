"""Scores with sentence-transformers' CrossEncoder on ONNX Runtime, which exports and optimises the model itself.

O2 is the highest level that changes no score; O3 approximates GELU.
"""

from __future__ import annotations

from pathlib import Path

import onnxruntime
from sentence_transformers import CrossEncoder
from sentence_transformers.backend import export_optimized_onnx_model

from cappy_bench.peers.conversions import convert_once
from cappy_bench.peers.peer import Model
from cappy_bench.peers.sentence_transformers_torch import CrossEncoderRunner
from cappy_bench.peers.worker import serve

FILE = "onnx/model_O2.onnx"


def prepare(model: Model, precision: str) -> None:
    """Export the checkpoint with sentence-transformers, and optimise it."""
    convert_once(_folder(model), lambda folder: _convert(model, folder), sources=[Path(__file__)])


def _convert(model: Model, folder: Path) -> None:
    encoder = CrossEncoder(
        str(model.require_checkpoint()), backend="onnx", local_files_only=True, model_kwargs={"export": True}
    )
    encoder.save_pretrained(str(folder))
    export_optimized_onnx_model(encoder, "O2", str(folder))


def open_runner(model: Model, precision: str) -> CrossEncoderRunner:
    """Load the optimised model."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = model.threads
    return CrossEncoderRunner(
        CrossEncoder(
            str(_folder(model)),
            backend="onnx",
            device="cpu",
            max_length=model.max_length,
            local_files_only=True,
            model_kwargs={"file_name": FILE, "provider": "CPUExecutionProvider", "session_options": options},
        )
    )


def _folder(model: Model) -> Path:
    return model.folder / "optimised"


if __name__ == "__main__":
    serve(open_runner, prepare)
