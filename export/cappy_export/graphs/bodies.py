"""Hold the texts of the operators' functions, in ONNX's textual syntax: what each computes, in other operators.

`operators.py` writes the functions from them; {words} in braces are filled in there.
"""

from __future__ import annotations

QUANTIZE = """
    last = Constant <value_ints = [-1]> ()
    sizes = Abs (x)
    largest = ReduceMax <keepdims = 1> (sizes, last)
    least_scaled = Constant <value_float: float = @least> ()
    bounded = Max (largest, least_scaled)
    steps_number = Constant <value_int: int = @steps> ()
    steps_float = Cast <to = 1> (steps_number)
    step = Reciprocal (steps_float)
    scale = Mul (bounded, step)
    inverse = Reciprocal (scale)
    scaled = Mul (x, inverse)
    unit = Constant <value_float = 1.0> ()
    zero = Constant <value_int: int = @zero_point> ()
    zero_byte = Cast <to = 2> (zero)
    q = QuantizeLinear (scaled, unit, zero_byte)
"""

ROTATE = """
    block_size = Constant <value_int: int = @block> ()
    zeroth = Constant <value_int = 0> ()
    next = Constant <value_int = 1> ()
    numbers = Range (zeroth, block_size, next)
    column_axis = Constant <value_ints = [1]> ()
    numbers_column = Unsqueeze (numbers, column_axis)
    common_bits = BitwiseAnd (numbers_column, numbers)
    bits = Cast <to = 13> (common_bits)
    shift_numbers = Constant <value_ints = [8, 4, 2, 1]> ()
    shifts = Cast <to = 13> (shift_numbers)
    shift_8, shift_4, shift_2, shift_1 = Split <axis = 0, num_outputs = 4> (shifts)
    moved_8 = BitShift <direction = "RIGHT"> (bits, shift_8)
    folded_8 = BitwiseXor (bits, moved_8)
    moved_4 = BitShift <direction = "RIGHT"> (folded_8, shift_4)
    folded_4 = BitwiseXor (folded_8, moved_4)
    moved_2 = BitShift <direction = "RIGHT"> (folded_4, shift_2)
    folded_2 = BitwiseXor (folded_4, moved_2)
    moved_1 = BitShift <direction = "RIGHT"> (folded_2, shift_1)
    folded_1 = BitwiseXor (folded_2, moved_1)
    odd_bits = BitwiseAnd (folded_1, shift_1)
    odd = Cast <to = 1> (odd_bits)
    doubled = Add (odd, odd)
    one = Constant <value_float = 1.0> ()
    hadamard = Sub (one, doubled)
    given_shape = Shape (given)
    divided = Mul (given, factors)
    moved = Add (divided, offsets)
    rest = Constant <value_ints = [-1]> ()
    first_axis = Constant <value_ints = [0]> ()
    block_length = Unsqueeze (block_size, first_axis)
    blocks_shape = Concat <axis = 0> (rest, block_length)
    blocks = Reshape (moved, blocks_shape)
    turned = MatMul (blocks, hadamard)
    x = Reshape (turned, given_shape)
"""

PRODUCT = """
    rows_of_groups = Transpose <perm = [1, 3, 0, 2]> (weights)
    groups = Shape <start = 1, end = 2> (weights)
    group = Constant <value_ints = [4]> ()
    inner = Mul (groups, group)
    last = Constant <value_ints = [-1]> ()
    matrix_shape = Concat <axis = 0> (inner, last)
    matrix = Reshape (rows_of_groups, matrix_shape)
    unit = Constant <value_float = 1.0> ()
    zero = Constant <value_int: int = @zero_point> ()
    zero_byte = Cast <to = 2> (zero)
    unknown_sums = com.microsoft.MatMulIntegerToFloat (q, matrix, unit, weight_scales, zero_byte)
    sums = Cast <to = 1> (unknown_sums)
    product = Mul (sums, scale)
"""

BF16_PRODUCT = """
    narrow = Cast <to = 16> (x)
    rounded = Cast <to = 1> (narrow)
    wide = Cast <to = 1> (weights)
    rows_of_groups = Transpose <perm = [1, 3, 0, 2]> (wide)
    groups = Shape <start = 1, end = 2> (weights)
    group = Constant <value_ints = [2]> ()
    inner = Mul (groups, group)
    last = Constant <value_ints = [-1]> ()
    matrix_shape = Concat <axis = 0> (inner, last)
    matrix = Reshape (rows_of_groups, matrix_shape)
    product = MatMul (rounded, matrix)
"""

LIFTED = """
    lifted_query = Unsqueeze (query, first)
    lifted_key = Unsqueeze (key, first)
"""
LIFTED_AND_TURNED = """
    query_sequence = Unsqueeze (query, first)
    key_sequence = Unsqueeze (key, first)
    unknown_query = com.microsoft.RotaryEmbedding (query_sequence, first, cosines, sines)
    unknown_key = com.microsoft.RotaryEmbedding (key_sequence, first, cosines, sines)
    lifted_query = Cast <to = 1> (unknown_query)
    lifted_key = Cast <to = 1> (unknown_key)
"""
"""The first place of a pair is 0, which is `first`."""

ATTEND = """
    {lifted}
    lifted_value = Unsqueeze (value, first)
    unknown = com.microsoft.MultiHeadAttention <num_heads: int = @heads> (lifted_query, lifted_key, lifted_value)
    lifted = Cast <to = 1> (unknown)
    context = Squeeze (lifted, first)
"""

ATTEND_NEAR = """
    {lifted}
    lifted_value = Unsqueeze (value, first)
    tokens_of_pair = Shape <start = 0, end = 1> (query)
    token_count = Squeeze (tokens_of_pair, first)
    zeroth = Constant <value_int = 0> ()
    places = Range (zeroth, token_count, one)
    column_axis = Constant <value_ints = [1]> ()
    places_column = Unsqueeze (places, column_axis)
    differences = Sub (places_column, places)
    distances = Abs (differences)
    most = Constant <value_int: int = @window> ()
    is_far = Greater (distances, most)
    far = Constant <value_float = -3.4e38> ()
    near = Constant <value_float = 0.0> ()
    bias_plane = Where (is_far, far, near)
    attention_bias = Unsqueeze (bias_plane, both)
    unknown = com.microsoft.MultiHeadAttention <num_heads: int = @heads> (
        lifted_query, lifted_key, lifted_value, , , attention_bias)
    lifted = Cast <to = 1> (unknown)
    context = Squeeze (lifted, first)
"""

DISENTANGLED_PARTS = """
    rest = Constant <value_ints = [-1]> ()
    two = Constant <value_ints = [2]> ()
    heads_number = Constant <value_int: int = @heads> ()
    heads_length = Unsqueeze (heads_number, first)
    by_head = Concat <axis = 0> (first, heads_length, rest)
    query_parts = Reshape (query, by_head)
    query_heads = Transpose <perm = [1, 0, 2]> (query_parts)
    key_parts = Reshape (key, by_head)
    key_heads = Transpose <perm = [1, 0, 2]> (key_parts)
    tokens_of_pair = Shape <start = 0, end = 1> (key)
    row_count = Shape (rows)
    middle = Div (row_count, two)
"""

ATTEND_BIASED = """
    lifted_query = Unsqueeze (query, first)
    lifted_key = Unsqueeze (key, first)
    lifted_value = Unsqueeze (value, first)
    attention_bias = Unsqueeze (bias, first)
    unknown = com.microsoft.MultiHeadAttention <num_heads: int = @heads, scale: float = @scale> (
        lifted_query, lifted_key, lifted_value, , , attention_bias)
    lifted = Cast <to = 1> (unknown)
    context = Squeeze (lifted, first)
"""

PLACED = """
    {what}_flat = Reshape ({what}_lines, flat_shape)
    {what}_cut = Slice ({what}_flat, others, cut_end, column_axis)
    {what}_moved = Reshape ({what}_cut, moved_shape)
    {what}_placed = Slice ({what}_moved, first, tokens_of_pair, last_axis)
"""
"""Shifts each line one place less than the one before it: columns then mean places, not distances."""

ATTEND_DISENTANGLED = f"""
    {DISENTANGLED_PARTS}
    zeroth = Constant <value_int = 0> ()
    column_axis = Constant <value_ints = [1]> ()
    last_axis = Constant <value_ints = [2]> ()
    doubled = Mul (tokens_of_pair, two)
    column_count = Squeeze (doubled, first)
    columns = Range (zeroth, column_count, one)
    others = Sub (tokens_of_pair, one)
    lowest = Sub (middle, others)
    key_places = Add (columns, lowest)
    key_rows = Gather (rows, key_places)
    highest = Add (middle, others)
    query_places = Sub (highest, columns)
    query_rows = Gather (rows, query_places)
    keys_by_distance = Gather <axis = 1> (position_keys, key_rows)
    queries_by_distance = Gather <axis = 1> (position_queries, query_rows)
    unknown_of_keys = com.microsoft.FusedMatMul <transB = 1, alpha: float = @scale> (query_heads, keys_by_distance)
    keys_lines = Cast <to = 1> (unknown_of_keys)
    unknown_of_queries = com.microsoft.FusedMatMul <transB = 1, alpha: float = @scale> (key_heads, queries_by_distance)
    queries_lines = Cast <to = 1> (unknown_of_queries)
    flat_shape = Concat <axis = 0> (heads_length, rest)
    moved_width = Sub (doubled, one)
    moved_length = Mul (moved_width, tokens_of_pair)
    cut_end = Add (others, moved_length)
    moved_shape = Concat <axis = 0> (heads_length, tokens_of_pair, moved_width)
    {PLACED.replace("{what}", "keys")}
    {PLACED.replace("{what}", "queries")}
    queries_turned = Transpose <perm = [0, 2, 1]> (queries_placed)
    bias = Add (keys_placed, queries_turned)
    {ATTEND_BIASED}
"""

ATTEND_FIRST_DISENTANGLED = f"""
    {DISENTANGLED_PARTS}
    farthest = Add (middle, tokens_of_pair)
    near_rows = Slice (rows, middle, farthest, first)
    near_keys = Gather <axis = 1> (position_keys, near_rows)
    near_queries = Gather <axis = 1> (position_queries, near_rows)
    unknown_of_keys = com.microsoft.FusedMatMul <transB = 1, alpha: float = @scale> (query_heads, near_keys)
    of_keys = Cast <to = 1> (unknown_of_keys)
    products = Mul (key_heads, near_queries)
    sums = ReduceSum <keepdims = 0> (products, rest)
    row_axis = Constant <value_ints = [1]> ()
    sums_row = Unsqueeze (sums, row_axis)
    factor = Constant <value_float: float = @scale> ()
    of_queries = Mul (sums_row, factor)
    bias = Add (of_keys, of_queries)
    {ATTEND_BIASED}
"""

ATTENTION = """
    first = Constant <value_ints = [0]> ()
    both = Constant <value_ints = [0, 1]> ()
    one = Constant <value_int = 1> ()
    pairs = Size (lengths)
    is_single = Equal (pairs, one)
    y = If (is_single) <
        then_branch = alone () => (float[{rows}, h] alone_y) {
            {alone}
            {attend}
            alone_y = Identity (context)
        },
        else_branch = together () => (float[{rows}, h] together_y) {
            last = Constant <value_ints = [-1]> ()
            width = Shape <start = 1, end = 2> (packed)
            parts = Constant <value_int = {parts}> ()
            part = Div (width, parts)
            lengths_column = Unsqueeze (lengths, last)
            ends = CumSum (lengths_column, first)
            begins = Sub (ends, lengths_column)
            of_begins = Constant <value_ints = {of_begins}> ()
            of_ends = Constant <value_ints = {of_ends}> ()
            of_parts = Constant <value_ints = {of_parts}> ()
            begins_placed = Mul (begins, of_begins)
            ends_placed = Mul (ends, of_ends)
            parts_placed = Mul (part, of_parts)
            rows_placed = Add (begins_placed, ends_placed)
            corners = Add (rows_placed, parts_placed)
            none_begin = Constant <value_ints = [0, 0]> ()
            none_end = Mul (part, both)
            none = Slice (packed, none_begin, none_end, both)
            only_none = SequenceConstruct (none)
            contexts = Loop (pairs, , only_none) <
                body = pair (int64 number, bool goes_on, seq(float[l, h]) before)
                    => (bool goes_on_still, seq(float[l, h]) after) {
                    goes_on_still = Identity (goes_on)
                    corner = Gather (corners, number)
                    {cut}
                    {attend}
                    after = SequenceInsert (before, context)
                }
            >
            together_y = ConcatFromSequence <axis = 0> (contexts)
        }
    >
"""

GATE = """
    gate, value = Split <axis = -1, num_outputs = 2> ({rows})
    unknown = com.microsoft.Gelu (gate)
    active = Cast <to = 1> (unknown)
    {gated} = Mul (active, value)
"""


def filled(text: str, **parts: object) -> str:
    """Put `parts` into the places of `text` that are named for them.

    >>> filled("y = {what} (x)", what="Abs")
    'y = Abs (x)'
    """
    for name, part in parts.items():
        text = text.replace(f"{{{name}}}", str(part))
    return text
