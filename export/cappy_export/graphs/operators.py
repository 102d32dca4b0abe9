"""Define the operators of the domain `cappy`: each is an ONNX function, which a model file carries.

A function's body says what the operator computes, in operators that every ONNX Runtime has. A runtime without kernels
for `cappy` puts the body in the operator's place when it loads the model. The engine's native library has a kernel for
each (`cappy_engine/native`), which computes the same, faster.

ONNX Runtime 1.20 tells functions apart by their names alone, so each variant has a name of its own. Rows are tokens: of
all pairs, one pair after the other, without padding; QuantizeRotatedRows, Linear and their variants take rows in more
dimensions, too. Each Cast behind an operator of com.microsoft names a type that the ONNX checker cannot know; ONNX
Runtime takes it out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import onnx.parser
from onnx import helper

from cappy_export.graphs import attention_operators
from cappy_export.graphs.bodies import (
    BF16_PRODUCT,
    GATE,
    PRODUCT,
    QUANTIZE,
    ROTATE,
    filled,
)

DOMAIN = "cappy"
VERSION = 1

_GELU = "unknown = com.microsoft.BiasGelu (product, bias)  y = Cast <to = 1> (unknown)"
_ADD = "linear = Add (product, bias)  y = Add (linear, residual)"
_NORM = """
    linear = Add (product, bias)
    mixed = Add (linear, residual)
    y = LayerNormalization <axis = -1, epsilon: float = @epsilon> (mixed, gamma, beta)
"""


def _quantize_rotated_rows() -> str:
    """QuantizeRotatedRows (given float [n, k], factors float [k], offsets float [k]) -> (q uint8 [n, k], scale)

    x is given * factors + offsets, in which each block of columns was multiplied by the Hadamard matrix of 1 and -1
    (Sylvester's order). scale = max(largest |x| of the row, least) / steps; q = x * (1 / scale) + zero_point, rounded
    half to even, in 0 to 255.
    Attributes: zero_point, steps and block, a power of two that divides k (int), least (float).
    """
    # The matrix has -1 where its row's and its column's numbers have an odd number of bits in common.
    body = ROTATE + QUANTIZE
    return (
        "QuantizeRotatedRows <block, zero_point, steps, least> (given, factors, offsets) => (q, scale) {" + body + "}"
    )


def _quantize_normed_rows() -> str:
    """QuantizeNormedRows (rows float [n, k], gamma [k], beta [k], factors [k], offsets [k]) -> (q uint8 [n, k], scale)

    As QuantizeRotatedRows, of the rows' layer norm. Attribute: epsilon.
    """
    norm = "given = LayerNormalization <axis = -1, epsilon: float = @epsilon> (rows, gamma, beta)"
    body = norm + ROTATE + QUANTIZE
    return (
        "QuantizeNormedRows <epsilon, block, zero_point, steps, least> "
        "(rows, gamma, beta, factors, offsets) => (q, scale) {" + body + "}"
    )


def _quantize_gated_rows() -> str:
    """QuantizeGatedRows (rows float [n, 2 k], factors [k], offsets [k]) -> (q uint8 [n, k], scale)

    As QuantizeRotatedRows, of what GeGlu makes of the rows.
    """
    body = filled(GATE, rows="rows", gated="given") + ROTATE + QUANTIZE
    return "QuantizeGatedRows <block, zero_point, steps, least> (rows, factors, offsets) => (q, scale) {" + body + "}"


def _linear() -> str:
    """Linear (q uint8 [n, k], scale float [n, 1], weights int8, weight_scales float [m], bias float [m]) -> y [n, m]

    y = scale * weight_scales * ((q - zero_point) @ W) + bias. `weights` are W [k, m] as [m / 16, k / 4, 16, 4]: W[4 g +
    j, 16 p + c] is weights[p, g, c, j]. Attribute: zero_point.
    """
    inputs = "(q, scale, weights, weight_scales, bias)"
    return f"Linear <zero_point> {inputs} => (y) {{ {PRODUCT} y = Add (product, bias) }}"


def _linear_gelu() -> str:
    """LinearGelu (q, scale, weights, weight_scales, bias) -> y: Gelu, with erf, of what Linear computes."""
    inputs = "(q, scale, weights, weight_scales, bias)"
    return f"LinearGelu <zero_point, activation> {inputs} => (y) {{ {PRODUCT} {_GELU} }}"


def _linear_add() -> str:
    """LinearAdd (q, scale, weights, weight_scales, bias, residual [n, m]) -> y: what Linear computes, plus residual."""
    inputs = "(q, scale, weights, weight_scales, bias, residual)"
    return f"LinearAdd <zero_point> {inputs} => (y) {{ {PRODUCT} {_ADD} }}"


def _linear_norm() -> str:
    """LinearNorm (q, scale, weights, weight_scales, bias, residual [n, m], gamma [m], beta [m]) -> y

    The layer norm of residual and what Linear computes. Attributes: zero_point, epsilon.
    """
    inputs = "(q, scale, weights, weight_scales, bias, residual, gamma, beta)"
    return f"LinearNorm <zero_point, epsilon> {inputs} => (y) {{ {PRODUCT} {_NORM} }}"


def _bf16_linear() -> str:
    """Bf16Linear (x float [n, k], weights bfloat16, bias float [m]) -> y float [n, m]

    y = x @ W + bias, of x rounded to bfloat16, half to even, in float32. `weights` are W [k, m] as [m / 16, k / 2, 16,
    2]: W[2 g + j, 16 p + c] is weights[p, g, c, j].
    """
    return f"Bf16Linear (x, weights, bias) => (y) {{ {BF16_PRODUCT} y = Add (product, bias) }}"


def _bf16_linear_gelu() -> str:
    """Bf16LinearGelu (x, weights, bias) -> y: Gelu, with erf, of what Bf16Linear computes."""
    return f"Bf16LinearGelu <activation> (x, weights, bias) => (y) {{ {BF16_PRODUCT} {_GELU} }}"


def _bf16_linear_add() -> str:
    """Bf16LinearAdd (x, weights, bias, residual float [n, m]) -> y: what Bf16Linear computes, plus residual."""
    return f"Bf16LinearAdd (x, weights, bias, residual) => (y) {{ {BF16_PRODUCT} {_ADD} }}"


def _bf16_linear_norm() -> str:
    """Bf16LinearNorm (x, weights, bias, residual float [n, m], gamma float [m], beta float [m]) -> y

    The layer norm of residual and what Bf16Linear computes. Attribute: epsilon.
    """
    inputs = "(x, weights, bias, residual, gamma, beta)"
    return f"Bf16LinearNorm <epsilon> {inputs} => (y) {{ {BF16_PRODUCT} {_NORM} }}"


def _ge_glu() -> str:
    """GeGlu (x float [n, 2 m]) -> y float [n, m]: Gelu, with erf, of each row's first half, times its second half."""
    return "GeGlu (x) => (y) {" + filled(GATE, rows="x", gated="y") + "}"


_WRITERS: Mapping[str, Callable[[], str]] = {
    "QuantizeRotatedRows": _quantize_rotated_rows,
    "QuantizeNormedRows": _quantize_normed_rows,
    "QuantizeGatedRows": _quantize_gated_rows,
    "Linear": _linear,
    "LinearAdd": _linear_add,
    "LinearGelu": _linear_gelu,
    "LinearNorm": _linear_norm,
    "Bf16Linear": _bf16_linear,
    "Bf16LinearAdd": _bf16_linear_add,
    "Bf16LinearGelu": _bf16_linear_gelu,
    "Bf16LinearNorm": _bf16_linear_norm,
    "GeGlu": _ge_glu,
    **attention_operators.WRITERS,
}
OPERATORS = tuple(_WRITERS)


def function(name: str) -> onnx.FunctionProto:
    """Write the function of one of OPERATORS.

    >>> list(function("QuantizeRotatedRows").output)
    ['q', 'scale']
    """
    write = _WRITERS[name]
    header = f'<opset_import: ["" : 18, "com.microsoft" : 1], domain: "{DOMAIN}">'
    written = onnx.parser.parse_function(header + write())
    written.doc_string = inspect.getdoc(write) or ""
    return written


def with_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Put the functions of the operators that `model` uses into it; the same object is returned.

    >>> [function.name for function in with_functions(onnx.load("my-bundle/onnx/model.onnx")).functions]
    ['Attention', 'FirstAttention']
    """
    used = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    del model.functions[:]
    model.functions.extend(function(name) for name in OPERATORS if name in used)
    if used and all(entry.domain != DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    return model


def operators_of(path: Path) -> list[str]:
    """List the operators of the domain `cappy` that a model file uses, each once.

    >>> operators_of(Path("my-bundle/onnx/model.onnx"))
    ['Attention', 'FirstAttention']
    """
    functions = onnx.load(str(path), load_external_data=False).functions
    return sorted(entry.name for entry in functions if entry.domain == DOMAIN)
