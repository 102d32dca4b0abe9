"""Write a file in steps that are marked, and go on behind the last mark.

OUT.partial and the rejects grow, window by window; OUT.progress.json says how far they are, and where in the input the
next window begins. It is replaced once both are on the disk. A run that goes on first removes what was written behind
that mark, so every row is there once. Knows nothing of rows.

The mark says what a run that goes on finds, in this order:

- `bytes` and `rejected_bytes`: the rows so far. What is behind them is cut off.
- `making`: the complete file is made beside the partial one, where the two differ (Parquet). It is made anew.
- `made`, the complete file's fingerprint: only the names are missing. The rejects get theirs first, then OUT.
- no mark: OUT has its name, and the run is forgotten.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from cappy_engine import storage
from cappy_engine.bulk.formats.compression import packer
from cappy_engine.bulk.formats.file_format import Packing, packing_of
from cappy_engine.bulk.output import replacement
from cappy_engine.bulk.output.places import Input
from cappy_engine.bulk.resume.identity import fingerprint, fingerprint_of
from cappy_engine.bulk.resume.names import OTHER_NAME, Names, check_rejects, find_names, find_rejects, find_run
from cappy_engine.bulk.resume.partial_file import Growing, open_growing
from cappy_engine.bulk.resume.settings import changes
from cappy_engine.bulk.resume.side_files import in_the_way, mark, read_mark
from cappy_engine.errors import CappyError, InvalidLine, OutputError, reason_of

Say = Callable[[str], object]
Make = Callable[[BinaryIO, int, BinaryIO], None]
"""Makes the complete file of the rows that were written: from an open file and its size, into another one."""


@dataclass(frozen=True)
class Target:
    """The files that a run writes: `out`, and `rejects` if bad rows are listed. Both are packed as their names say.

    `force` replaces what is there; `resume` goes on with a run that was stopped. `done` is called with the run's totals
    and settings when the file has its name, before the run is forgotten. `way_out` is the advice where `out` is taken.
    """

    out: Path
    rejects: Path | None = None
    resume: bool = False
    force: bool = False
    inputs: Sequence[Input] = ()
    way_out: str = OTHER_NAME
    done: Callable[[Any, Mapping[str, Any]], object] = lambda totals, settings: None


@dataclass
class Run:
    """An open run; `open_run` makes one. `marked` is what was marked last, empty in a new run.

    A run goes on only with the same `settings`. `make` makes the complete file of the partial one, if they differ.
    `is_lost` once something else changed what it wrote.
    """

    growing: Growing
    rejects: Growing | None
    marked: dict[str, Any]
    settings: Mapping[str, Any]
    make: Make | None = None
    is_lost: bool = False
    _sizes: list[int] = field(default_factory=lambda: [0, 0])
    _packing: Packing = ""
    _packed: Callable[[bytes], bytes] = bytes

    def commit(self, rows: bytes, rejected: bytes, position: Mapping[str, Any]) -> None:
        """Write rows and rejects to the disk, then that the run is at `position`."""
        rejected = self._packed(rejected) if rejected else b""
        self._check_written()
        self.write(rows, rejected)
        self._sizes[0] += len(rows)
        self._sizes[1] += len(rejected) if self.rejects is not None else 0
        self.marked = {"bytes": self._sizes[0], "rejected_bytes": self._sizes[1], **position, **self._rejects_named()}
        mark(self.growing.names, self.marked)

    def _check_written(self) -> None:
        """Raise OutputError if something else moved, cut or wrote to what this run writes."""
        self.is_lost = True
        self.growing.check_written(self._sizes[0])
        if self.rejects is not None:
            self.rejects.check_written(self._sizes[1])
        self.is_lost = False

    def write(self, rows: bytes, rejected: bytes = b"") -> None:
        """Write what a run that goes on writes again, both as they are."""
        if rows:
            self.growing.append(rows)
        if rejected and self.rejects is not None:
            self.rejects.append(rejected)

    def open_rejects(self, target: Target, stack: contextlib.ExitStack) -> None:
        """Open the file of rejects, a new one unless this run has one.

        Raises OutputError where this run has another one, or the file is of another run.
        """
        names = None if target.rejects is None else find_names(target.rejects, force=True, inputs=target.inputs)
        packing = packing_of(target.rejects or "")
        self._check_same_rejects(names, packing)
        if target.rejects is None or names is None:
            return
        self._packing, self._packed = packing, packer(packing, target.rejects)
        had_rejects, is_there = "rejects" in self.marked, os.path.lexists(names.partial)
        if had_rejects and not is_there:
            if self.marked.get("made") and names.target.is_file():
                return  # it has its name already
            if self.marked.get("rejected_bytes"):
                raise OutputError(f"{names.partial} is missing; restore it, or start anew")
        is_ours = is_there and (had_rejects or names.is_partial_empty)
        if is_there and not is_ours and not target.force:
            raise OutputError(f"{names.partial} holds the bad rows of another run; {target.way_out}")
        names = find_rejects(target.rejects, resume=is_ours, force=target.force, inputs=target.inputs)
        self.rejects = stack.enter_context(open_growing(names, resume=is_ours))
        if self.marked and not had_rejects:
            self.marked |= self._rejects_named()
            mark(self.growing.names, self.marked)

    def _check_same_rejects(self, names: Names | None, packing: Packing) -> None:
        """Raise OutputError if this run has another file of rejects. One without any may get one."""
        if "rejects" not in self.marked:
            return
        before = self.marked["rejects"]
        if names is None or (before, self.marked.get("rejects_packing", "")) != (self._from_out(names), packing):
            path = os.path.normpath(self.growing.names.target.parent / before)
            raise OutputError(f"the bad rows of this run are in {path}; give it as --rejects, or start anew")

    def _rejects_named(self) -> dict[str, str]:
        """Name the file of rejects from the output on: both may be moved together."""
        if self.rejects is None:
            return {}
        packing = {"rejects_packing": self._packing} if self._packing else {}
        return {"rejects": self._from_out(self.rejects.names), **packing}

    def _from_out(self, names: Names) -> str:
        try:
            return os.path.relpath(names.target, self.growing.names.target.parent)
        except ValueError:  # on another drive of Windows
            return str(names.target)

    @property
    def size(self) -> int:
        """Count the bytes of rows that are marked."""
        return self._sizes[0]

    def go_back(self) -> None:
        """Cut off what was written behind the mark."""
        self._sizes = [int(self.marked.get("bytes", 0)), int(self.marked.get("rejected_bytes", 0))]
        self.growing.cut(self._sizes[0])
        if self.rejects is not None:
            self.rejects.cut(self._sizes[1])

    @functools.cached_property
    def is_made(self) -> bool:
        """True if the partial file is complete already, and only its name is missing."""
        return "made" in self.marked and self.marked["made"] == fingerprint_of(self.growing.file)

    def finish(self) -> None:
        """Give the complete files their names; `forget` the run then."""
        growing = self.growing
        if not self.is_made:
            self._check_written()
            if self.make is not None:
                growing = self._remade(self.make)
            self.marked |= {"made": fingerprint_of(growing.file), "settings": self.settings}
            mark(growing.names, self.marked)
            if growing is not self.growing:
                growing.names.made.replace(growing.names.partial)
        growing.check_written(growing.size)
        if self.rejects is not None:
            if not self.rejects.size:  # a packed file has a packed part also if there are no bad rows
                self.write(b"", self._packed(b""))
            self.rejects.take_name()
        growing.finish()
        if growing is not self.growing:
            growing.file.close()

    def check_made(self) -> None:
        """Raise OutputError if another's file has the name of the made one."""
        path = self.growing.names.made
        if self.make is not None and not self.marked.get("making") and os.path.lexists(path):
            raise in_the_way(path)

    def _remade(self, make: Make) -> Growing:
        """Make the complete file beside the partial one, whose lock still keeps others away."""
        names = self.growing.names
        self.check_made()
        is_ours = self.marked.get("making")
        flags = os.O_RDWR | os.O_CREAT | (os.O_TRUNC if is_ours else os.O_EXCL) | getattr(os, "O_NOFOLLOW", 0)
        self.marked["making"] = True  # before it is there: it may be written over by a run that goes on
        mark(names, self.marked)
        try:
            file = cast(BinaryIO, os.fdopen(os.open(names.made, flags, 0o666), "r+b"))
            storage.lock(file.fileno())
            is_written_over = replacement.prepare(file.fileno(), names.target, names.status)
            make(self.growing.file, self.size, file)
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            way_on = f"go on with {names.way_on} once that is mended"
            raise OutputError(f"{names.made} cannot be written: {reason_of(error)}; {way_on}") from error
        return dataclasses.replace(self.growing, file=file, is_written_over=is_written_over)


@contextlib.contextmanager
def open_run(
    target: Target, settings: Mapping[str, Any], origin: Mapping[str, Any], say: Say, make: Make | None = None
) -> Iterator[Run]:
    """Begin a run, or go on with one that has the same settings. Another `origin` is said.

        >>> with open_run(Target(Path("scored.jsonl")), {"task": "score"}, {}, print) as run:
        ...     run.commit(b"{}\\n", b"", {"row": 1})
        ...     run.finish()

    With `resume`, a run begins anew where nothing is there. After an error what was written is kept, to go on with,
    unless that is nothing. Raises OutputError.
    """
    if target.rejects is not None:
        check_rejects(target.rejects, target.out)
    names, is_there = find_run(
        target.out, resume=target.resume, force=target.force, inputs=target.inputs, way_out=target.way_out
    )
    with contextlib.ExitStack() as stack:
        growing = stack.enter_context(open_growing(names, resume=is_there))
        marked = read_mark(names) if is_there else {}
        if marked or growing.size:
            growing.check_settings(settings, origin, say)
        else:  # new, or killed before it had written anything
            growing.begin(settings, origin)
        run = Run(growing, None, marked, settings, make)
        tell: Say = _say_nothing  # the error of what cannot begin says what to do
        try:
            run.check_made()
            if not run.is_made:
                growing.check_holds(int(marked.get("bytes", 0)))
            run.open_rejects(target, stack)
            if not run.is_made:
                run.go_back()
            tell = say
            yield run
        except BaseException as error:
            _leave(run, error, tell)
            raise


def finished(target: Target, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Give the mark of a run that was stopped when its file had its name. Empty if there is none.

        >>> finished(Target(Path("new.jsonl")), {"task": "score"})
        {}

    Raises OutputError if the run had other settings.
    """
    names = Names(target.out)
    if os.path.lexists(names.partial):
        return {}
    marked: dict[str, Any] = {}
    with contextlib.suppress(OSError, OutputError):  # a file of another kind is told of where a run begins
        found = read_mark(names)
        if "made" in found and fingerprint(target.out) == found["made"]:  # an error, if it is gone
            marked = found
    changed = changes(marked.get("settings", {}), settings) if marked else ""
    if changed and not target.force:
        raise OutputError(f"{target.out} was written by another run ({changed}); {target.way_out}")
    return {} if changed else marked


def _say_nothing(told: str) -> None:
    """Take what a user need not know."""


def _leave(run: Run, error: BaseException, say: Say) -> None:
    """Leave nothing of a run that wrote nothing; else say where it is. Say nothing of one that is complete."""
    growing, names = run.growing, run.growing.names
    is_there = growing.is_there or (run.marked.get("made") and os.path.lexists(names.partial))
    if run.is_lost and not isinstance(error, OutputError):
        say(f"{names.partial}, or the file of bad rows, was changed by something else; start anew with --force")
    if run.is_lost or not is_there:
        return
    if growing.size or run.marked.get("rejected_bytes"):
        is_input_bad = type(error) is CappyError  # a mended one is another, with which no run goes on
        leaves_out = " --rejects NEWFILE, which leaves bad rows out" if isinstance(error, InvalidLine) else ""
        advice = "" if is_input_bad else f"; go on with {names.way_on}{leaves_out}"
        say(f"what was written before this is in {names.partial}{advice}")
        return
    if run.marked.get("making"):
        names.made.unlink(missing_ok=True)
    growing.remove()
    if run.rejects is not None:
        run.rejects.names.partial.unlink(missing_ok=True)
