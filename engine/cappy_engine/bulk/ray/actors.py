"""Score slices and tables in worker processes of Ray, each with its own scorer. Imports no Ray."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cappy_engine.activations import activated
from cappy_engine.bulk.folders import Folder
from cappy_engine.bulk.formats.compression import tables_for
from cappy_engine.bulk.ray.pool import (
    node_name,
)
from cappy_engine.bulk.ray.slice_folder import (
    SliceDone,
    count_try,
    note_done,
)
from cappy_engine.bulk.ray.slices import Slice, score_slice
from cappy_engine.bulk.tasks import ScoreTask
from cappy_engine.bulk.totals import Totals
from cappy_engine.checks import shown
from cappy_engine.columns import INSTRUCTION, RESPONSE
from cappy_engine.errors import CappyError, InvalidPair, ScoringError, message_of
from cappy_engine.nodes import BundleOfNodes
from cappy_engine.pairs import TooLong
from cappy_engine.scorer import Scorer

if TYPE_CHECKING:
    import pyarrow as pa


class SliceActor:
    """Scores slices in a worker process of Ray, each into its file in `job.out`."""

    def __init__(self, bundle: BundleOfNodes, job: Folder, rejected: Path | None) -> None:
        self._bundle = bundle
        self._scorer: Scorer | None = None
        self._job = job
        self._rejected = rejected

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score the slice that a row describes. An error is a part of the result: Ray would cut it up."""
        part = Slice(**row)
        try:
            self._scorer = self._scorer or self._bundle.open(node_name())
            count_try(self._job.out, part)
            done = note_done(self._job.out, part, score_slice(self._scorer, part, self._job, self._rejected))
        except (CappyError, OSError) as error:
            done, problem = SliceDone(0, Totals().marked()), message_of(error)
            if isinstance(error, OSError):
                problem = f"node {node_name()}: {problem}"
        else:
            problem = ""
        return {"out": part.out, "problem": problem, **dataclasses.asdict(done)}


class TableActor:
    """Scores tables of rows in a worker process of Ray."""

    def __init__(self, bundle: BundleOfNodes, task: ScoreTask, too_long: TooLong) -> None:
        self._scorer = bundle.open(node_name())
        self._task = task
        self._too_long = too_long

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Add scores to rows. Raises CappyError, which shows the other columns of the row that is at fault."""
        task = self._task
        pairs = {INSTRUCTION: rows[task.instruction_column], RESPONSE: rows[task.response_column]}
        try:
            found = self._scorer.score_pairs(pairs, too_long=self._too_long)
        except (InvalidPair, ScoringError) as error:
            if error.index is None:  # the device failed, not a pair
                raise
            row = rows.drop_columns(list(task.texts)).slice(error.index, 1)
            raise CappyError(
                f"a row cannot be scored: {error.problem}; its other columns: {shown(row.to_pylist())}"
            ) from error
        scored = zip(activated(found.scores, task.activation).tolist(), found.truncated.tolist(), strict=True)
        added = [dict(zip(task.added, values, strict=True)) for values in scored]
        return tables_for("a Ray Dataset").with_columns(rows, task.added, added)
