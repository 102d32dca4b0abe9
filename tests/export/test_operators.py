"""The operators of the domain `cappy`: a file that carries them runs anywhere, and as fast where there are kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import helper
from scipy.linalg import hadamard

from cappy_engine import Scorer
from cappy_engine.bundle import MODEL_FILES, open_bundle
from cappy_engine.cpu.kernels import VARIABLE, find_kernels
from cappy_engine.native.reference import pack, unpack
from cappy_export.graphs.operators import DOMAIN, OPERATORS, function, operators_of, with_functions
from cappy_export.proof.pairs import default_pairs
from tests.support.operators import Array, attended, computed, kernel_options, run_node

Floats = npt.NDArray[np.float32]


def test_an_int8_file_carries_the_function_of_every_operator_and_what_it_says(bundle: Path) -> None:
    path = bundle / MODEL_FILES["int8"]
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path))
    used = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    assert len([entry for entry in model.opset_import if entry.domain == DOMAIN]) == 1
    others = {name for name in OPERATORS if "Disentangled" in name or "Rotary" in name}
    others |= {"GeGlu", "QuantizeNormedRows", "QuantizeGatedRows", "LinearAdd"}  # ModernBERT's
    of_int8 = {name for name in OPERATORS if not name.startswith("Bf16")} - others
    assert operators_of(path) == sorted(used) == sorted(of_int8)
    assert all(entry.doc_string.startswith(f"{entry.name} (") for entry in model.functions)
    graphs = open_bundle(bundle).manifest.document["graphs"]
    assert {name: graph["operators"] for name, graph in graphs.items()} == {
        "fp32": ["Attention", "FirstAttention"],
        "fp16": [],
        "bf16": ["Attention", "Bf16Linear", "Bf16LinearGelu", "Bf16LinearNorm", "FirstAttention"],
        "int8": sorted(used),
    }


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operators_function_stands_alone_and_says_what_it_is(name: str) -> None:
    written = function(name)
    onnx.checker.check_function(written)
    assert (written.domain, written.name) == (DOMAIN, name)
    assert written.doc_string.startswith(f"{name} (")


def test_a_model_without_the_operators_gets_no_functions(bundle: Path) -> None:
    model = with_functions(onnx.load(str(bundle / MODEL_FILES["fp16"]), load_external_data=False))
    assert not model.functions
    assert DOMAIN not in {entry.domain for entry in model.opset_import}


def test_panels_hold_each_weight_where_linears_page_says() -> None:
    weights = np.arange(8 * 32, dtype=np.uint8).reshape(8, 32).astype(np.int8)
    packed = pack(weights)
    assert packed.shape == (2, 2, 16, 4)
    assert all(weights[4 * g + j, 16 * p + c] == packed[p, g, c, j] for p, g, c, j in np.ndindex(packed.shape))


@pytest.mark.parametrize(("columns", "block"), [(3, 1), (24, 8), (128, 64)])
@pytest.mark.parametrize(
    ("zero_point", "steps", "least"), [(128, 127, 1e-12), (16, 239, 2.5), (0, 255, 1e-12), (128, 127, 1e3)]
)
@pytest.mark.parametrize("has_kernels", [False, True])
def test_rows_are_rotated_by_a_hadamard_matrix_and_then_rounded(
    columns: int, block: int, zero_point: int, steps: int, least: float, has_kernels: bool
) -> None:
    """Here they have three dimensions."""
    x = np.random.default_rng(block).standard_normal((3, 2, columns)).astype(np.float32)
    factors, offsets = np.linspace(0.5, 2, columns, dtype=np.float32), np.linspace(-1, 1, columns, dtype=np.float32)
    turned = ((x * factors + offsets).reshape(-1, block) @ hadamard(block)).reshape(x.shape)
    rounding: dict[str, Any] = {"zero_point": zero_point, "steps": steps, "least": least}
    node = helper.make_node("QuantizeRotatedRows", ["x", "f", "o"], ["q", "s"], domain=DOMAIN, block=block, **rounding)
    options = onnxruntime.SessionOptions()
    if has_kernels:
        if (library := find_kernels().library) is None:
            pytest.skip(f"no kernels here: {find_kernels().why_not}")
        options.register_custom_ops_library(str(library))
    q, scale = run_node(node, {"x": x}, {"f": factors, "o": offsets}, options)
    largest = np.maximum(np.abs(turned).max(axis=-1, keepdims=True), least)
    np.testing.assert_allclose(scale, largest / steps, rtol=1e-5)
    bounded = np.clip(turned, -zero_point * scale, (255 - zero_point) * scale)
    assert (np.abs((q.astype(int) - zero_point) * scale - bounded) <= scale * 0.501).all()


@pytest.fixture
def options() -> onnxruntime.SessionOptions:
    return kernel_options()


def linear_of(inner: int, **attributes: Any) -> tuple[onnx.NodeProto, dict[str, Any], dict[str, Any]]:
    """A node of Linear with 16 columns, inputs and constants."""
    random = np.random.default_rng(inner)
    node = helper.make_node("Linear", ["q", "s", "w", "ws", "b"], ["y"], domain=DOMAIN, **attributes)
    inputs = {"q": random.integers(0, 256, (3, inner)).astype(np.uint8), "s": np.ones((3, 1), np.float32)}
    weights = pack(random.integers(-99, 99, (inner, 16)).astype(np.int8))
    return node, inputs, {"w": weights, "ws": np.ones(16, np.float32), "b": np.ones(16, np.float32)}


def test_weights_without_rows_are_refused(options: onnxruntime.SessionOptions) -> None:
    with pytest.raises(Exception, match="rows must have at least one value"):
        run_node(*linear_of(0, zero_point=128), options)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "the attribute zero_point is missing, or is not a whole number"),
        ({"zero_point": 16.0}, "the attribute zero_point is missing, or is not a whole number"),
        ({"zero_point": 2**32 + 16}, "zero_point must be 0 to 255, not 4294967312"),
    ],
)
def test_an_attribute_that_is_missing_or_wrong_is_refused(
    given: dict[str, Any], said: str, options: onnxruntime.SessionOptions
) -> None:
    with pytest.raises(Exception, match=said):
        run_node(*linear_of(8, **given), options)


@pytest.mark.parametrize("missing", ["zero_point", "steps", "least", "block"])
def test_no_attribute_of_a_rounding_is_made_up(missing: str, options: onnxruntime.SessionOptions) -> None:
    rounding: dict[str, Any] = {"zero_point": 128, "steps": 127, "least": 1e-12, "block": 4}
    del rounding[missing]
    node = helper.make_node("QuantizeRotatedRows", ["x", "f", "o"], ["q", "s"], domain=DOMAIN, **rounding)
    row = np.ones((1, 4), np.float32)
    with pytest.raises(Exception, match=f"the attribute {missing} is missing, or is not a "):
        run_node(node, {"x": row}, {"f": row[0], "o": row[0]}, options)


def test_a_single_value_is_no_row(options: onnxruntime.SessionOptions) -> None:
    rounding: dict[str, Any] = {"zero_point": 128, "steps": 127, "least": 1e-12, "block": 1}
    node = helper.make_node("QuantizeRotatedRows", ["x", "f", "o"], ["q", "s"], domain=DOMAIN, **rounding)
    one = np.ones(1, np.float32)
    with pytest.raises(Exception, match="there must be rows to round, not a single value"):
        run_node(node, {"x": np.ones((), np.float32)}, {"f": one, "o": one}, options)


@pytest.mark.parametrize("before", [(), (2,), (2, 3), (1, 2, 3), (2, 0)], ids=str)
def test_rows_may_have_any_dimensions_with_kernels_and_without(
    before: tuple[int, ...], options: onnxruntime.SessionOptions
) -> None:
    random = np.random.default_rng(len(before))
    _, _, constants = linear_of(8)
    # Up to 127: ONNX Runtime's own sums of two products saturate beyond, on a processor without VNNI.
    q, scale = random.integers(0, 128, (*before, 8)).astype(np.uint8), random.random((*before, 1)).astype(np.float32)
    residual = random.standard_normal((*before, 16)).astype(np.float32)
    inputs: dict[str, Array] = {"q": q, "s": scale, "r": residual}
    norm = {"g": np.ones(16, np.float32), "z": np.zeros(16, np.float32)}
    takes = ["q", "s", *constants]
    product = helper.make_node("Linear", takes, ["y"], domain=DOMAIN, zero_point=128)
    added = helper.make_node("LinearAdd", [*takes, "r"], ["y"], domain=DOMAIN, zero_point=128)
    takes += ["r", *norm]
    normed = helper.make_node("LinearNorm", takes, ["y"], domain=DOMAIN, zero_point=128, epsilon=1e-5)
    wanted = (q.astype(int) - 128) @ unpack(constants["w"]).astype(int) * scale + 1
    mixed = wanted + residual
    centred = mixed - mixed.mean(axis=-1, keepdims=True)
    for chosen in (options, onnxruntime.SessionOptions()):
        (found,) = run_node(product, {"q": q, "s": scale}, constants, chosen)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
        (found,) = run_node(added, inputs, constants, chosen)
        np.testing.assert_allclose(found, mixed, rtol=1e-5, atol=1e-6)
        (found,) = run_node(normed, inputs, {**constants, **norm}, chosen)
        np.testing.assert_allclose(found, centred / np.sqrt(mixed.var(axis=-1, keepdims=True) + 1e-5), atol=1e-4)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (((3, 9), (3, 1)), "Linear takes rows of 8 values"),
        (((), (1,)), "Linear takes rows of 8 values"),
        (((3, 8), (3,)), "Linear takes one scale for each of 3 rows"),
        (((2, 3, 8), (6, 1)), "Linear takes one scale for each of 6 rows"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], said: str, options: onnxruntime.SessionOptions
) -> None:
    node, _, constants = linear_of(8, zero_point=128)
    inputs: dict[str, Array] = {"q": np.ones(shapes[0], np.uint8), "s": np.ones(shapes[1], np.float32)}
    with pytest.raises(Exception, match=said):
        run_node(node, inputs, constants, options)


def test_attention_of_no_pairs_gives_no_rows_with_kernels_and_without(options: onnxruntime.SessionOptions) -> None:
    nothing, lengths = np.zeros((0, 24), np.float32), np.zeros(0, np.int64)
    for chosen in (options, onnxruntime.SessionOptions()):
        assert computed("Attention", {"packed": nothing, "lengths": lengths}, 2, chosen).shape == (0, 8)
        inputs: dict[str, Array] = {"queries": nothing[:, :8], "packed": nothing[:, 8:], "lengths": lengths}
        assert computed("FirstAttention", inputs, 2, chosen).shape == (0, 8)


@pytest.mark.parametrize("lengths", [[5], [1], [3, 1, 6], [4] * 7], ids=str)
@pytest.mark.parametrize("heads", [1, 4])
def test_attention_runs_within_each_pair(lengths: list[int], heads: int) -> None:
    hidden, random = 8, np.random.default_rng(sum(lengths))
    packed = random.standard_normal((sum(lengths), 3 * hidden)).astype(np.float32)
    ends = np.cumsum(lengths)
    expected = [attended(packed[end - length : end], heads) for length, end in zip(lengths, ends, strict=True)]
    inputs = {"packed": packed, "lengths": np.array(lengths)}
    np.testing.assert_allclose(computed("Attention", inputs, heads), np.concatenate(expected), atol=1e-6)
    firsts = {"queries": packed[ends - lengths, :hidden], "packed": packed[:, hidden:], "lengths": np.array(lengths)}
    found = computed("FirstAttention", firsts, heads)
    np.testing.assert_allclose(found, [rows[0] for rows in expected], atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_kernels_and_functions_score_alike(bundle: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_kernels().library is None:
        pytest.skip(f"no kernels here: {find_kernels().why_not}")
    pairs = default_pairs()[::3]
    scores = {}
    for asked in ("auto", "none"):
        monkeypatch.setenv(VARIABLE, asked)
        with Scorer.open(bundle, device="cpu", precision=precision, threads=2) as scorer:  # type: ignore[arg-type]
            scores[scorer.info.kernels.startswith("none")] = scorer.score(pairs)
    # In int8 a value that lies between two steps may be rounded to the one or the other.
    limit = 1e-5 if precision == "fp32" else 0.1 * float(scores[True].std())
    assert 0 < np.abs(scores[True] - scores[False]).max() < limit
