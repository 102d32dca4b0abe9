"""Scores with OpenVINO in as many streams as threads: each batch has one thread, and batches run side by side."""

from __future__ import annotations

import dataclasses

from cappy_bench.peers import openvino
from cappy_bench.peers.batches import Batched
from cappy_bench.peers.peer import Model
from cappy_bench.peers.worker import serve


def prepare(model: Model, precision: str) -> None:
    """Make what the runner with one stream makes; both read it."""
    openvino.prepare(_shared(model), precision)


def open_runner(model: Model, precision: str) -> Batched:
    """Compile what `prepare` made."""
    return openvino.open_streams(_shared(model), precision, streams=model.threads)


def _shared(model: Model) -> Model:
    return dataclasses.replace(model, folder=model.folder.parent / "openvino")


if __name__ == "__main__":
    serve(open_runner, prepare)
