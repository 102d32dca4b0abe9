"""Every place of a model that can name another file is found, without the package onnx."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cappy_engine.external_data import external_locations
from cappy_engine.storage import open_regular
from tests.support.onnx_files import external, field, write_external_model, write_product_model
from tests.support.places import TINY

TENSOR = external("weights")
ATTRIBUTE, SPARSE = field(5, TENSOR), field(1, TENSOR)
GRAPH = field(5, TENSOR)


def nested(levels: int) -> bytes:
    """Put a graph into a node's attribute, again and again."""
    graph = GRAPH
    for _ in range(levels):
        graph = field(1, field(5, field(6, graph)))
    return graph


def found_in(folder: Path, content: bytes) -> set[bytes]:
    (folder / "model.onnx").write_bytes(content)
    with open_regular(folder / "model.onnx") as file:
        return external_locations(file)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(field(7, GRAPH), id="an initializer"),
        pytest.param(field(7, field(1, field(5, ATTRIBUTE))), id="a constant"),
        pytest.param(field(7, field(1, field(5, field(10, TENSOR)))), id="a list of constants"),
        pytest.param(field(7, nested(1)), id="a branch"),
        pytest.param(field(7, field(1, field(5, field(11, GRAPH)))), id="a list of branches"),
        pytest.param(field(7, nested(20)), id="branches in branches"),
        pytest.param(field(7, field(15, SPARSE)), id="a sparse initializer"),
        pytest.param(field(7, field(15, field(2, TENSOR))), id="a sparse initializer's indices"),
        pytest.param(field(7, field(1, field(5, field(22, SPARSE)))), id="a sparse constant"),
        pytest.param(field(7, field(1, field(5, field(23, SPARSE)))), id="a list of sparse constants"),
        pytest.param(field(25, field(7, field(5, ATTRIBUTE))), id="a function"),
        pytest.param(field(25, field(11, ATTRIBUTE)), id="a function's default"),
        pytest.param(field(20, field(1, GRAPH)), id="training"),
        pytest.param(field(7, b"") + field(1, 8) + field(7, GRAPH), id="a graph in two pieces"),
        pytest.param(field(7, field(5, field(13, field(2, "weights") + field(1, "location")))), id="value first"),
        pytest.param(
            field(7, field(5, field(13, field(1, "location") + field(1, "x") + field(2, "weights")))), id="two keys"
        ),
    ],
)
def test_a_location_is_found_wherever_a_tensor_may_be(tmp_path: Path, content: bytes) -> None:
    assert found_in(tmp_path, field(1, 8) + content) == {b"weights"}


def test_models_without_external_data_name_no_file(tmp_path: Path) -> None:
    assert found_in(tmp_path, write_product_model(tmp_path / "product.onnx").read_bytes()) == set()
    assert found_in(tmp_path, (TINY / "onnx" / "model.onnx").read_bytes()) == set()
    assert found_in(tmp_path, field(7, field(2, "location of the graph"))) == set()  # a name, not a location


def test_all_locations_are_found(tmp_path: Path) -> None:
    tensors = [field(5, external(name)) for name in ("a", "../b", "a")]
    assert found_in(tmp_path, field(7, b"".join(tensors))) == {b"a", b"../b"}
    write_external_model(tmp_path / "written.onnx", "c")
    assert found_in(tmp_path, (tmp_path / "written.onnx").read_bytes()) == {b"c"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content + b"\x3a\xff",
        lambda content: content + b"\x0b",
        lambda content: content + b"\xff" * 12,
        lambda content: content + b"\x09\x00",
        lambda content: field(7, nested(200)),
        lambda content: b"",
    ],
    ids=["cut off", "a field too long", "a group", "a number without end", "half a number", "too deep", "empty"],
)
def test_what_is_no_model_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(ValueError, match=re.compile("field|number|message|empty")):
        found_in(tmp_path, damage(field(7, GRAPH)))


def test_a_file_is_read_where_it_is_open_already(tmp_path: Path) -> None:
    path = write_external_model(tmp_path / "model.onnx", "c")
    with open_regular(path) as file:
        path.unlink()
        assert isinstance(file, io.BufferedReader)
        assert external_locations(file) == {b"c"}
