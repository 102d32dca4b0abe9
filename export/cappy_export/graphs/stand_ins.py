"""Stand in for operators of CUDA, so that its graph is proven without a GPU.

Each is an ONNX function of standard operators, written from the operator's documented shapes and its source
(onnxruntime/contrib_ops/cuda/bert). Everything else of the graph, its weights and casts included, stays as it is.
"""

from __future__ import annotations

import onnx
import onnx.parser

from cappy_engine.errors import GraphError
from cappy_export.graphs.writer import MICROSOFT

DOMAIN = "cappy.emulated"
ATTEND = """
    last = Constant <value_ints = [-1]> ()
    first = Constant <value_ints = [0]> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    two = Constant <value_int = 2> ()
    count = Shape <start = 0, end = 1> (packed)
    all_offsets = Reshape (offsets, last)
    wide_offsets = Cast <to = 7> (all_offsets)
    real = Slice (wide_offsets, first, count)
    real_column = Unsqueeze (real, last)
    shape = Shape (offsets)
    slots = ReduceProd <keepdims = 1> (shape)
    width = Shape <start = 1, end = 2> (packed)
    padded_shape = Concat <axis = 0> (slots, width)
    blank = ConstantOfShape (padded_shape)
    typed_blank = CastLike (blank, packed)
    padded = ScatterND (typed_blank, real_column, packed)
    heads_number = Constant <value_int : int = @num_heads> ()
    heads = Reshape (heads_number, last)
    three = Constant <value_ints = [3]> ()
    split_shape = Concat <axis = 0> (shape, three, heads, last)
    split = Reshape (padded, split_shape)
    by_role = Transpose <perm = [2, 0, 3, 1, 4]> (split)
    query = Gather <axis = 0> (by_role, zero)
    key = Gather <axis = 0> (by_role, one)
    value = Gather <axis = 0> (by_role, two)
    key_columns = Transpose <perm = [0, 1, 3, 2]> (key)
    scores = MatMul (query, key_columns)
    size = Shape <start = 3, end = 4> (query)
    float_size = Cast <to = 1> (size)
    root = Sqrt (float_size)
    typed_root = CastLike (root, scores)
    scaled = Div (scores, typed_root)
    wide_bounds = Cast <to = 7> (bounds)
    second = Constant <value_ints = [1]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    ends = Slice (wide_bounds, second, end)
    begins = Slice (wide_bounds, first, last)
    counts = Sub (ends, begins)
    column = Unsqueeze (counts, last)
    length = Gather (shape, one)
    places = Range (zero, length, one)
    is_real = Less (places, column)
    axes = Constant <value_ints = [1, 2]> ()
    is_key = Unsqueeze (is_real, axes)
    nothing = Constant <value_float = 0.0> ()
    minus = Constant <value_float = -10000.0> ()
    bias_float = Where (is_key, nothing, minus)
    mask = CastLike (bias_float, scaled)
    masked = Add (scaled, mask)
    shares = Softmax <axis = -1> (masked)
    mixed = MatMul (shares, value)
    joined = Transpose <perm = [0, 2, 1, 3]> (mixed)
    rows_shape = Concat <axis = 0> (slots, last)
    rows = Reshape (joined, rows_shape)
    output = Gather <axis = 0> (rows, real)
"""
"""From `packed`, (tokens, 3 hidden): each token's query, key and value, one after the other."""
FUNCTIONS = (
    """
    <opset_import: ["" : 18], domain: "cappy.emulated">
    RemovePadding (input, counts) => (output, offsets, bounds, longest)
    {
        last = Constant <value_ints = [-1]> ()
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        shape = Shape <start = 0, end = 2> (input)
        width = Shape <start = 2, end = 3> (input)
        length = Gather (shape, one)
        places = Range (zero, length, one)
        wide_counts = Cast <to = 7> (counts)
        column = Unsqueeze (wide_counts, last)
        is_real = Less (places, column)
        flat = Reshape (is_real, last)
        real_rows = NonZero (flat)
        not_real = Not (flat)
        padding_rows = NonZero (not_real)
        real = Reshape (real_rows, last)
        padding = Reshape (padding_rows, last)
        order = Concat <axis = 0> (real, padding)
        in_shape = Reshape (order, shape)
        offsets = Cast <to = 6> (in_shape)
        rows_shape = Concat <axis = 0> (last, width)
        rows = Reshape (input, rows_shape)
        output = Gather <axis = 0> (rows, real)
        ends = CumSum (wide_counts, zero)
        begin = Constant <value_ints = [0]> ()
        wide_bounds = Concat <axis = 0> (begin, ends)
        bounds = Cast <to = 6> (wide_bounds)
        longest = ReduceMax <keepdims = 1> (counts)
    }
    """,
    """
    <opset_import: ["" : 18], domain: "cappy.emulated">
    PackedMultiHeadAttention <num_heads> (query_rows, key_rows, value_rows, no_bias, offsets, bounds) => (output)
    {
        packed = Concat <axis = -1> (query_rows, key_rows, value_rows)
        {attend}
    }
    """,
    """
    <opset_import: ["" : 18], domain: "cappy.emulated">
    PackedAttention <num_heads> (input, weights, bias, offsets, bounds) => (output)
    {
        product = MatMul (input, weights)
        packed = Add (product, bias)
        {attend}
    }
    """,
)


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """Put CPU stand-ins into `model` for CUDA's own operators; the same object is returned.

    >>> onnx.save(emulated(onnx.load("my-bundle/cuda/model.onnx")), "runs-on-a-cpu.onnx")
    """
    functions = [onnx.parser.parse_function(text.replace("{attend}", ATTEND)) for text in FUNCTIONS]
    inputs = {function.name: list(function.input) for function in functions}
    for node in model.graph.node:
        if node.domain == MICROSOFT and node.op_type in inputs:
            if "no_bias" in inputs[node.op_type] and node.input[inputs[node.op_type].index("no_bias")]:
                raise GraphError(f"{node.name} has a bias, and its stand-in adds none")
            node.domain = DOMAIN
    model.functions.extend(functions)
    model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return model
