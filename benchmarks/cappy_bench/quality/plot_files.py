"""Write a picture whole or not at all, in the format of its ending. Knows nothing of what it shows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cappy_engine.bulk.output.output_file import open_output
from cappy_engine.bulk.output.places import check_output
from cappy_engine.errors import CappyError

ENDINGS = (".svg", ".png", ".pdf")
CAPPY, OTHER, LIMIT, INK, PALE = "#0072b2", "#8a8a8a", "#d55e00", "#222222", "#dddddd"
"""Colours that the colour-blind can tell apart, too: picked by Cappy, in another way, the best possible."""
STYLE: Mapping[Any, Any] = {
    "svg.hashsalt": "cappy",  # the same figures give the same file
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8,
    "text.parse_math": False,  # names are drawn as they are, with any $ in them
    "text.color": INK,
    "axes.edgecolor": OTHER,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
}


def check_path(path: Path, *, force: bool = False, inputs: Sequence[Path] = ()) -> None:
    """Raise CappyError if a plot cannot be written to `path`: better before hours of scoring than after.

    An existing file is replaced with `force` only, and none of the `inputs` ever is.

        >>> check_path(Path("rouge.svg"))
    """
    if path.suffix not in ENDINGS:
        raise CappyError(f"the plot {path} must end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    if not path.parent.is_dir():
        raise CappyError(f"the plot cannot be written: the folder {path.parent} does not exist")
    check_output(path, force=force, inputs=inputs)
    with contextlib.suppress(_Tried), open_output(path, force=force):
        raise _Tried


class _Tried(Exception):
    """Ends an attempt to write, of which nothing is left."""


def write_plot(draw: Callable[[Figure], object], path: Path, *, force: bool) -> None:
    """Write to `path` what `draw` draws into a figure; the path's ending says the format.

        >>> write_plot(lambda figure: figure.add_subplot(), Path("empty.svg"), force=False)

    Raises CappyError if it cannot be drawn or written.
    """
    check_path(path, force=force)
    try:
        with open_output(path, force=force) as file, matplotlib.rc_context(dict(STYLE)):
            figure = Figure(layout="constrained")
            FigureCanvasAgg(figure)
            draw(figure)
            metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix, {})
            figure.savefig(file, format=path.suffix[1:], dpi=150, metadata=metadata)
    except Exception as error:  # whatever Matplotlib raises: the figures were not at fault
        raise CappyError(f"the plot {path} cannot be drawn: {error!r:.300}") from error
