"""A table is scored by its rows: of pandas, polars, Arrow and datasets, where they are installed, or a dict."""

from __future__ import annotations

import re
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from cappy_engine import Scorer
from cappy_engine.errors import InvalidPair
from cappy_engine.pairs import check_pairs, read_pairs
from cappy_engine.testing import fake_scorer
from tests.support.columns import ArrowColumn, ArrowScalar, Frame, Series
from tests.support.pages import blocks
from tests.support.places import ROOT

INSTRUCTIONS, RESPONSES = ["Où?", "b", "b"], ["f", "", "日本"]
PAIRS = list(zip(INSTRUCTIONS, RESPONSES, strict=True))


def made(package: str, columns: dict[str, list[Any]]) -> Any:
    """Make a table of a package, or skip the test."""
    library = pytest.importorskip(package)
    return library.Dataset.from_dict(columns) if package == "datasets" else {
        "pandas": lambda: library.DataFrame(columns),
        "polars": lambda: library.DataFrame(columns),
        "pyarrow": lambda: library.table(columns),
    }[package]()  # fmt: skip


each_package = pytest.mark.parametrize("package", ["pandas", "polars", "pyarrow", "datasets"])


@each_package
def test_tables_of_other_packages_are_scored_by_their_rows(package: str) -> None:
    table = made(package, {"id": [1, 2, 3], "response": RESPONSES, "instruction": INSTRUCTIONS})
    assert check_pairs(table) == PAIRS
    scorer = fake_scorer()
    assert scorer.score(table).tolist() == scorer.score(PAIRS).tolist()
    assert check_pairs(made(package, {"question": INSTRUCTIONS, "answer": RESPONSES})) == PAIRS


@each_package
def test_a_missing_text_is_refused_with_the_place_of_its_row(package: str) -> None:
    table = made(package, {"instruction": ["a", "b", "c"], "response": ["d", None, "f"]})
    with pytest.raises(InvalidPair, match=r"pair 1: response must be a str, got (NoneType None|float nan)"):
        read_pairs(table)


def test_tables_in_another_order_than_they_were_made_are_read_in_theirs() -> None:
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    columns = {"instruction": INSTRUCTIONS, "response": RESPONSES}
    assert check_pairs(pandas.DataFrame(columns).iloc[::-1]) == PAIRS[::-1]
    assert check_pairs(pandas.DataFrame(columns, dtype=object)[1:]) == PAIRS[1:]
    assert check_pairs(pandas.DataFrame(columns).astype("category")) == PAIRS
    assert check_pairs(datasets.Dataset.from_dict(columns).select([2, 0])) == [PAIRS[2], PAIRS[0]]


class PandasColumn(list[object]):
    """A Series of pandas whose array would become Arrow's, but cannot."""

    def __init__(self, texts: list[object], error: Exception) -> None:
        super().__init__(texts)
        self.array, self._error = self, error

    def __arrow_array__(self) -> object:
        raise self._error


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'pyarrow'"), UnicodeError("surrogates")])
def test_columns_of_pandas_are_read_without_arrow_too(error: Exception) -> None:
    table = {"instruction": PandasColumn([*INSTRUCTIONS], error), "response": PandasColumn([*RESPONSES], error)}
    assert check_pairs(table) == PAIRS
    table["response"][2] = "\ud800"
    with pytest.raises(InvalidPair, match="pair 2: response has a lone surrogate"):
        check_pairs(table)


def test_a_frame_of_pandas_is_read_where_arrow_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"instruction": INSTRUCTIONS, "response": RESPONSES}).astype("string[python]")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert check_pairs(frame) == PAIRS


class Streamed:
    """A dataset of `datasets` that makes its rows when they are asked for, some at a time."""

    def __init__(self, columns: dict[str, list[str]]) -> None:
        self.column_names, self._columns = ["text", "label"], columns

    def with_format(self, name: str) -> object:
        raise AssertionError(f"read in the format {name}, as if its rows were stored")

    def iter(self, batch_size: int) -> Iterator[dict[str, list[str]]]:
        for row in range(3):
            yield {name: texts[row : row + 1] for name, texts in self._columns.items()}


class Transformed(Streamed):
    """A dataset of `datasets` with a transform: what it stores is something else."""

    format = {"type": "custom"}  # noqa: RUF012

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize("kind", [Streamed, Transformed])
def test_a_dataset_that_makes_its_rows_is_read_by_what_it_makes(kind: Any) -> None:
    assert check_pairs(kind({"response": RESPONSES, "instruction": INSTRUCTIONS})) == PAIRS
    with pytest.raises(InvalidPair, match=r"got dict with the columns \['response'\]; name two"):
        check_pairs(kind({"response": RESPONSES}))


def test_a_transform_of_datasets_and_a_stream_are_read_by_what_they_give() -> None:
    stored = pytest.importorskip("datasets").Dataset.from_dict({"text": INSTRUCTIONS, "response": RESPONSES})
    transformed = stored.with_transform(lambda rows: {"response": rows["response"], "instruction": rows["text"]})
    assert check_pairs(transformed) == PAIRS
    asked = stored.with_transform(lambda rows: {**rows, "text": [f"{text}?" for text in rows["text"]]})
    assert check_pairs(asked)[1] == ("b?", "")
    assert check_pairs(stored.to_iterable_dataset()) == PAIRS


@pytest.mark.parametrize("make", [list, iter, Series, ArrowColumn, lambda texts: list(map(ArrowScalar, texts))])
def test_a_dict_of_columns_is_a_table(make: Any) -> None:
    table = {"instruction": make(INSTRUCTIONS), "label": [1.0, 0.0, 1.0], "response": make(RESPONSES)}
    assert check_pairs(table) == PAIRS
    assert check_pairs({"instruction": [], "response": []}) == []


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["id", "question", "answer"], "got Frame with the columns ['id', 'question', 'answer']; name two of them "
         "'instruction' and 'response', or pass a table of these two alone, in this order"),
        (["response", "text"], "got Frame with the columns ['response', 'text']; name two"),
        (["text", "instruction"], "got Frame with the columns ['text', 'instruction']; name two"),
        (["instruction", "instruction", "response"], "got Frame with the columns ['instruction', 'instruction', "),
        (["a", "a"], "got Frame with the columns ['a', 'a']; name two"),
        (["text"], "got Frame with the columns ['text']; name two"),
        ([], "got Frame with the columns []; name two"),
        (["a", "b"], "got Frame, which does not give its columns; collect its rows before"),
    ],
)  # fmt: skip
def test_a_table_whose_columns_are_not_clear_is_refused(names: list[str], problem: str) -> None:
    with pytest.raises(InvalidPair, match=re.escape(f"expected (instruction, response) pairs, {problem}")):
        check_pairs(Frame(names))


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({"Is the sky blue?": "Yes", "Is it night?": "No."}, "pair 0: expected (instruction, response) pairs, got a "
         "table whose column 'Is the sky blue?' is str 'Yes'"),
        ({"instruction": ["a"], "response": 3}, "got a table whose column 'response' is int 3"),
        ({"instruction": {"r1": "a"}, "response": {"r1": "b"}}, "got a table whose column 'instruction' is dict {'r1': "
         "'a'}; a column is a list of texts, as in a dict from frame.to_dict('list')"),
        ({"instruction": ["a"], "response": {0: "b"}}, "column 'response' is dict {0: 'b'}; a column is a list"),
        ({"r1": {"instruction": "a"}, "r2": {"instruction": "b"}}, "column 'r1' is dict {'instruction': 'a'}; a "),
        ({"instruction": Frame(["x"]), "response": ["b"]}, "column 'instruction' is Frame a table of several"),
        ({"instruction": {"a"}, "response": ["b"]}, "column 'instruction' is set {'a'}, which has no order"),
        ({"instruction": ["a"], "response": frozenset("b")}, "column 'response' is frozenset frozenset({'b'}), which "
         "has no order; make a list"),
        ({"instruction": [*"ab"], "response": ["c"]}, "pair 1: column 'instruction' has 2 rows, and 'response' has 1"),
        ({"instruction": ["a", "b"], "response": ["c", 3]}, "pair 1: response must be a str, got int 3"),
    ],
)  # fmt: skip
def test_columns_that_are_not_of_texts_or_not_of_one_length_are_refused(table: Any, problem: str) -> None:
    with pytest.raises(InvalidPair, match=re.escape(problem)):
        check_pairs(table)


def test_a_column_is_written_out_only_if_it_is_refused() -> None:
    class Column(list[str]):
        def __repr__(self) -> str:
            raise AssertionError("written out, however long it is")

    assert check_pairs({"instruction": Column(INSTRUCTIONS), "response": Column(RESPONSES)}) == PAIRS


def test_the_keys_and_values_of_a_dict_are_columns() -> None:
    texts = dict(PAIRS[:2])
    assert check_pairs({"instruction": texts.keys(), "response": texts.values()}) == PAIRS[:2]


def test_a_frame_that_became_dicts_is_refused_and_one_that_became_lists_is_scored() -> None:
    columns = {"instruction": INSTRUCTIONS, "response": RESPONSES}
    frame = pytest.importorskip("pandas").DataFrame(columns, index=[*"xyz"])
    for orient in ("list", "series"):
        assert check_pairs(frame.to_dict(orient)) == PAIRS
    with pytest.raises(InvalidPair, match=r"as in a dict from frame.to_dict\('list'\)"):
        check_pairs(frame.to_dict())


class Splits(dict[str, object]):
    """Several datasets by the names of their splits, as `datasets` loads them."""

    def with_format(self, name: str) -> object:
        raise AssertionError(f"read in the format {name}, as if it were one dataset")


@pytest.mark.parametrize("names", [["train"], ["train", "test"], ["train", "test", "validation"]])
def test_one_of_several_splits_has_to_be_chosen(names: list[str]) -> None:
    with pytest.raises(InvalidPair, match=re.escape(f"got Splits with the splits {names}; choose one of them, as in "
                                                    "table['train']")):  # fmt: skip
        check_pairs(Splits.fromkeys(names, {"instruction": ["a"], "response": ["b"]}))
    with pytest.raises(InvalidPair, match=r"got Splits with the splits \[\]"):
        check_pairs(Splits())


def test_one_of_the_splits_of_datasets_has_to_be_chosen() -> None:
    datasets = pytest.importorskip("datasets")
    stored = datasets.Dataset.from_dict({"instruction": INSTRUCTIONS, "response": RESPONSES})
    streamed = stored.to_iterable_dataset()
    for splits in (
        datasets.DatasetDict(train=stored, test=stored),
        datasets.IterableDatasetDict(train=streamed, test=streamed),
    ):
        with pytest.raises(InvalidPair, match=r"with the splits \['train', 'test'\]; choose one of them"):
            check_pairs(splits)
        assert check_pairs(splits["train"]) == PAIRS


def test_rows_of_a_long_table_do_not_become_a_list() -> None:
    class Column:
        def __iter__(self) -> Iterator[str]:
            return (f"text {number % 10} of a table" for number in range(20_000))

    tracemalloc.start()
    try:
        found = read_pairs({"instruction": Column(), "response": Column()})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.places.shape == (20_000, 2)
    assert len(found.texts) == 10
    assert peak < 60 * 20_000  # two places in an array that grows, copied once; a tuple and two texts take 200 bytes


@pytest.mark.parametrize("count", [4096, 4097, 10_000])
def test_no_row_of_a_long_column_of_arrow_is_lost(count: int) -> None:
    texts = list(map(str, range(count)))
    table = {"instruction": ArrowColumn(texts), "response": ArrowColumn(texts[::-1])}
    assert check_pairs(table) == list(zip(texts, texts[::-1], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("package", ["pandas", "polars", "pyarrow", "datasets"])
def test_the_page_shows_how_each_package_is_used(package: str) -> None:
    pytest.importorskip(package)
    (script,) = [block.text for block in blocks("docs/scoring.md", "python") if f"import {package}" in block.text]
    assert len(script.splitlines()) < 10
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Yes" in done.stdout
    with Scorer.open() as scorer:
        score = float(scorer.score([("Is the sky blue?", "Yes"), ("Is the sky blue?", "No")])[0])
    assert f"{score:.5f}"[:-1] in done.stdout  # which has at least so many digits, and int8's depend on the kernels
