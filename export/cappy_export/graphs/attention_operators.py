"""Write the functions of the operators of attention, in the domain `cappy` (`operators.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cappy_export.graphs.bodies import (
    ATTEND,
    ATTEND_DISENTANGLED,
    ATTEND_FIRST_DISENTANGLED,
    ATTEND_NEAR,
    ATTENTION,
    LIFTED,
    LIFTED_AND_TURNED,
    filled,
)


def _attention() -> str:
    """Attention (packed float [n, 3 h], lengths int64 [b]) -> y float [n, h]

    softmax(q k^T / sqrt(d)) v in each of `heads`, within each pair. Row i of `packed` is token i's query, key and
    value; pair j has the next lengths[j] rows.
    """
    return "Attention <heads> (packed, lengths) => (y) {" + _self_attention(ATTEND) + "}"


def _first_attention() -> str:
    """FirstAttention (queries float [b, h], packed float [n, 2 h], lengths int64 [b]) -> y float [b, h]

    As Attention, for one query of each pair: row i of `packed` is token i's key and value.
    """
    return "FirstAttention <heads> (queries, packed, lengths) => (y) {" + _one_query(ATTEND) + "}"


def _disentangled_attention() -> str:
    """DisentangledAttention (packed [n, 3 h], lengths, keys, queries float [heads, r, d], rows int64) -> y float [n, h]

    As Attention, of scale (q_i k_j + q_i keys[s] + k_j queries[s]), where s is rows[m + j - i] for tokens i and j of a
    pair: `rows` has 2 m + 1 entries for pairs of at most m tokens. Attributes: heads, scale.
    """
    inputs = "(packed, lengths, position_keys, position_queries, rows)"
    body = _self_attention(ATTEND_DISENTANGLED)
    return f"DisentangledAttention <heads, scale> {inputs} => (y) {{ {body} }}"


def _first_disentangled_attention() -> str:
    """FirstDisentangledAttention (queries [b, h], packed [n, 2 h], lengths, keys, queries, rows) -> y float [b, h]

    As DisentangledAttention, for the query of each pair's first token.
    """
    inputs = "(queries, packed, lengths, position_keys, position_queries, rows)"
    body = _one_query(ATTEND_FIRST_DISENTANGLED)
    return f"FirstDisentangledAttention <heads, scale> {inputs} => (y) {{ {body} }}"


def _rotary_attention() -> str:
    """RotaryAttention (packed float [n, 3 h], lengths int64 [b], cosines, sines float [p, d / 2]) -> y float [n, h]

    As Attention, of queries and keys with rotary positions (RoFormer, 2104.09864): values i and d / 2 + i of each head,
    of d values, are turned by angle i of the token's place in its pair, of which there are p.
    """
    return (
        "RotaryAttention <heads> (packed, lengths, cosines, sines) => (y) {"
        + _self_attention(ATTEND, LIFTED_AND_TURNED)
        + "}"
    )


def _local_rotary_attention() -> str:
    """LocalRotaryAttention (packed, lengths, cosines, sines) -> y float [n, h]

    As RotaryAttention, and a token sees those at most `window` places before and behind it.
    """
    inputs = "(packed, lengths, cosines, sines)"
    body = _self_attention(ATTEND_NEAR, LIFTED_AND_TURNED)
    return f"LocalRotaryAttention <heads, window> {inputs} => (y) {{ {body} }}"


def _first_rotary_attention() -> str:
    """FirstRotaryAttention (queries [b, h], packed [n, 2 h], lengths, cosines, sines) -> y float [b, h]

    As RotaryAttention, for the query of each pair's first token.
    """
    body = _one_query(ATTEND, LIFTED_AND_TURNED)
    return f"FirstRotaryAttention <heads> (queries, packed, lengths, cosines, sines) => (y) {{ {body} }}"


def _self_attention(attend: str, lifted: str = LIFTED) -> str:
    return filled(
        ATTENTION,
        attend=attend,
        lifted=lifted,
        rows="n",
        alone="query, key, value = Split <axis = -1, num_outputs = 3> (packed)",
        parts=3,
        of_begins=[1, 0, 0, 0] * 3,
        of_ends=[0, 0, 1, 0] * 3,
        of_parts=[0, 0, 0, 1, 0, 1, 0, 2, 0, 2, 0, 3],
        cut="""
            query_begin, query_end, key_begin, key_end, value_begin, value_end
                = Split <axis = 0, num_outputs = 6> (corner)
            query = Slice (packed, query_begin, query_end, both)
            key = Slice (packed, key_begin, key_end, both)
            value = Slice (packed, value_begin, value_end, both)
        """,
    )


def _one_query(attend: str, lifted: str = LIFTED) -> str:
    return filled(
        ATTENTION,
        alone="query = Identity (queries)  key, value = Split <axis = -1, num_outputs = 2> (packed)",
        attend=attend,
        lifted=lifted,
        rows="b",
        parts=2,
        of_begins=[1, 0, 0, 0] * 2,
        of_ends=[0, 0, 1, 0] * 2,
        of_parts=[0, 0, 0, 1, 0, 1, 0, 2],
        cut="""
            row = Unsqueeze (number, first)
            query = Gather (queries, row)
            key_begin, key_end, value_begin, value_end = Split <axis = 0, num_outputs = 4> (corner)
            key = Slice (packed, key_begin, key_end, both)
            value = Slice (packed, value_begin, value_end, both)
        """,
    )


WRITERS: Mapping[str, Callable[[], str]] = {
    "Attention": _attention,
    "FirstAttention": _first_attention,
    "DisentangledAttention": _disentangled_attention,
    "FirstDisentangledAttention": _first_disentangled_attention,
    "RotaryAttention": _rotary_attention,
    "FirstRotaryAttention": _first_rotary_attention,
    "LocalRotaryAttention": _local_rotary_attention,
}
"""The operators, each with what writes the text of its function."""
