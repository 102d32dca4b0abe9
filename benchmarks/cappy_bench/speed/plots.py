"""Draws the report's pictures as SVG: values and a path in, a file out. Knows nothing of how they were measured.

Colour is the precision; our runners are dark, filled and bold. The same values give the same file, without dates and
random ids, and text stays text, so that a changed figure is a changed line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
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
from cappy_bench.speed.labels import name_ends
from cappy_bench.speed.markdown import number
from cappy_bench.speed.marks import COLOURS, GREY, INK, PALE, SOFT, Bar, Line, Point, colour_of
from cappy_engine.bulk.output.output_file import open_output

ERRORS = (1e-7, 1.0)
"""The range of errors that is shown; an error beyond is drawn at the edge."""
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


def draw_throughput(rows: Sequence[Bar], path: Path, *, title: str) -> None:
    """Draw bars of tokens per second, fastest first, in one panel per workload.

    The first workload's panel is the widest.

    >>> draw_throughput([Bar("bulk", "cappy", "fp32", True, 8754.0, (8700.0, 8900.0), False)], Path("a.svg"), title="A")
    """
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
    """Draw median latency against length, both logarithmic, with names at the ends.

    >>> draw_latency([Line("cappy", "fp32", True, [16, 32], [4.1, 6.3])], Path("b.svg"), title="B")
    """
    with _figure(path, height=6, right=0.81) as figure:
        _add_title(figure, title, {line.precision for line in lines})
        axes = figure.add_subplot()
        for line in lines:
            colour, front = colour_of(line.precision, line.is_ours), 3 if line.is_ours else 2
            width, dot = (2.4, 5) if line.is_ours else (1.3, 3)
            axes.plot(line.tokens, line.milliseconds, "o-", color=colour, linewidth=width, markersize=dot, zorder=front)
        _set_log_axes(axes, lines)
        name_ends(figure, axes, lines, [(line.tokens[-1], line.milliseconds[-1]) for line in lines])


def draw_error_speed(points: Sequence[Point], path: Path, *, title: str) -> None:
    """Draw tokens per second against the largest error; the best are on the upper left.

    >>> draw_error_speed([Point("cappy", "fp32", True, 1e-6, 8754.0)], Path("c.svg"), title="C")
    """
    with _figure(path, height=6, right=0.84) as figure:
        _add_title(figure, title, {point.precision for point in points})
        axes = figure.add_subplot()
        for point in points:
            dark, face = colour_of(point.precision, True), colour_of(point.precision, point.is_ours)
            place = [_shown_error(point)], [point.tokens_per_second]
            axes.plot(*place, "o", color=face, markeredgecolor=dark, markersize=9 if point.is_ours else 7, zorder=3)
        _set_error_axes(axes, points)
        name_ends(figure, axes, points, [(_shown_error(point), point.tokens_per_second) for point in points])


@contextmanager
def _figure(path: Path, *, height: float, right: float = 1.0) -> Iterator[Figure]:
    """Yield a figure, and write it to `path` in the end.

    Names go beyond the share `right` of its width. It has 72 dots an inch, so that its pixels are SVG's points.
    """
    with matplotlib.rc_context({**STYLE}):
        figure = Figure(figsize=(10, height), dpi=72, facecolor="white")
        figure.set_layout_engine("constrained", rect=(0, 0, right, 1))
        FigureCanvasAgg(figure)
        yield figure
        with open_output(path, force=True) as file:
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


def _add_title(figure: Figure, title: str, found: set[str]) -> None:
    """Write the title, and below it the colours of the precisions."""
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
    """Draw one workload's panel, with `room` for so many bars; the wrong ones are last."""
    ordered = sorted(rows, key=lambda row: (row.is_wrong, -row.tokens_per_second))
    right = [row for row in ordered if not row.is_wrong]
    speeds = [row.tokens_per_second for row in right]
    axes.barh(range(len(right)), speeds, height=0.76, color=[colour_of(row.precision, row.is_ours) for row in right])
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
        "wrong" if row.is_wrong else number(row.tokens_per_second),
        (0 if row.is_wrong else max(row.tokens_per_second, row.spread[1]), place),
        (4, 0),
        textcoords="offset points",
        va="center",
        fontweight="bold" if row.is_ours else "normal",
        fontstyle="italic" if row.is_wrong else "normal",
    )


def _set_log_axes(axes: Axes, lines: Sequence[Line]) -> None:
    """Set ticks at the measured lengths, and at 1, 2, 5, 10 and so on."""
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
    """Show the whole range of errors, speed from zero, and the limit."""
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


def _shown_error(point: Point) -> float:
    """Keep the error within `ERRORS`; NaN is as bad as the largest."""
    return float(np.clip(np.nan_to_num(point.max_error, nan=ERRORS[1]), *ERRORS))


def _grouped(value: float, _: object = None) -> str:
    return f"{value:,.10g}"


def _power(value: float, _: object = None) -> str:
    """Write 1e-4 for 0.0001, but 0.1 and 1."""
    return f"{value:.0e}".replace("e-0", "e-") if value < 0.05 else f"{value:g}"
