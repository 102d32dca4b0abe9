"""Give the tests the native library that was compiled with this checkout, or skip them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cappy_engine.cpu.built import why_no_library
from cappy_engine.native.build import LIBRARY, SOURCES
from cappy_engine.native.library import NativeLibrary


@pytest.fixture(scope="session")
def library() -> NativeLibrary:
    """Load the library; without one the test is skipped, and says why."""
    if reason := why_no_library():
        pytest.skip(f"there are no kernels to test: {reason}")
    return NativeLibrary(SOURCES / LIBRARY)


SETS = [
    *("amx", "avx512bf16", "avx512", "avxvnni", "avx2", "i8mm", "dotprod", "neon"),
    *("scalar", "amx_emulated"),
]


@pytest.fixture(scope="session", params=SETS)
def instruction_set(request: pytest.FixtureRequest, library: NativeLibrary) -> str:
    """Name each instruction set that this processor can use, in turn."""
    if request.param not in library.instruction_sets:
        pytest.skip(f"this processor has no {request.param}, only {', '.join(library.instruction_sets)}")
    return str(request.param)


@pytest.fixture
def chosen_set(library: NativeLibrary, instruction_set: str) -> Iterator[str]:
    """Choose each instruction set for the sessions of a test."""
    before = library.chosen
    library.choose(instruction_set)
    yield instruction_set
    library.choose(before)
