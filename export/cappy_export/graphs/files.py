"""Write ONNX files, check them, and find the head in a graph. Knows no architecture."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx.external_data_helper import set_external_data

from cappy_engine.bundle_files import EXTERNAL_SUFFIX
from cappy_engine.errors import GraphError
from cappy_engine.session import INPUTS
from cappy_engine.storage import naming

MAX_BYTES = 2**31 - 2**24
"""The most that one ONNX file can hold (protobuf's limit), less some space for the graph itself.

Graphs that `save` writes may have more: their weights lie beside them. Exporters and ONNX Runtime's own tools make
one file on their way.
"""
EXTERNAL_BYTES = 2**27
EXTERNAL_TENSOR_BYTES = 2**14
MIN_OPSET = 17
AXES = ["batch_size", "sequence_length"]
BODY_ENDS = ("SkipLayerNormalization", "LayerNormalization", "LinearNorm", "Bf16LinearNorm", "Gather", "Slice")
"""The operators that the head reads: the last layer's output, or the first token of it."""


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write the model to `path`, and the weights of a large one beside it.

    >>> save(onnx.load("model.onnx"), Path("copy.onnx"))

    The second file has the name that other tools expect. ONNX Runtime maps it instead of copying it: cappy-large's fp32
    loads in 1.2 s and 1.25 GB instead of 3 s and 2.2 GB.
    """
    beside = path.with_name(path.name + EXTERNAL_SUFFIX)
    beside.unlink(missing_ok=True)  # onnx would append to it
    weights = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if weights >= EXTERNAL_BYTES:  # not ByteSize, which fails beyond protobuf's limit
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) >= EXTERNAL_TENSOR_BYTES:
                set_external_data(tensor, beside.name)
    with naming(path):
        onnx.save(model, str(path))
    if beside.exists():
        beside.chmod(path.stat().st_mode)  # onnx makes it private to its owner


def check_graph(path: Path) -> None:
    """Raise GraphError unless the model is valid, with a bundle's inputs, axes and opset.

    >>> check_graph(Path("my-bundle/onnx/model.onnx"))
    """
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise GraphError(f"onnx.checker refuses {path.name}: {error}") from error
    model = onnx.load(str(path), load_external_data=False)
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    if opset < MIN_OPSET:
        raise GraphError(f"{path.name} has opset {opset}; at least {MIN_OPSET} is needed")
    names = [entry.name for entry in model.graph.input]
    if not {"input_ids"} <= set(names) <= set(INPUTS):
        raise GraphError(f"{path.name} takes {', '.join(names)}; of a pair there are only {', '.join(INPUTS)}")
    for entry in (*model.graph.input, *model.graph.output):
        axes = [axis.dim_param or axis.dim_value for axis in entry.type.tensor_type.shape.dim]
        if axes != ([AXES[0], 1] if entry.name == "logits" else AXES):
            raise GraphError(f"{entry.name} of {path.name} has the axes {axes}; the exporter specialised one")


def head_nodes(model: onnx.ModelProto) -> set[str]:
    """Find the names of the nodes between the last layer's output and the logits.

    >>> sorted(head_nodes(onnx.load("my-bundle/onnx/model.onnx")))
    ['head/activation', 'head/dense', 'logits']
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    found: set[str] = set()
    waiting = [entry.name for entry in model.graph.output]
    while waiting:
        node = producers.get(waiting.pop())
        is_body = node is not None and node.op_type in BODY_ENDS and not node.name.startswith("head/")
        if node is not None and node.name not in found and not is_body:
            found.add(node.name)
            waiting.extend(node.input)
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries that write graphs: their warnings and prints are about themselves.

    >>> with quiet():
    ...     print("not shown")
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
