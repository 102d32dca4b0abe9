"""Find the native library, test it, and choose the instruction set of the CPU's sessions.

If the library is missing or does not work, models run slower, on ONNX Runtime's own operators; `Kernels.why_not` says
why. The environment variable CAPPY_KERNELS chooses: `auto` (or nothing), `none`, or an instruction set by its name,
such as `avx2`. A set that is named runs, or it is an error.
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
from cappy_engine.errors import InstallationError, is_callers
from cappy_engine.native import reference
from cappy_engine.native.build import LIBRARY, SOURCES
from cappy_engine.native.library import ChosenSet, NativeLibrary
from cappy_engine.native.operands import (
    BF16_GROUP,
    PANEL,
    Bf16Layer,
    Layer,
    Norm,
    Rotation,
    Rounding,
    draw_angles,
    draw_attention,
    draw_distances,
    draw_halves,
    draw_product,
    draw_rows,
)
from cappy_engine.native.reference import are_close, are_equal

VARIABLE = "CAPPY_KERNELS"
BY_NAME_ONLY = ("scalar", "amx_emulated")
"""Sets that are slower than ONNX Runtime's operators, and there for tests."""
MULTIPLY_BF16 = ("amx", "avx512bf16", "amx_emulated")
"""Sets that multiply bfloat16; the others widen the weights to float32 as they read them."""
WIDENED = "bf16 is computed in float32: these kernels have no faster way"
Shape = tuple[int, int, int, int]
SHAPES: tuple[Shape, ...] = (
    (13, 71, 45, 1),
    (6, 2048, 16, 8),
    (64, 64, 64, 16),
    (40, 512, 128, 32),
    (150, 256, 64, 64),
)
"""Rows, inner size and columns of the products that test a set, and how many values of a row are rotated together: rows
that end anywhere, long ones, many, and the last two in tasks: by columns, and by rows."""
BOTH = (96, 512, 96)
"""A product whose tasks are some of the rows and some of the columns."""
COUNTS = (*range(1, 13), 17, 31)
"""Rows of a block, and tokens of short pairs: some sets have code of its own for each count."""
MOST_STEPS = 0.01
"""The mean difference of bytes that were rounded behind a layer norm or a Gelu, which are not equal to the last bit."""
MOST_GELUS = 1000
"""How many values of a product numpy takes the Gelu of, which is slow."""
LONG, ODD = 513, 58
"""The length of a pair whose keys come in two blocks, and its queries in tasks; and the size of its head."""
NO_OPERATORS = "the model has none of their operators"
COST = "int8 takes two to three times as long without them"

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

    The answer is kept for the life of the process; the test takes 50 to 100 milliseconds. A library that is there but
    cannot be used is a warning. Raises InstallationError if CAPPY_KERNELS names a set that cannot be used.
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
        if is_callers(error):
            raise
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
                    return f"{problem}, {' x '.join(map(str, shape[:3]))}"
        return _blocks_problem(library, name, random) or _attention_problem(library, name, random)
    except (ValueError, OSError) as error:
        if is_callers(error):
            raise
        return str(error)


def _quantization_problem(library: NativeLibrary, name: str, shape: Shape, random: np.random.Generator) -> str:
    rows, inner, _, block = shape
    x, (factors, offsets) = draw_rows(random, rows, inner), random.uniform(0.1, 2, (2, inner)).astype(np.float32)
    for rotation in (Rotation(np.ones_like(factors), np.zeros_like(offsets), 1), Rotation(factors, offsets, block)):
        found = library.quantize_rows(name, x, Rounding(), rotation)
        wanted = reference.quantize_rows(reference.rotate_rows(x, rotation), Rounding())
        if not (are_equal(found[0], wanted[0]) and are_equal(found[1], wanted[1])):
            return "QuantizeRotatedRows differs from numpy"
    return ""


def _rows_problem(library: NativeLibrary, name: str, shape: Shape, random: np.random.Generator) -> str:
    rows, half, _, block = shape
    x = random.standard_normal((min(rows, MOST_GELUS // half + 1), 2 * half)).astype(np.float32)
    x[-1, half // 2] = np.nan
    plain, gated, times = x[:, :half], reference.gate_rows(x), 20 if half < 100 else 1  # some rows of gates are tasks
    if not are_close(library.gate_rows(name, np.tile(x, (times, 1))), np.tile(gated, (times, 1))):
        return "GeGlu differs from numpy"
    gamma, beta, factors, offsets = random.uniform(0.1, 2, (4, half)).astype(np.float32)
    norm, turns = Norm(gamma, beta, epsilon=0.5), Rotation(factors, offsets, max(1, block // 2))
    for what, prepared, found in (
        ("Normed", reference.normalize_rows(plain, norm), library.quantize_rows(name, plain, Rounding(), turns, norm)),
        ("Gated", gated, library.quantize_rows(name, x, Rounding(), turns, is_gated=True)),
    ):
        rounded, scales = reference.quantize_rows(reference.rotate_rows(prepared, turns), Rounding())
        steps = np.abs(found[0].astype(np.int16) - rounded)  # of what lies between two, either may be right
        if steps.max() > 1 or steps.mean() > MOST_STEPS or not are_close(found[1], scales):
            return f"Quantize{what}Rows differs from numpy"
    return ""


def _linear_problem(library: NativeLibrary, name: str, shape: Shape, random: np.random.Generator) -> str:
    drawn = draw_product(random, *shape[:3])
    given, norm = (drawn.values, drawn.scales), drawn.norm
    plain = Layer(drawn.weights["gentle"], drawn.column_scales, drawn.bias)
    wanted = reference.linear(plain, *given, drawn.residual)
    if not are_equal(library.linear(name, plain, *given, drawn.residual), wanted):
        return "Linear differs from numpy"
    normed = replace(plain, gamma=norm.gamma, beta=norm.beta, epsilon=norm.epsilon)
    found = library.linear(name, normed, *given, drawn.residual)
    if not are_close(found, reference.normalize_rows(wanted, norm)):
        return "LinearNorm differs from numpy"
    if wanted.size > MOST_GELUS:
        return ""
    other = replace(plain, weights=drawn.weights["any"], zero_point=16)
    wanted = reference.linear(other, *given)
    if not are_equal(library.linear(name, other, *given), wanted):
        return "Linear differs from numpy"
    found = library.linear(name, replace(other, is_gelu=True), *given)
    return "" if are_close(found, reference.gelu(wanted)) else "LinearGelu differs from numpy"


def _bf16_problem(library: NativeLibrary, name: str, shape: Shape, random: np.random.Generator) -> str:
    rows, inner, columns = shape[0], shape[1] // BF16_GROUP * BF16_GROUP, shape[2] // PANEL * PANEL
    x, drawn = draw_halves(random, rows, inner), draw_product(random, rows, inner, columns)
    weights = drawn.weights["any"] * np.float32(0.03 / inner**0.5)
    plain, norm = Bf16Layer(reference.pack(reference.bf16_bits(weights), BF16_GROUP), drawn.bias), drawn.norm
    normed = replace(plain, gamma=norm.gamma, beta=norm.beta, epsilon=norm.epsilon)
    product = reference.bf16_linear(plain, x)
    added = product + drawn.residual
    cases = [(plain, True, added), (normed, True, reference.normalize_rows(added, norm))]
    if product.size <= MOST_GELUS:
        cases += [(plain, False, product), (replace(plain, is_gelu=True), False, reference.gelu(product))]
    for layer, is_added, wanted in cases:
        if not are_close(library.bf16_linear(name, layer, x, drawn.residual if is_added else None), wanted):
            return "Bf16Linear differs from numpy"
    return ""


def _blocks_problem(library: NativeLibrary, name: str, random: np.random.Generator) -> str:
    """Multiply as many rows as a block may have, by packed weights; and by some that saturate just so."""
    drawn = draw_product(random, COUNTS[-1], 20, 48)
    for kind, counts in (("gentle", COUNTS), ("any", COUNTS), ("above", (2,)), ("below", (2,))):
        layer = Layer(reference.pack(drawn.weights[kind]), drawn.column_scales, drawn.bias)
        wanted = reference.linear(layer, drawn.values, drawn.scales)
        for count in counts:
            if not are_equal(library.linear(name, layer, drawn.values[:count], drawn.scales[:count]), wanted[:count]):
                return f"Linear differs from numpy, {count} rows"
    halves = reference.bf16_bits(drawn.weights["any"].astype(np.float32))
    x, narrow = draw_halves(random, COUNTS[-1], 20), Bf16Layer(reference.pack(halves, BF16_GROUP), drawn.bias)
    wanted = reference.bf16_linear(narrow, x)
    for count in COUNTS:
        if not are_close(library.bf16_linear(name, narrow, x[:count]), wanted[:count]):
            return f"Bf16Linear differs from numpy, {count} rows"
    drawn = draw_product(random, *BOTH)
    layer = Layer(drawn.weights["gentle"], drawn.column_scales, drawn.bias, gamma=drawn.bias, beta=drawn.norm.beta)
    given = layer, drawn.values, drawn.scales, drawn.residual
    is_right = are_close(library.linear(name, *given), reference.linear(*given))
    return "" if is_right else "LinearNorm differs from numpy, in parts"


def _attention_problem(library: NativeLibrary, name: str, random: np.random.Generator) -> str:
    for pairs in draw_attention(random):
        width, firsts = pairs.packed.shape[1] // 3, pairs.lengths.cumsum() - pairs.lengths
        given, how = (pairs.lengths, pairs.heads), (pairs.distances, pairs.angles)
        wanted = reference.attention(pairs.packed, *given, pairs.window, *how)
        if not are_close(library.attention(name, pairs.packed, *given, pairs.window, *how), wanted):
            return f"{pairs.kind}Attention differs from numpy, heads of {width // pairs.heads}"
        first = pairs.packed[firsts, :width], pairs.packed[:, width:]
        if pairs.window is None and not are_close(library.first_attention(name, *first, *given, *how), wanted[firsts]):
            return f"First{pairs.kind}Attention differs from numpy, heads of {width // pairs.heads}"
    packed, few = (random.standard_normal(size).astype(np.float32) for size in ((LONG, 3 * ODD), (sum(COUNTS), 3 * 96)))
    packed[-1, ODD : 2 * ODD] *= -3  # a key of the last block, that some queries choose
    how = draw_distances(random, LONG, 1, ODD), draw_angles(random, LONG, ODD)
    found, places = library.attention(name, packed, np.array([LONG]), 1, None, *how), np.arange(0, LONG, LONG // 8)
    if not are_close(found[places], reference.attention_at(places, packed, 1, *how)):
        return f"Attention differs from numpy, a pair of {LONG} tokens"
    lengths, problem = np.array(COUNTS), "Attention differs from numpy, short pairs"
    return "" if are_close(library.attention(name, few, lengths, 3), reference.attention(few, lengths, 3)) else problem
