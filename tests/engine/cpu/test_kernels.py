"""Which kernels are chosen, what is said where there are none, and that sessions run them."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cappy_engine import Scorer
from cappy_engine.cpu import kernels
from cappy_engine.cpu.built import why_no_library
from cappy_engine.errors import InstallationError
from cappy_engine.native import reference, structures
from cappy_engine.native.build import LIBRARY, SOURCES
from cappy_engine.native.library import ChosenSet, NativeLibrary
from cappy_engine.native.operands import Distances, Floats, Ids, Layer, Rotation, Rounding
from cappy_engine.session import load_runtime, open_session
from tests.support.places import SUPPORT, TINY

MODEL = SUPPORT / "kernels.onnx"
"""Four operators in a row, written by make_kernels_model.py, which has the weights' seed too."""
UNUSED = "the kernels are there but are not used, and int8 takes two to three times as long without them"


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what was found before, and after."""
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    kernels._find.cache_clear()
    yield
    kernels._find.cache_clear()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


# Which


def test_the_best_set_is_used(library: NativeLibrary) -> None:
    found = kernels.find_kernels()
    best = library.instruction_sets[0]
    if best in kernels.BY_NAME_ONLY:
        assert found.used == ""
        assert "no instruction set" in found.why_not
    else:
        assert (found.library, found.used, found.why_not) == (SOURCES / LIBRARY, best, "")


def test_a_set_can_be_chosen_by_its_name(instruction_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, instruction_set)
    assert kernels.find_kernels().used == instruction_set


def test_a_session_takes_the_set_that_was_found_for_it(library: NativeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found is kept, and the third time another set was chosen since."""
    first, second, *_ = library.instruction_sets
    before = library.chosen
    for asked in (first, second, first):
        monkeypatch.setenv(kernels.VARIABLE, asked)
        open_session(TINY / "onnx" / "model.onnx", kernels=kernels.find_kernels().chosen)
        assert library.chosen == asked
        assert ThreadPoolExecutor(1).submit(lambda: library.chosen).result() == first  # others' choice is their own
    library.choose(before)


def test_a_session_s_kernels_know_its_threads(library: NativeLibrary) -> None:
    """They split their work for these, and not for all processors of a large host."""
    before = library.chosen
    for threads in (1, 3):
        open_session(TINY / "onnx" / "model.onnx", threads=threads, kernels=kernels.find_kernels().chosen)
        assert library.chosen_threads == threads
    library.choose(before)
    assert library.chosen_threads == os.sysconf("SC_NPROCESSORS_ONLN")


def test_none_is_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "none")
    assert kernels.find_kernels() == kernels.Kernels(None, "", "they were switched off by CAPPY_KERNELS=none")


def test_a_set_that_is_not_there_is_refused(library: NativeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "avx1024")
    usable = ", ".join(library.instruction_sets)
    message = f"CAPPY_KERNELS is 'avx1024'; on this processor, choose from auto, none, {usable}"
    with pytest.raises(InstallationError, match=message):
        Scorer.open()


def test_a_set_without_a_library_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        InstallationError, match=r"CAPPY_KERNELS=avx2 cannot be used; .*: they were never compiled; in a"
    ):
        kernels._find("avx2", tmp_path / LIBRARY)
    shutil.copy(SOURCES / "build.json", tmp_path)
    (tmp_path / LIBRARY).write_bytes(b"not a library")
    with pytest.raises(InstallationError, match=r"CAPPY_KERNELS=avx2 cannot be used; .*: .+"):
        kernels._find("avx2", tmp_path / LIBRARY)
    assert warnings(caplog) == []


def test_a_library_that_was_not_compiled_is_not_used_and_one_that_is_damaged_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert kernels._find("auto", tmp_path / LIBRARY).why_not == why_no_library(tmp_path)
    assert warnings(caplog) == []
    if not why_no_library():
        shutil.copy(SOURCES / "build.json", tmp_path)
        (tmp_path / LIBRARY).write_bytes(b"not a library")
        kernels._find.cache_clear()
        found = kernels._find("auto", tmp_path / LIBRARY)
        assert found.library is None
        assert "the library cannot be loaded: " in found.told
        assert warnings(caplog) == [f"{UNUSED}: {found.why_not}"]


@pytest.mark.usefixtures("library")
def test_a_library_that_is_called_in_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = type("Other", (ctypes.Structure,), {"_fields_": (("zero_point", ctypes.c_int),)})
    monkeypatch.setattr(structures, "ALL", (other, *structures.ALL[1:]))
    with pytest.raises(OSError, match=r"is not a library of .* of this version \(its structures have other sizes\)"):
        NativeLibrary(SOURCES / LIBRARY)


def test_a_set_that_computes_wrongly_is_not_used_but_the_next(
    library: NativeLibrary, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = library.linear
    best, *others = library.instruction_sets

    def wrong(name: str, layer: Layer, rows: Any, scales: Any, residual: Any = None) -> Floats:
        found = right(name, layer, rows, scales, residual)
        return np.nextafter(found, np.float32(np.inf)) if name == best else found

    monkeypatch.setattr(library, "linear", wrong)
    monkeypatch.setattr(kernels, "BY_NAME_ONLY", ())
    found = kernels._choose(library, SOURCES / LIBRARY, "auto")
    assert found.used == others[0]
    assert found.why_not.startswith(f"{best} failed its test: Linear differs from numpy")
    assert warnings(caplog) == [f"the kernels for {found.why_not}"]
    with pytest.raises(InstallationError, match=f"CAPPY_KERNELS={best} cannot be used; .*: {found.why_not}"):
        kernels._choose(library, SOURCES / LIBRARY, best)
    monkeypatch.setattr(kernels, "BY_NAME_ONLY", others)
    assert kernels._choose(library, SOURCES / LIBRARY, "auto").told == f"none: {found.why_not}"
    assert warnings(caplog)[1:] == [f"the kernels for {found.why_not}", f"{UNUSED}: {found.why_not}"]


@pytest.mark.parametrize(("fewest", "most", "products"), [(49, 10**9, 0), (1, 48, 2 << 20), (49, 10**9, 2 << 20)])
def test_products_of_many_rows_and_in_tasks_are_tested(
    library: NativeLibrary, monkeypatch: pytest.MonkeyPatch, fewest: int, most: int, products: int
) -> None:
    right, name = library.linear, library.instruction_sets[0]

    def wrong(name: str, layer: Layer, rows: Any, scales: Any, residual: Any = None) -> Floats:
        found = right(name, layer, rows, scales, residual)
        found[-1, -1] += fewest <= len(rows) <= most and rows.size * layer.columns > products
        return found

    assert kernels.self_test(library, name) == ""
    monkeypatch.setattr(library, "linear", wrong)
    assert kernels.self_test(library, name).startswith("Linear differs from numpy")


def test_keys_in_blocks_are_tested(library: NativeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    right, name = library.attention, library.instruction_sets[0]

    def wrong(name: str, packed: Floats, lengths: Ids, heads: int, *rest: Any, **others: Any) -> Floats:
        found = right(name, packed, lengths, heads, *rest, **others)
        found[-1, -1] += lengths.max() > 512
        return found

    monkeypatch.setattr(library, "attention", wrong)
    assert kernels.self_test(library, name) == "Attention differs from numpy, a pair of 513 tokens"


def test_distances_are_tested(library: NativeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    right: Any = reference.attention

    def wrong(packed: Floats, lengths: Ids, heads: int, window: Any, distances: Distances | None, rest: Any) -> Floats:
        """Attend with the rows of distances the other way round."""
        turned = None if distances is None else replace(distances, rows=distances.rows[::-1])
        found: Floats = right(packed, lengths, heads, window, turned, rest)
        return found

    monkeypatch.setattr(reference, "attention", wrong)
    problem = kernels.self_test(library, library.instruction_sets[0])
    assert problem == "DisentangledAttention differs from numpy, heads of 58"


# In a session


@pytest.fixture
def open_model(library: NativeLibrary) -> Callable[..., Any]:
    """Open the model with the library."""
    runtime = load_runtime()

    def open_it(threads: int = 1) -> Any:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.register_custom_ops_library(str(SOURCES / LIBRARY))
        return runtime.InferenceSession(str(MODEL), options, providers=["CPUExecutionProvider"])

    return open_it


def expected(x: Floats) -> Floats:
    """Compute what the model does: Gelu of one product, then the other's layer norm with `x`."""
    random = np.random.default_rng(7)
    inner, between = 40, 112

    def layer(rows: int, columns: int) -> Layer:
        weights = random.integers(-127, 128, (rows, columns)).astype(np.int8)
        scales = (random.uniform(0.5, 1, columns) / 127 / rows**0.5).astype(np.float32)
        return Layer(weights, scales, random.standard_normal(columns).astype(np.float32))

    up, down = layer(inner, between), layer(between, inner)
    down = replace(down, zero_point=16, gamma=np.full(inner, 0.5, np.float32), beta=np.full(inner, 0.25, np.float32))
    first, second = (random.uniform(-2, 2, (2, count)).astype(np.float32) for count in (inner, between))
    rounded = reference.quantize_rows(reference.rotate_rows(x, Rotation(first[0], first[1], 8)), Rounding())
    active = reference.linear(replace(up, is_gelu=True), *rounded)
    middle = reference.rotate_rows(active, Rotation(second[0], second[1], 16))
    return reference.linear(down, *reference.quantize_rows(middle, Rounding(zero_point=16, steps=239, least=2.5)), x)


@pytest.mark.parametrize("rows", [1, 31, 700])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_session_runs_the_kernels(
    open_model: Callable[..., Any], library: NativeLibrary, chosen_set: str, rows: int, threads: int
) -> None:
    assert library.chosen == chosen_set
    before = library.registrations
    session = open_model(threads)
    assert library.registrations == before + 1
    x = np.random.default_rng(rows).standard_normal((rows, 40)).astype(np.float32)
    (found,) = session.run(None, {"x": x})
    # A value on the edge of two steps may fall to the other side: Gelu's last bits differ. One step is 1% of a value.
    np.testing.assert_allclose(found, expected(x), atol=0.01)
    assert np.median(np.abs(found - expected(x))) < 1e-6


def test_many_threads_share_a_session_and_its_kernels(open_model: Callable[..., Any]) -> None:
    session = open_model(2)
    inputs = [np.random.default_rng(seed).standard_normal((50 + seed, 40)).astype(np.float32) for seed in range(8)]
    alone = [session.run(None, {"x": x})[0] for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: session.run(None, {"x": x})[0], inputs * 5))
    for found, wanted in zip(together, alone * 5, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_no_rows_give_no_rows(open_model: Callable[..., Any]) -> None:
    (found,) = open_model().run(None, {"x": np.zeros((0, 40), np.float32)})
    assert found.shape == (0, 40)


def test_a_runtime_that_is_too_old_for_the_kernels_gets_an_error(library: NativeLibrary, tmp_path: Path) -> None:
    """Another copy of the library, for each asks the first runtime only; the runtime has one version of its API."""
    address = ctypes.c_void_p
    said = []

    def create_status(_code: int, text: bytes) -> int:
        said.append(text.decode())
        return 7

    function = ctypes.CFUNCTYPE(address, ctypes.c_int, ctypes.c_char_p)(create_status)
    first_version = (address * 1)(ctypes.cast(function, address))
    get_api = ctypes.CFUNCTYPE(address, ctypes.c_uint32)(
        lambda version: ctypes.addressof(first_version) if version == 1 else None
    )
    version = ctypes.create_string_buffer(b"1.9.0")
    get_version = ctypes.CFUNCTYPE(address)(lambda: ctypes.addressof(version))
    base = (address * 2)(ctypes.cast(get_api, address), ctypes.cast(get_version, address))
    copied = ctypes.CDLL(str(shutil.copy(SOURCES / LIBRARY, tmp_path / LIBRARY)))
    copied.RegisterCustomOps.restype = address
    assert copied.RegisterCustomOps(None, ctypes.byref(base)) == 7
    assert said == ["they need version 20 of its API, which ONNX Runtime 1.9.0 has not"]
    assert copied.cappy_registrations() == 0


def test_a_library_that_onnx_runtime_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / LIBRARY).write_bytes(b"not a library")
    with pytest.raises(InstallationError, match=r"refuses the kernels of .*libcappy_kernels\.so .*CAPPY_KERNELS=none"):
        open_session(TINY / "onnx" / "model.onnx", kernels=ChosenSet(tmp_path / LIBRARY, "avx2"))


def test_a_library_that_registers_nothing_is_named(library: NativeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NativeLibrary, "registrations", 7)
    chosen = ChosenSet(SOURCES / LIBRARY, library.chosen)
    with pytest.raises(InstallationError, match=r"refuses the kernels of .*they do not know its interface"):
        open_session(TINY / "onnx" / "model.onnx", kernels=chosen)
