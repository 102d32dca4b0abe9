"""Write int8: 8-bit products in place of a float32 graph's, so that a pair's score depends on nothing but the pair.

Weights are signed 8 bits with a scale per output channel. Activations are unsigned 8 bits with a scale *per token*,
taken when the model runs. `quantize_dynamic` of ONNX Runtime, and so every tool built on it, takes one scale over the
whole batch: there a pair's score changes with its neighbours. Activations are rotated before (`rotation.py`), and
weights make up for each other's errors (`compensate_weights`). No CPU saturates (`rounding.py`).

What errs first errs most, since its errors go through all that follows: so word embeddings have 12 bits. Attention's
own products, layer norms and the head stay in float32.

`python -m cappy_bench.studies.int8_options` measures the alternatives. `int8_graph.py` writes the nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import onnx

from cappy_engine.errors import GraphError
from cappy_export.graphs.files import check_graph, head_nodes, save
from cappy_export.precisions.calibration import Inputs, measure_activations
from cappy_export.precisions.embeddings import quantize_embeddings
from cappy_export.precisions.int8_graph import Int8Options, Int8Rewriter
from cappy_export.precisions.rotation import BLOCK

QUANTIZED = ("MatMul", "Gemm", "Attention")
METHOD = (
    "weights int8 per channel with compensated rounding (GPTQ), activations uint8 per token, without their mean, "
    f"scaled and rotated in blocks of at most {BLOCK} channels, word embeddings in 12 bits per row"
)


def quantize(
    source: Path, out: Path, calibration: Iterable[Inputs], *, float32_products: Sequence[str] = ()
) -> dict[str, Any]:
    """Write the int8 model of the float32 model `source`; return the facts for the manifest.

    >>> quantize(Path("model.onnx"), Path("model_quantized.onnx"), pairs.inputs())["quantized"]
    {'Gemm': 24, 'embeddings': 1}

    Activations lose their mean on `calibration`, whose product goes into the biases; they are rotated in blocks, and
    weights make up for each other's rounding errors.

    Products whose names hold one of `float32_products` stay in float32. Raises GraphError if one of these fits no
    product, if there is no calibration, or if a product outside the head stayed in float32 unasked.
    """
    options = Int8Options(float32_products)
    kept, counts = quantize_products(source, out, options, calibration)
    expected = {*products_with_weights(source)} - {*kept}
    left = [name for name in products_with_weights(out) if name in expected]
    if not counts or left:
        raise GraphError(f"{len(left)} matrix products were not quantised: {', '.join(left) or 'there are none'}")
    tables = quantize_embeddings(out)
    check_graph(out)
    return {
        "method": METHOD,
        "quantized": {**counts, "embeddings": tables},
        "products_in_fp32": kept,
    }


def quantize_products(
    source: Path, out: Path, options: Int8Options, calibration: Iterable[Inputs]
) -> tuple[list[str], dict[str, int]]:
    """Write `source` with its products in 8 bits; return the names of those left in float32, and counts.

    >>> quantize_products(Path("model.onnx"), Path("model_quantized.onnx"), Int8Options(["layer.0/"]), inputs)
    """
    model = onnx.load(str(source))
    products = products_with_weights(source)
    kept = fitting(products, options.float32_products)
    replaced = {*products} - {*kept}
    read = list(dict.fromkeys(node.input[0] for node in model.graph.node if node.name in replaced))
    activations = measure_activations(source, read, calibration)
    if len(activations) < len(read):
        raise GraphError("int8 needs pairs to calibrate on, and there are none")
    counts = Counter(node.op_type for node in model.graph.node if node.name in replaced)
    Int8Rewriter(model, options, replaced, activations).rewrite()
    save(model, out)
    return kept, dict(counts)


def fitting(products: Sequence[str], parts: Sequence[str]) -> list[str]:
    """Name the products that hold one of `parts`; raises GraphError for a part that none holds.

    >>> fitting(["layer.0/output/dense", "layer.1/output/dense"], ["layer.1/"])
    ['layer.1/output/dense']
    """
    for part in parts:
        if not any(part in name for name in products):
            raise GraphError(f"no matrix product is named {part!r}; there are {', '.join(products)}")
    return [name for name in products if any(part in name for part in parts)]


def products_with_weights(path: Path) -> list[str]:
    """Name the float products with weights, those of the head left out.

    >>> products_with_weights(Path("model.onnx"))[:2]
    ['layer.0/attention/query', 'layer.0/attention/key']
    """
    model = onnx.load(str(path), load_external_data=False)
    weights = {entry.name for entry in model.graph.initializer if len(entry.dims) == 2}
    head = head_nodes(model)
    return [
        node.name
        for node in model.graph.node
        if node.op_type in QUANTIZED and node.input[1] in weights and node.name not in head
    ]
