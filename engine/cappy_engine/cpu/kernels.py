"""Find the native library, test it, and choose the instruction set that the CPU's sessions use.

A library that is not there, or does not work, keeps nothing from working: models run then on ONNX Runtime's own
operators, slower, and `Kernels.why_not` says why. The environment variable CAPPY_KERNELS chooses: `auto` (or nothing),
`none`, or an instruction set by its name, such as `avx2`: then that one runs, or it is an error.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from cappy_engine.bundle import Bundle
from cappy_engine.cpu.built import why_no_library
from cappy_engine.errors import InstallationError
from cappy_engine.native import reference
from cappy_engine.native.build import LIBRARY, SOURCES
from cappy_engine.native.library import ChosenSet, NativeLibrary
from cappy_engine.native.operands import (
    AFTER_GELU,
    BF16_GROUP,
    PANEL,
    Bf16Layer,
    Distances,
    Floats,
    Layer,
    Norm,
    Rotation,
    Rounding,
)

VARIABLE = "CAPPY_KERNELS"
BY_NAME_ONLY = ("scalar", "amx_emulated")
"""Sets that are slower than ONNX Runtime's operators, and there for tests."""
MULTIPLY_BF16 = ("amx", "avx512bf16", "amx_emulated")
"""Sets that multiply bfloat16; the others widen the weights to float32 as they read them."""
WIDENED = "bf16 is computed in float32, for this processor does not multiply bfloat16"
SHAPES = ((1, 4, 16), (13, 70, 40), (6, 2048, 16), (64, 64, 64), (40, 512, 128), (150, 256, 64))
"""Rows, inner size and columns of the products that test a set: blocks of rows and of columns, full and in part, few
rows and many. The last two come in tasks: by columns, and by rows."""
MOST_STEPS = 0.01
"""The mean difference of bytes that were rounded behind a layer norm or a Gelu, which are not equal to the last bit."""
MOST_GELUS = 1000
"""How many values of a product numpy takes the Gelu of, which is slow."""
LARGEST_BLOCK = 64
"""The channels that exported models rotate together, at most."""
LENGTHS, HEAD_SIZES, WINDOW = (1, 7, 33, 61), (32, 64), 5
"""The pairs and heads that test attention: a panel of keys that is full, one in part, and rows of each kind."""
BUCKETS = 20
"""How many distances to one side the test of attention tells apart."""
LONG = 513
"""The length of a pair whose keys come in two blocks, and its queries in tasks."""
NO_OPERATORS = "the model has none of their operators"
COST = "int8 takes two to three times as long without them"
CLOSE = 1e-5
"""How near floats after a Gelu or a layer norm must be to numpy's, relative to the largest."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernels:
    """What was found: the `library` that sessions register, if any, and the instruction set that is `used`.

    `why_not` says why there is none, or why a better one is not used; empty if all is well.
    """

    library: Path | None
    used: str
    why_not: str

    @property
    def chosen(self) -> ChosenSet | None:
        """Name the set and its library, for a session."""
        return None if self.library is None else ChosenSet(self.library, self.used)

    @property
    def told(self) -> str:
        """Say in words what is used, and why nothing better."""
        if self.library is None:
            return f"none: {self.why_not}"
        return f"{self.used} ({self.why_not})" if self.why_not else self.used


def choose_kernels(bundle: Bundle, precision: str) -> Kernels:
    """Choose the kernels that a model's sessions take, or say why there are none.

    >>> choose_kernels(open_bundle("cappy-bundle"), "int8").told
    'avx512'

    Raises InstallationError as `find_kernels` does.
    """
    operators = bundle.manifest.document.get("graphs", {}).get(precision, {}).get("operators")
    if operators:
        found = find_kernels()
        if precision != "bf16" or found.used in MULTIPLY_BF16:
            return found
        return replace(found, why_not="; ".join(filter(None, [found.why_not, WIDENED])))
    why_not = "the model was exported before there were any; export it again" if operators is None else NO_OPERATORS
    return Kernels(None, "", why_not)


def find_kernels() -> Kernels:
    """Find the library and the best instruction set that passes its test, as CAPPY_KERNELS asks.

    >>> find_kernels().used
    'avx512'

    The answer is kept for the life of the process; the test takes some milliseconds. A library that is there but cannot
    be used is a warning. Raises InstallationError if CAPPY_KERNELS names a set that cannot be used.
    """
    return _find(os.environ.get(VARIABLE) or "auto", SOURCES / LIBRARY)


@cache
def _find(asked: str, path: Path) -> Kernels:
    if asked == "none":
        return Kernels(None, "", f"they were switched off by {VARIABLE}=none")
    if reason := why_no_library(path.parent):
        return _unusable(asked, reason, is_warning=path.is_file())
    try:
        library = NativeLibrary(path)
    except OSError as error:
        return _unusable(asked, f"the library cannot be loaded: {error}")
    return _choose(library, path, asked)


def _unusable(asked: str, reason: str, *, is_warning: bool = True) -> Kernels:
    """Go without kernels, unless a set was asked for by its name."""
    if asked != "auto":
        raise InstallationError(
            f"the kernels of {VARIABLE}={asked} cannot be used; set it to auto or none, or mend this: {reason}"
        )
    if is_warning:
        log.warning("the kernels are there but are not used, and %s: %s", COST, reason)
    return Kernels(None, "", reason)


def _choose(library: NativeLibrary, path: Path, asked: str) -> Kernels:
    usable = library.instruction_sets
    if asked not in ("auto", *usable):
        raise InstallationError(
            f"{VARIABLE} is {asked!r}; on this processor, choose from auto, none, {', '.join(usable)}"
        )
    wanted = [name for name in usable if name not in BY_NAME_ONLY] if asked == "auto" else [asked]
    problems: list[str] = []
    for name in wanted:
        problem = self_test(library, name)
        if not problem:
            return Kernels(path, name, "; ".join(problems))
        problems.append(f"{name} failed its test: {problem}")
        if asked == "auto":
            log.warning("the kernels for %s", problems[-1])
    if problems:
        return _unusable(asked, "; ".join(problems))
    return Kernels(None, "", "this processor has no instruction set that they need (AVX2)")


def self_test(library: NativeLibrary, name: str) -> str:
    """Compare a set's kernels with numpy; returns what differs, or an empty text.

    >>> self_test(NativeLibrary(SOURCES / LIBRARY), "avx2")
    ''
    """
    random = np.random.default_rng(0)
    try:
        for shape in SHAPES:
            for find_problem in (_quantization_problem, _rows_problem, _linear_problem, _bf16_problem):
                if problem := find_problem(library, name, shape, random):
                    return f"{problem}, {' x '.join(map(str, shape))}"
        return _attention_problem(library, name, random)
    except (ValueError, OSError) as error:
        return str(error)


def _quantization_problem(
    library: NativeLibrary, name: str, shape: tuple[int, int, int], random: np.random.Generator
) -> str:
    sizes = 10.0 ** random.integers(-3, 4, (shape[0], 1))
    x = (random.standard_normal(shape[:2]) * sizes).astype(np.float32)
    for rounding in (Rounding(), AFTER_GELU):
        found, wanted = library.quantize_rows(name, x, rounding), reference.quantize_rows(x, rounding)
        if not (np.array_equal(found[0], wanted[0]) and np.array_equal(found[1], wanted[1])):
            return "QuantizeRows differs from numpy"
    factors, offsets = random.uniform(0.1, 2, (2, shape[1])).astype(np.float32)
    rotation = Rotation(factors, offsets, min(shape[1] & -shape[1], LARGEST_BLOCK))
    found = library.quantize_rows(name, x, Rounding(), rotation)
    wanted = reference.quantize_rows(reference.rotate_rows(x, rotation), Rounding())
    if not (np.array_equal(found[0], wanted[0]) and np.array_equal(found[1], wanted[1])):
        return "QuantizeRotatedRows differs from numpy"
    return ""


def _rows_problem(library: NativeLibrary, name: str, shape: tuple[int, int, int], random: np.random.Generator) -> str:
    rows, half, _ = shape
    x = random.standard_normal((rows, 2 * half + 1)).astype(np.float32)
    wide = x[: MOST_GELUS // half + 1, 1:]
    plain, gated = wide[:, :half], reference.gate_rows(wide)
    if not _are_close(library.gate_rows(name, wide), gated):
        return "GeGlu differs from numpy"
    gamma, beta, factors, offsets = random.uniform(0.1, 2, (4, half)).astype(np.float32)
    norm, turns = Norm(gamma, beta), Rotation(factors, offsets, min(half & -half, LARGEST_BLOCK))
    for what, prepared, found in (
        ("Normed", reference.normalize_rows(plain, norm), library.quantize_rows(name, plain, Rounding(), turns, norm)),
        ("Gated", gated, library.quantize_rows(name, wide, Rounding(), turns, is_gated=True)),
    ):
        rounded, scales = reference.quantize_rows(reference.rotate_rows(prepared, turns), Rounding())
        steps = np.abs(found[0].astype(np.int16) - rounded)  # of what lies between two, either may be right
        if steps.max() > 1 or steps.mean() > MOST_STEPS or not _are_close(found[1], scales):
            return f"Quantize{what}Rows differs from numpy"
    return ""


def _linear_problem(library: NativeLibrary, name: str, shape: tuple[int, int, int], random: np.random.Generator) -> str:
    rows, inner, columns = shape
    values = random.integers(0, 256, (rows, inner)).astype(np.uint8)
    weights = random.integers(-127, 128, (inner, columns)).astype(np.int8)
    values[0], weights[:, 0] = 255, 127  # the largest sum
    scales, column_scales = random.uniform(0.01, 0.02, (rows, 1)), random.uniform(1e-4, 1e-3, columns)
    floats = [random.standard_normal(columns).astype(np.float32) for _ in range(3)]
    residual = random.standard_normal((rows, columns)).astype(np.float32)
    gentle = np.where(np.arange(inner)[:, None] % 2, weights // 2, 0).astype(np.int8)  # pairs that cannot saturate
    for what, matrix, added in (("Linear", weights, residual), ("Linear with small weights", gentle, None)):
        plain = Layer(matrix, column_scales.astype(np.float32), floats[0])
        gelu = Layer(matrix, column_scales.astype(np.float32), floats[0], zero_point=16, is_gelu=True)
        norm = Layer(matrix, column_scales.astype(np.float32), floats[0], gamma=floats[1], beta=floats[2])
        layers = ((plain, added), (norm, residual), (gelu, None))
        for layer, taken in layers if rows * columns <= MOST_GELUS else layers[:2]:
            takes = (layer, values, scales.astype(np.float32), taken)
            found, wanted = library.linear(name, *takes), reference.linear(*takes)
            if not (np.array_equal(found, wanted) if layer is plain else _are_close(found, wanted)):
                return f"{what} differs from numpy"
    return ""


def _bf16_problem(library: NativeLibrary, name: str, shape: tuple[int, int, int], random: np.random.Generator) -> str:
    rows, inner, columns = shape
    inner, columns = inner // BF16_GROUP * BF16_GROUP, columns // PANEL * PANEL
    x = random.standard_normal((rows, inner)).astype(np.float32)
    weights = reference.bf16_bits(random.standard_normal((inner, columns)).astype(np.float32))
    packed = reference.pack(weights, BF16_GROUP)
    floats = [random.standard_normal(columns).astype(np.float32) for _ in range(3)]
    residual = random.standard_normal((rows, columns)).astype(np.float32)
    norm = Bf16Layer(packed, floats[0], gamma=floats[1], beta=floats[2])
    gelu = Bf16Layer(packed, floats[0], is_gelu=True)
    plain = Bf16Layer(packed, floats[0])
    layers = ((plain, residual if rows < PANEL else None), (norm, residual), (gelu, None))
    for layer, added in layers if rows * columns <= MOST_GELUS else layers[:2]:
        takes = (layer, x, added)
        if not _are_close(library.bf16_linear(name, *takes), reference.bf16_linear(*takes)):
            return "Bf16Linear differs from numpy"
    return ""


def _attention_problem(library: NativeLibrary, name: str, random: np.random.Generator) -> str:
    lengths = np.array(LENGTHS)
    for head_size in HEAD_SIZES:
        packed = random.standard_normal((lengths.sum(), 3 * 2 * head_size)).astype(np.float32)
        found, wanted = library.attention(name, packed, lengths, 2), reference.attention(packed, lengths, 2)
        if not _are_close(found, wanted):
            return f"Attention differs from numpy, heads of {head_size}"
        near = library.attention(name, packed, lengths, 2, WINDOW)
        if not _are_close(near, reference.attention(packed, lengths, 2, WINDOW)):
            return f"LocalAttention differs from numpy, heads of {head_size}"
        distances = _some_distances(head_size, random)
        found = library.attention(name, packed, lengths, 2, distances=distances)
        if not _are_close(found, reference.attention(packed, lengths, 2, distances=distances)):
            return f"DisentangledAttention differs from numpy, heads of {head_size}"
        radians = random.uniform(0, 6, (lengths.max(), head_size // 2)).astype(np.float32)
        angles = (np.cos(radians), np.sin(radians))
        found = library.attention(name, packed, lengths, 2, WINDOW, angles=angles)
        if not _are_close(found, reference.attention(packed, lengths, 2, WINDOW, angles=angles)):
            return f"LocalRotaryAttention differs from numpy, heads of {head_size}"
        queries, rest = np.split(packed, [2 * head_size], axis=1)
        given = (queries[: len(lengths)], rest, lengths, 2)
        if not _are_close(library.first_attention(name, *given), reference.first_attention(*given)):
            return f"FirstAttention differs from numpy, heads of {head_size}"
    packed = random.standard_normal((LONG, 3 * head_size)).astype(np.float32)
    queries, rest = np.split(packed, [head_size], axis=1)
    found, some = library.attention(name, packed, np.array([LONG]), 1), slice(None, None, LONG // 8)
    count = len(queries[some])  # as many pairs of one query: numpy would take long for all
    wanted = reference.first_attention(queries[some], np.tile(rest, (count, 1)), np.full(count, LONG), 1)
    return "" if _are_close(found[some], wanted) else f"Attention differs from numpy, a pair of {LONG} tokens"


def _some_distances(head_size: int, random: np.random.Generator) -> Distances:
    """Draw keys and queries of distances for two heads; far distances share them, as DeBERTa's do."""
    keys, queries = random.standard_normal((2, 2, 2 * BUCKETS + 1, head_size)).astype(np.float32)
    apart = np.arange(-max(LENGTHS), max(LENGTHS) + 1)
    rows = np.where(np.abs(apart) < BUCKETS // 2, apart, np.sign(apart) * (BUCKETS // 4 + np.abs(apart) // 2))
    return Distances(keys, queries, np.clip(rows, -BUCKETS, BUCKETS) + BUCKETS, scale=0.1)


def _are_close(found: Floats, wanted: Floats) -> bool:
    return bool(np.abs(found - wanted).max() <= CLOSE * max(1.0, float(np.abs(wanted).max())))
