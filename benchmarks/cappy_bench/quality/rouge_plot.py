"""Draw an evaluation by ROUGE-L: each way to answer with its bounds, and how far picking by score gets by task.

Knows nothing of how the figures came about.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cappy_bench.quality.evaluation import BEST, CHANCE, Evaluation
from cappy_bench.quality.picking import average_by_dataset, average_over_datasets
from cappy_bench.quality.plot_files import CAPPY, LIMIT, OTHER, PALE, write_plot

ROW_INCHES = 0.2


def plot_evaluation(found: Evaluation, path: Path, *, force: bool) -> None:
    """Draw the picture into `path`, whose ending says the format.

        >>> plot_evaluation(found, Path("rouge.svg"), force=False)

    Raises CappyError if it cannot be drawn or written.
    """
    write_plot(partial(_draw, found), path, force=force)


def _draw(found: Evaluation, figure: Figure) -> None:
    tasks = list(dict.fromkeys(example.dataset for example in found.examples))
    rows = (len(found.ways), len(tasks))
    figure.set_size_inches(7.5, (sum(rows) + 5) * ROW_INCHES + 0.6)
    above, below = figure.subplots(2, 1, height_ratios=[count + 1 for count in rows])
    _draw_ways(above, found)
    _draw_tasks(below, found, tasks)


def _draw_ways(axes: Axes, found: Evaluation) -> None:
    for place, (name, values) in enumerate(found.ways.items()):
        cell = average_over_datasets(found.examples, values)
        colour = _colour(found, name)
        axes.plot([100 * cell.low, 100 * cell.high], [place, place], color=colour, linewidth=1.5)
        axes.plot([100 * cell.mean], [place], "o", color=colour, markersize=5)
        axes.annotate(
            f"{100 * cell.mean:.1f}", (100 * cell.high, place), (4, 0), textcoords="offset points", va="center"
        )
    _finish(axes, [*found.ways], f"{found.measure} x 100: mean over tasks, 95% bounds")
    for label, name in zip(axes.get_yticklabels(), found.ways, strict=True):
        label.set_color(_colour(found, name))


def _draw_tasks(axes: Axes, found: Evaluation, tasks: list[str]) -> None:
    """Draw each task from a random pick to the best. The first scorer's picks lie between."""
    first = found.scorers[0]
    cells = {name: average_by_dataset(found.examples, found.ways[name]) for name in (CHANCE, first, BEST)}
    for place, task in enumerate(tasks):
        ends = [100 * cells[name][task].mean for name in (CHANCE, BEST)]
        axes.plot(ends, [place, place], color=PALE, linewidth=2, zorder=1)
    for name, marker in ((CHANCE, "|"), (BEST, "|"), (first, "o")):
        means = [100 * cells[name][task].mean for task in tasks]
        colour = _colour(found, name)
        axes.plot(means, range(len(tasks)), marker, color=colour, markersize=5, markeredgewidth=1.5, label=name)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0.1)
    _finish(axes, tasks, f"{found.measure} x 100 by task")


def _finish(axes: Axes, names: list[str], label: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.grid(axis="x", color=PALE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def _colour(found: Evaluation, name: str) -> str:
    return CAPPY if name in found.scorers else LIMIT if name == BEST else OTHER
