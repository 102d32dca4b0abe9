"""Draws the report's pictures as SVG. Pure: values and a path in, a file out; knows nothing of how they were measured.

Colour is the precision; what is ours is dark, filled and bold. The same values give the same file: no dates, no random
ids; and text stays text, so that a changed figure is a changed line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from cappy_bench.speed.figures import EXACT

ERRORS = (1e-7, 1.0)
"""The differences that are shown; one beyond is drawn at the edge."""
COLOURS: Mapping[str, tuple[str, str]] = {
    "fp32": ("#0072b2", "#9ccbe8"),
    "int8": ("#d55e00", "#f6bd90"),
    "fp16": ("#5a5a5a", "#b8b8b8"),
}
"""Each precision's colour for ours and for the others, which the colour-blind can tell apart too (all three kinds)."""
INK, SOFT, GREY, PALE = "#222222", "#666666", "#8a8a8a", "#e6e6e6"
NAME_HEIGHT, REACH = 11.0, 22.0
"""Points from one name to the next below it, and from the last end that is named to the names."""

Place = tuple[float, float]
STYLE: Mapping[Any, Any] = {
    "svg.hashsalt": "cappy",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 8,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Bar:
    """Useful tokens per second of one runner on one workload; `spread` is the slowest and the fastest round."""

    workload: str
    runner: str
    precision: str
    is_ours: bool
    tokens_per_second: float
    spread: tuple[float, float]
    is_wrong: bool


@dataclass(frozen=True)
class Line:
    """Median latency of one runner in `milliseconds`, for single pairs of so many `tokens`, ascending."""

    runner: str
    precision: str
    is_ours: bool
    tokens: list[int]
    milliseconds: list[float]


@dataclass(frozen=True)
class Point:
    """How far one runner's scores are from the reference, and its useful tokens per second on the workload `bulk`."""

    runner: str
    precision: str
    is_ours: bool
    max_error: float
    tokens_per_second: float


def draw_throughput(rows: Sequence[Bar], path: Path, *, title: str) -> None:
    """Bars of tokens per second, fastest first, in one panel per workload; the first workload's is the widest."""
    workloads = list(dict.fromkeys(row.workload for row in rows))
    panels = [[row for row in rows if row.workload == workload] for workload in workloads]
    lines = [panels[:1], *(panels[at : at + 2] for at in range(1, len(panels), 2))]
    heights = [max(len(panel) for panel in line) + 2 for line in lines]
    with _figure(path, height=sum(heights) * 0.19 + 0.5) as figure:
        _add_title(figure, title, {row.precision for row in rows})
        grid = figure.add_gridspec(len(lines), 2, height_ratios=heights)
        for place, line in enumerate(lines):
            for column, panel in enumerate(line):
                axes = figure.add_subplot(grid[place, column if place else slice(None)])
                _draw_bars(axes, panel, room=heights[place] - 2)
        note = "useful tokens per second; the black line is from the slowest to the fastest round"
        figure.axes[0].set_title(note, loc="right", fontsize=8, color=SOFT)


def draw_latency(lines: Sequence[Line], path: Path, *, title: str) -> None:
    """Median latency against length, both logarithmic, with each runner's name at the end of its line."""
    with _figure(path, height=6, right=0.81) as figure:
        _add_title(figure, title, {line.precision for line in lines})
        axes = figure.add_subplot()
        for line in lines:
            colour, front = _colour(line.precision, line.is_ours), 3 if line.is_ours else 2
            width, dot = (2.4, 5) if line.is_ours else (1.3, 3)
            axes.plot(line.tokens, line.milliseconds, "o-", color=colour, linewidth=width, markersize=dot, zorder=front)
        _set_log_axes(axes, lines)
        _name_ends(figure, axes, lines, [(line.tokens[-1], line.milliseconds[-1]) for line in lines])


def draw_error_speed(points: Sequence[Point], path: Path, *, title: str) -> None:
    """Tokens per second against the largest difference from the reference; the best are on the upper left."""
    with _figure(path, height=6, right=0.84) as figure:
        _add_title(figure, title, {point.precision for point in points})
        axes = figure.add_subplot()
        for point in points:
            dark, face = _colour(point.precision, True), _colour(point.precision, point.is_ours)
            place = [_shown_error(point)], [point.tokens_per_second]
            axes.plot(*place, "o", color=face, markeredgecolor=dark, markersize=9 if point.is_ours else 7, zorder=3)
        _set_error_axes(axes, points)
        _name_ends(figure, axes, points, [(_shown_error(point), point.tokens_per_second) for point in points])


@contextmanager
def _figure(path: Path, *, height: float, right: float = 1.0) -> Iterator[Figure]:
    """A figure, written to `path` in the end; what is `right` of this share of its width is left free for names.

    It has 72 dots an inch, so that its pixels are SVG's points.
    """
    with matplotlib.rc_context({**STYLE}):
        figure = Figure(figsize=(10, height), dpi=72, facecolor="white")
        figure.set_layout_engine("constrained", rect=(0, 0, right, 1))
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _add_title(figure: Figure, title: str, found: set[str]) -> None:
    """Write the title, and below it which colours are which precisions."""
    precisions = [precision for precision in COLOURS if precision in found]
    swatches: list[Any] = [tuple(Patch(color=colour) for colour in COLOURS[precision]) for precision in precisions]
    figure.legend(
        swatches,
        [f"{precision} (ours, others)" for precision in precisions],
        title=title,
        title_fontproperties={"size": 11, "weight": "bold"},
        alignment="left",
        loc="outside upper left",
        ncols=len(precisions),
        frameon=False,
        handlelength=2.4,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
    )


def _draw_bars(axes: Axes, rows: Sequence[Bar], *, room: int) -> None:
    """One workload's panel, with `room` for so many bars: name, bar and figure of each runner, the wrong ones last."""
    ordered = sorted(rows, key=lambda row: (row.is_wrong, -row.tokens_per_second))
    right = [row for row in ordered if not row.is_wrong]
    speeds = [row.tokens_per_second for row in right]
    axes.barh(range(len(right)), speeds, height=0.76, color=[_colour(row.precision, row.is_ours) for row in right])
    slowest, fastest = ([row.spread[end] for row in right] for end in (0, 1))
    axes.hlines(range(len(right)), slowest, fastest, color=INK, linewidth=1)
    for place, row in enumerate(ordered):
        _label_bar(axes, place, row)
    axes.set_xlim(0, max(fastest, default=1) * 1.1)
    axes.set_ylim(room - 0.4, -0.6)
    axes.set_title(rows[0].workload, loc="left", fontsize=9, fontweight="bold")
    axes.set_yticks(range(len(ordered)), [row.runner for row in ordered])
    for label, row in zip(axes.get_yticklabels(), ordered, strict=True):
        label.set_fontweight("bold" if row.is_ours else "normal")
    axes.tick_params(left=False, bottom=False, labelbottom=False)
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_bounds(-0.5, len(rows) - 0.5)


def _label_bar(axes: Axes, place: int, row: Bar) -> None:
    """Write the speed right of its bar, or that it counts for nothing."""
    axes.annotate(
        "wrong" if row.is_wrong else _rounded(row.tokens_per_second),
        (0 if row.is_wrong else max(row.tokens_per_second, row.spread[1]), place),
        (4, 0),
        textcoords="offset points",
        va="center",
        fontweight="bold" if row.is_ours else "normal",
        fontstyle="italic" if row.is_wrong else "normal",
    )


def _set_log_axes(axes: Axes, lines: Sequence[Line]) -> None:
    """Ticks at the lengths that were measured, and at 1, 2 and 5 times the powers of ten."""
    tokens = sorted({count for line in lines for count in line.tokens})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(tokens[0] * 0.9, tokens[-1] * 1.1)
    axes.xaxis.set_major_locator(FixedLocator(tokens))
    axes.yaxis.set_major_locator(FixedLocator([digit * 10.0**power for power in range(-3, 7) for digit in (1, 2, 5)]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(_grouped))
    axes.grid(axis="y", color=PALE, linewidth=0.6)
    axes.set_xlabel("tokens in the pair")
    axes.set_ylabel("median latency, milliseconds")


def _set_error_axes(axes: Axes, points: Sequence[Point]) -> None:
    """The whole range of errors, speed from zero, and the limit."""
    axes.set_xscale("log")
    axes.set_xlim(ERRORS[0] / 1.6, ERRORS[1] * 1.6)
    axes.set_ylim(0, max(point.tokens_per_second for point in points) * 1.12)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_power))
    axes.yaxis.set_major_formatter(FuncFormatter(_grouped))
    axes.grid(axis="y", color=PALE, linewidth=0.6)
    axes.axvline(EXACT, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    note = f"limit for fp32: {_power(EXACT)}"
    axes.annotate(note, (EXACT, 1), (4, -2), ("data", "axes fraction"), "offset points", va="top", color=SOFT)
    axes.set_xlabel("largest difference from the reference's scores")
    axes.set_ylabel("useful tokens per second on bulk")


def _name_ends(figure: Figure, axes: Axes, named: Sequence[Line | Point], ends: Sequence[Place]) -> None:
    """Write the runners' names in columns right of their ends; the layout is fixed first: they must not move it."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    places = [(float(x), float(y)) for x, y in axes.transData.transform(ends)]
    for column in into_columns([x for x, _ in places], [_text_width(axes, one) for one in named]):
        column.sort(key=lambda at: places[at][1])
        right = max(places[at][0] for at in column) + REACH
        wanted = [places[at][1] for at in column]
        heights = spread_apart(wanted, gap=NAME_HEIGHT, low=axes.bbox.y0 + 6, high=axes.bbox.y1 - 6)
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
            "color": _colour(of.precision, True),
            "linewidth": 0.5,
            "shrinkA": 1,
            "shrinkB": 5,
            "relpos": (0, 0.5),
        },
    )


def into_columns(ends: Sequence[float], widths: Sequence[float]) -> list[list[int]]:
    """Which names share a column: a column stands `REACH` right of its last end, and before the next column's ends."""
    columns: list[list[int]] = []
    limit = 0.0
    for at in sorted(range(len(ends)), key=lambda at: ends[at]):
        if not columns or ends[at] > limit:
            columns.append([])
        columns[-1].append(at)
        limit = ends[at] + REACH + max(widths[other] for other in columns[-1]) + 10
    return columns


def spread_apart(wanted: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """The heights nearest to the ascending `wanted` ones that are `gap` apart, from `low` to `high`."""
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


def _shown_error(point: Point) -> float:
    """Within `ERRORS`; no number at all is as bad as the largest."""
    return float(np.clip(np.nan_to_num(point.max_error, nan=ERRORS[1]), *ERRORS))


def _colour(precision: str, is_ours: bool) -> str:
    return COLOURS[precision][0 if is_ours else 1]


def _rounded(value: float) -> str:
    """Whole numbers, but three digits at least: 1,234 and 56.7."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _grouped(value: float, _: object = None) -> str:
    return f"{value:,.10g}"


def _power(value: float, _: object = None) -> str:
    """1e-4 for 0.0001, but 0.1 and 1."""
    return f"{value:.0e}".replace("e-0", "e-") if value < 0.05 else f"{value:g}"
