"""Writes runners' names beside the ends of lines, so that no name covers another."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cappy_bench.speed.marks import Line, Point, colour_of

NAME_HEIGHT, REACH = 11.0, 22.0
"""Points from one name to the next below it, and from the last end that is named to the names."""


Place = tuple[float, float]


def name_ends(figure: Figure, axes: Axes, named: Sequence[Line | Point], ends: Sequence[Place]) -> None:
    """Write the runners' names in columns right of their ends.

    The layout is fixed first, so that the names do not move it.

    >>> name_ends(figure, axes, lines, [(512, 80.0), (512, 95.0)])
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    places = [(float(x), float(y)) for x, y in axes.transData.transform(ends)]
    for column in _into_columns([x for x, _ in places], [_text_width(axes, one) for one in named]):
        column.sort(key=lambda at: places[at][1])
        right = max(places[at][0] for at in column) + REACH
        wanted = [places[at][1] for at in column]
        heights = _spread_apart(wanted, gap=NAME_HEIGHT, low=axes.bbox.y0 + 6, high=axes.bbox.y1 - 6)
        for at, height in zip(column, heights, strict=True):
            _name(axes, named[at], ends[at], (right - places[at][0], height - places[at][1]))


def _name(axes: Axes, of: Line | Point, end: Place, offset: Place) -> None:
    """Write a runner's name at `offset` points from `end`, with a hair line between them."""
    axes.annotate(
        of.runner,
        end,
        offset,
        textcoords="offset points",
        va="center",
        fontweight="bold" if of.is_ours else "normal",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        zorder=2.5,
        arrowprops={
            "arrowstyle": "-",
            "color": colour_of(of.precision, True),
            "linewidth": 0.5,
            "shrinkA": 1,
            "shrinkB": 5,
            "relpos": (0, 0.5),
        },
    )


def _into_columns(ends: Sequence[float], widths: Sequence[float]) -> list[list[int]]:
    """Group names into columns.

    Each column stands `REACH` right of its last end, and before the next column's ends.
    """
    columns: list[list[int]] = []
    limit = 0.0
    for at in sorted(range(len(ends)), key=lambda at: ends[at]):
        if not columns or ends[at] > limit:
            columns.append([])
        columns[-1].append(at)
        limit = ends[at] + REACH + max(widths[other] for other in columns[-1]) + 10
    return columns


def _spread_apart(wanted: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Find heights from `low` to `high`, `gap` apart, nearest to the ascending `wanted` ones."""
    blocks: list[list[float]] = []
    for place, height in enumerate(wanted):
        blocks.append([height - place * gap])
        while len(blocks) > 1 and fmean(blocks[-2]) >= fmean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    bases = [fmean(block) for block in blocks for _ in block]
    top = high - (len(wanted) - 1) * gap
    return [max(low, min(base, top)) + place * gap for place, base in enumerate(bases)]


def _text_width(axes: Axes, of: Line | Point) -> float:
    written = axes.text(0, 0, of.runner, fontweight="bold" if of.is_ours else "normal")
    width = written.get_window_extent().width
    written.remove()
    return float(width)
