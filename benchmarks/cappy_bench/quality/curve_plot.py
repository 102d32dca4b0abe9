"""Draw logs of `cappy adapt`: loss, the gradient's norm and speed by step. Knows nothing of how they came about."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cappy_bench.quality.plot_files import CAPPY, LIMIT, OTHER, PALE, write_plot
from cappy_engine.errors import CappyError
from cappy_export.adaptation.log import LOG

COLOURS = (CAPPY, LIMIT, "#009e73", "#cc79a7", OTHER)
PANELS = {"loss": "loss", "gradient_norm": "gradient norm", "tokens_per_second": "tokens a second"}

Entries = Sequence[Mapping[str, Any]]
log = logging.getLogger(__name__)


def read_log(source: Path, *, say: Callable[[str], object] = log.info) -> list[dict[str, Any]]:
    """Read the log in a file, or in the folder of a training.

    >>> read_log(Path("my-cappy"))[0]["step"]
    0

    A training that was killed may leave half a line at the end. That line is left out, and `say` tells it.
    Raises CappyError for a training without a log.
    """
    path = source / LOG if source.is_dir() else source
    try:
        lines = path.read_bytes().splitlines(keepends=True)
        if len(lines) > 1 and _is_cut(lines[-1]):
            say(f"leaving out the last line of {path}: it is not complete, as where a training was stopped")
            del lines[-1]
        entries = [json.loads(line) for line in lines]
        if not entries or not all(isinstance(entry["step"], int) for entry in entries):
            raise ValueError("it has no steps")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CappyError(f"{path} is not a log of cappy adapt: {error}") from error
    return entries


def _is_cut(line: bytes) -> bool:
    """Tell if the last line of a log was not written to its end: neither its JSON nor its line break is there."""
    if line.endswith(b"\n"):
        return False
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


def names_of(sources: Sequence[Path]) -> list[str]:
    """Name logs for the plot: by their folder, or by the whole path where that is not enough.

    >>> names_of([Path("runs/my-cappy"), Path("other/log.jsonl")])
    ['my-cappy', 'other']
    """
    short = [(path.parent if path.name == LOG else path).name for path in sources]
    return [name if name and short.count(name) == 1 else str(path) for name, path in zip(short, sources, strict=True)]


def plot_curves(logs: Mapping[str, Entries], path: Path, *, force: bool) -> None:
    """Draw logs by name into `path`, whose ending says the format.

    >>> plot_curves({"my-cappy": read_log(Path("my-cappy"))}, Path("curve.svg"), force=False)

    Raises CappyError if it cannot be drawn or written.
    """
    write_plot(partial(_draw, logs), path, force=force)


def _draw(logs: Mapping[str, Entries], figure: Figure) -> None:
    figure.set_size_inches(7.5, 5)
    panels = figure.subplots(len(PANELS), 1, height_ratios=[2, 1, 1], sharex=True)
    for axes, (name, label) in zip(panels, PANELS.items(), strict=True):
        for place, (title, entries) in enumerate(logs.items()):
            _draw_line(axes, entries, name, title, COLOURS[place % len(COLOURS)])
        axes.set_ylabel(label)
        axes.grid(color=PALE, linewidth=0.5)
        axes.set_axisbelow(True)
    panels[0].set_ylim(bottom=0)
    panels[0].legend(frameon=False, ncols=2)
    panels[-1].set_ylim(bottom=0)
    panels[-1].set_xlabel("step")


def _draw_line(axes: Axes, entries: Entries, name: str, title: str, colour: str) -> None:
    """Draw one figure of the steps; with the loss, that on held-out examples, and that of the best constant."""
    steps = [entry for entry in entries if "gradient_norm" in entry]
    held_out = [entry for entry in entries if "held_out_loss" in entry]
    label = None if held_out else title
    axes.plot([entry["step"] for entry in steps], [entry[name] for entry in steps], color=colour, lw=0.8, label=label)
    if name != "loss" or not held_out:
        return
    places, values = zip(*((entry["step"], entry["held_out_loss"]) for entry in held_out), strict=True)
    axes.plot(places, values, "o-", color=colour, markersize=4, label=f"{title}, held out")
    constant = held_out[0].get("constant_loss")
    if constant is not None:
        axes.axhline(constant, color=colour, linewidth=0.8, linestyle=":", label=f"{title}, the best constant")
