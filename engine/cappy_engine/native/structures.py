"""Lay out the structures that the library's functions take.

`kernels.h`, `linear.h` and `attention.h` define the same structures.
"""

from __future__ import annotations

import ctypes


class Rounding(ctypes.Structure):
    _fields_ = (("zero_point", ctypes.c_int), ("steps", ctypes.c_int), ("least", ctypes.c_float))


class Preparation(ctypes.Structure):
    _fields_ = (
        ("is_gated", ctypes.c_bool),
        ("gamma", ctypes.c_void_p),
        ("beta", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("factors", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("block", ctypes.c_size_t),
    )


class LinearWeights(ctypes.Structure):
    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("is_packed", ctypes.c_bool),
        ("is_bf16", ctypes.c_bool),
        ("inner", ctypes.c_size_t),
        ("columns", ctypes.c_size_t),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("zero_point", ctypes.c_int),
        ("is_gelu", ctypes.c_bool),
        ("has_residual", ctypes.c_bool),
        ("gamma", ctypes.c_void_p),
        ("beta", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
    )


class AttentionInput(ctypes.Structure):
    _fields_ = (
        ("queries", ctypes.c_void_p),
        ("query_stride", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("key_stride", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("heads", ctypes.c_int64),
        ("head_size", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("distance_keys", ctypes.c_void_p),
        ("distance_queries", ctypes.c_void_p),
        ("distance_rows", ctypes.c_void_p),
        ("farthest", ctypes.c_int64),
        ("distances", ctypes.c_int64),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("places", ctypes.c_int64),
        ("half", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("lengths", ctypes.c_void_p),
        ("pairs", ctypes.c_int64),
        ("is_first", ctypes.c_bool),
    )


ALL = (Rounding, Preparation, LinearWeights, AttentionInput)
"""In the order of the library's `cappy_struct_sizes`."""
