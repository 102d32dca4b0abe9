"""A plot has its names as they are; asking whether it can be written changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from cappy_bench.quality import rouge_plot
from cappy_bench.quality.evaluation import evaluate
from cappy_bench.quality.picking import Example, average_over_datasets
from cappy_bench.quality.plot_files import check_path
from cappy_bench.quality.rouge_plot import plot_evaluation
from cappy_engine.errors import CappyError


def test_names_are_drawn_as_they_are_and_the_same_figures_give_the_same_file(tmp_path: Path) -> None:
    examples = [Example("cost_$5_to_$10_{", (0, 1), (1.0, 0.25)), Example("b", (2, 3), (0.5, 0.5))]
    found = evaluate("ROUGE-L", examples, {"fp32": np.array([0.9, 0.1, 0.2, 0.3])})
    for name in ("one.svg", "other.svg"):
        plot_evaluation(found, tmp_path / name, force=False)
    drawn = (tmp_path / "one.svg").read_text()
    assert drawn == (tmp_path / "other.svg").read_text()
    for text in ("cost_$5_to_$10_{", "fp32", "75.0", "56.2", "oracle"):
        assert f">{text}<" in drawn


def test_lines_are_bounds_and_go_from_a_random_pick_to_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = Figure()
    monkeypatch.setattr(rouge_plot, "write_plot", lambda draw, path, *, force: draw(figure))
    examples = [Example("a", (0, 1), (1.0, 0.25)), Example("a", (2, 3), (0.5, 0.75)), Example("b", (4, 5), (0.5, 0.0))]
    found = evaluate("ROUGE-L", examples, {"fp32": np.array([0.9, 0.1, 0.3, 0.2, 0.1, 0.3])})
    plot_evaluation(found, Path("rouge.svg"), force=False)
    above, below = ([np.asarray(line.get_xydata()).tolist() for line in axes.lines] for axes in figure.axes)
    for place, (bounds, mean, values) in enumerate(zip(above[::2], above[1::2], found.ways.values(), strict=True)):
        cell = average_over_datasets(examples, values)
        assert bounds == [[100 * cell.low, place], [100 * cell.high, place]]
        assert mean == [[100 * cell.mean, place]]
    chance, best, picked = [[62.5, 25.0], [87.5, 50.0], [75.0, 0.0]]
    assert below[:2] == [
        [[low, place], [high, place]] for place, (low, high) in enumerate(zip(chance, best, strict=True))
    ]
    assert below[2:] == [[[value, place] for place, value in enumerate(values)] for values in (chance, best, picked)]


def test_asking_whether_a_plot_can_be_written_leaves_nothing_and_changes_nothing(tmp_path: Path) -> None:
    check_path(tmp_path / "new.svg")
    assert not list(tmp_path.iterdir())
    (tmp_path / "old.svg").write_text("old")
    check_path(tmp_path / "old.svg", force=True)
    with pytest.raises(CappyError, match=r"old\.svg exists; choose another name, or replace it with --force"):
        check_path(tmp_path / "old.svg")
    with pytest.raises(CappyError, match=r"the input .*old\.svg is the output too"):
        check_path(tmp_path / "old.svg", force=True, inputs=[tmp_path / "old.svg"])
    assert (tmp_path / "old.svg").read_text() == "old"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("a.jpeg", "must end in .svg, .png or .pdf"),
        ("none/a.svg", "the folder .*none does not exist"),
        ("folder.svg", "folder.svg is a folder; the output must be a file"),
        (f"{'a' * 300}.svg", "cannot be written: File name too long"),
    ],
)
def test_a_plot_that_cannot_be_written_is_refused(name: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(CappyError, match=problem):
        check_path(tmp_path / name)
