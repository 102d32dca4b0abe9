"""Score Parquet files, or a Ray Dataset, by a pool of actors on a Ray cluster. Ray retries what is lost.

An actor has one GPU, or a group of cores, and its own scorer; each node checks that it has the bundle that was meant.
Ray is imported when a function is called.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cappy_engine.activations import activated
from cappy_engine.bulk.entries import Reading, check_names
from cappy_engine.bulk.folders import Folder
from cappy_engine.bulk.packing import tables_for
from cappy_engine.bulk.ray_pool import (
    ClusterOptions,
    Pool,
    connected,
    import_ray,
    make_pool,
    node_name,
    quiet,
    translated,
)
from cappy_engine.bulk.row_options import FILE_WINDOW_PAIRS, Progress, Totals
from cappy_engine.bulk.runs import Say
from cappy_engine.bulk.slice_folder import (
    SliceDone,
    check_apart,
    count_try,
    describe_job,
    finish_folder,
    note_done,
    open_folder,
    read_done,
)
from cappy_engine.bulk.slices import Slice, cut_slices, score_slice
from cappy_engine.bulk.tasks import ScoreTask
from cappy_engine.bundle import EMBEDDED
from cappy_engine.checks import shown
from cappy_engine.columns import INSTRUCTION, RESPONSE
from cappy_engine.errors import CappyError, InvalidPair, ScoringError
from cappy_engine.nodes import BundleOfNodes
from cappy_engine.options import ScorerOptions
from cappy_engine.pairs import TooLong
from cappy_engine.scorer import Scorer

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

log = logging.getLogger(__name__)


class SliceActor:
    """Scores slices in a worker process of Ray, each into its file in the folder `job.out`."""

    def __init__(self, bundle: BundleOfNodes, job: Folder, rejected: Path | None) -> None:
        self._bundle = bundle
        self._scorer: Scorer | None = None
        self._job = job
        self._rejected = rejected

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score the slice that a row describes; an error is a part of the result, not raised: Ray would cut it up."""
        part = Slice(**row)
        try:
            self._scorer = self._scorer or self._bundle.open(node_name())
            count_try(self._job.out, part)
            done = note_done(self._job.out, part, score_slice(self._scorer, part, self._job, self._rejected))
        except (CappyError, OSError) as error:
            is_ours = isinstance(error, CappyError)
            done, problem = SliceDone(0, Totals().marked()), str(error) if is_ours else f"node {node_name()}: {error}"
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


def score_on_cluster(
    folder: Folder,
    bundle: str | Path = EMBEDDED,
    *,
    options: ScorerOptions | None = None,
    cluster: ClusterOptions | None = None,
    rejected: Path | None = None,
    resume: bool = False,
    say: Say = log.info,
    progress: Progress = lambda totals: None,
) -> Totals:
    """Score or rank Parquet files into a folder of Parquet files, on a Ray cluster.

        >>> folder = Folder(files_of_folder(Path("/data/samples")), Path("/data/scored"))
        >>> score_on_cluster(folder, "/models/cappy-bundle", cluster=ClusterOptions("10.0.0.1:6379")).pairs
        50000000

    All nodes must see the files, the folder and the bundle, at these paths. Files keep their names and rows their
    order; a large file becomes several. The folder is `<out>.partial` until every row is in it. Where a job was
    stopped, `resume` goes on with it. With `on_error="skip"` bad rows are listed in the folder `rejected`.

    Raises OutputError for an `out` that exists, CappyError for a bad row (with its file and number), for a node that
    lacks something, and where workers die again and again, and what `score_dataset` raises.
    """
    cluster = cluster or ClusterOptions()
    target = folder.out.absolute()
    rejected = None if rejected is None else rejected.absolute()
    if rejected is not None:
        check_apart(rejected, target)
    elif not folder.options.stops:
        raise ValueError("on a cluster bad rows are left out with a folder to list them in only; name it as rejected")
    slices = cut_slices(folder, cluster.slice_rows)
    ray = import_ray()
    with connected(ray, cluster.address), quiet(ray), translated(ray):
        pool = make_pool(ray, bundle, options or ScorerOptions(), cluster)
        nodes = BundleOfNodes.of(bundle, pool.options)
        with open_folder(target, describe_job(slices, nodes, folder, rejected), resume=resume) as unfinished:
            job = dataclasses.replace(folder, files=(), out=unfinished)
            done = {part.out: found for part in slices if (found := read_done(unfinished, part)) is not None}
            left = [part for part in slices if part.out not in done]
            say(f"{pool}: {len(left)} slices of rows" + (f", {len(done)} are done" if done else ""))
            totals = _sum(done)
            totals.bytes_total = sum(part.size for part in slices)
            if left:
                _score(ray, left, pool, (nodes, job, rejected), (done, totals, progress))
            finish_folder(unfinished, target, slices, done)
    return totals


def _score(
    ray: Any, slices: Sequence[Slice], pool: Pool, actor: tuple[BundleOfNodes, Folder, Path | None],
    counting: tuple[dict[str, SliceDone], Totals, Progress],
) -> None:  # fmt: skip
    """Have the actors score slices, and count each of them once."""
    done, totals, progress = counting
    items = ray.data.from_items([dataclasses.asdict(part) for part in slices], override_num_blocks=len(slices))
    for row in items.map(SliceActor, fn_constructor_args=actor, **pool.arguments(ray)).iter_rows():
        if row["problem"]:
            raise CappyError(row["problem"])
        found = SliceDone(row["bytes"], row["totals"])
        if row["out"] in done:
            continue
        done[row["out"]] = found
        totals.add(Totals.counted(found.totals))
        progress(totals)


def _sum(done: dict[str, SliceDone]) -> Totals:
    """Add up what earlier runs counted."""
    totals = Totals()
    for found in done.values():
        totals.add(Totals.going_on(found.totals))
    return totals


def score_dataset(
    dataset: ray.data.Dataset,
    bundle: str | Path = EMBEDDED,
    *,
    options: ScorerOptions | None = None,
    task: ScoreTask | None = None,
    too_long: TooLong = "truncate",
    cluster: ClusterOptions | None = None,
) -> ray.data.Dataset:
    """Add scores to the rows of a Ray Dataset; it is as lazy as the other steps of a dataset.

        >>> rows = ray.data.read_parquet("s3://bucket/samples", num_cpus=0.25)
        >>> score_dataset(rows, "/models/cappy-bundle").write_parquet("s3://bucket/scored", num_cpus=0.25)

    The bundle must lie at the same path on every node: its digest is checked there. Device "auto" is decided once for
    all actors: CUDA where the cluster has GPUs and the bundle a model for it, else the CPU. Raises BundleError,
    InstallationError, CappyError for columns that are not there or a cluster without room, and ValueError for GPUs by
    number: Ray gives each actor its own.
    """
    ray, task = import_ray(), task or ScoreTask()
    check_names(dataset.columns(), Reading(task), Path("the dataset"))
    pool = make_pool(ray, bundle, options or ScorerOptions(), cluster or ClusterOptions())
    return dataset.map_batches(
        TableActor,
        fn_constructor_args=(BundleOfNodes.of(bundle, pool.options), task, too_long),
        batch_format="pyarrow",
        batch_size=FILE_WINDOW_PAIRS,
        **pool.arguments(ray),
    )
