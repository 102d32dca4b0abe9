"""Score Parquet files or a Ray Dataset, by actors on a Ray cluster.

Ray retries what is lost; `slice_folder.count_try` ends a job that lost the same slice too often. An actor has one GPU,
or a group of cores, and its own scorer; each node checks that it has the bundle that was meant. Ray is imported when a
function is called.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cappy_engine.bulk.folders import Folder
from cappy_engine.bulk.formats.entries import Reading, check_names
from cappy_engine.bulk.ray.pool import (
    ClusterOptions,
    Pool,
    connected,
    import_ray,
    make_pool,
    quiet,
    translated,
)
from cappy_engine.bulk.ray.slice_folder import (
    SliceDone,
    check_folders_apart,
    describe_job,
    finish_folder,
    open_folder,
    read_done,
)
from cappy_engine.bulk.ray.slices import Slice, cut_slices
from cappy_engine.bulk.row_options import FILE_WINDOW_PAIRS
from cappy_engine.bulk.runs import Say
from cappy_engine.bulk.tasks import ScoreTask
from cappy_engine.bulk.totals import Progress, Totals
from cappy_engine.bundle import EMBEDDED
from cappy_engine.checks import check_word
from cappy_engine.errors import CappyError
from cappy_engine.nodes import BundleOfNodes
from cappy_engine.options import ScorerOptions
from cappy_engine.pairs import TOO_LONG, TooLong

if TYPE_CHECKING:
    import ray.data
from cappy_engine.bulk.ray.actors import SliceActor, TableActor

log = logging.getLogger(__name__)


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

    Raises OutputError for an `out` that exists, and what `score_dataset` raises. Raises CappyError for a bad row (with
    its file and number), a node that lacks something, and workers that die again and again.
    """
    cluster = cluster or ClusterOptions()
    target = folder.out.absolute()
    rejected = None if rejected is None else rejected.absolute()
    if rejected is not None:
        check_folders_apart(rejected, target)
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
            for out, found in _scored(ray, left, pool, (nodes, job, rejected)):
                if out not in done:  # else Ray did it twice
                    done[out] = found
                    totals.add(Totals.counted(found.totals))
                    progress(totals)
            finish_folder(unfinished, target, slices, done)
    return totals


def _scored(
    ray: Any, slices: Sequence[Slice], pool: Pool, actor: tuple[BundleOfNodes, Folder, Path | None]
) -> Iterator[tuple[str, SliceDone]]:
    """Have actors score slices; yields the name of each, and what was counted. Raises CappyError."""
    if not slices:
        return
    items = ray.data.from_items([dataclasses.asdict(part) for part in slices], override_num_blocks=len(slices))
    for row in items.map(SliceActor, fn_constructor_args=actor, **pool.arguments(ray)).iter_rows():
        if row["problem"]:
            raise CappyError(row["problem"])
        yield row["out"], SliceDone(row["bytes"], row["totals"])


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
    """Add scores to the rows of a Ray Dataset. It is as lazy as the other steps of a dataset.

        >>> rows = ray.data.read_parquet("s3://bucket/samples")
        >>> score_dataset(rows, "/models/cappy-bundle").write_parquet("s3://bucket/scored")

    The bundle must lie at the same path on every node: its digest is checked there. Device "auto" is decided once for
    all actors: CUDA where the cluster has GPUs and the bundle a model for it, else the CPU. Raises BundleError,
    InstallationError, CappyError for columns that are not there or a cluster without room, and ValueError for GPUs by
    number: Ray gives each actor its own.
    """
    check_word("too_long", too_long, TOO_LONG)
    ray, task = import_ray(), task or ScoreTask()
    check_names(dataset.columns(), Reading(task), Path("the dataset"))
    pool = make_pool(ray, bundle, options or ScorerOptions(), cluster or ClusterOptions(), leaves_core=True)
    return dataset.map_batches(
        TableActor,
        fn_constructor_args=(BundleOfNodes.of(bundle, pool.options), task, too_long),
        batch_format="pyarrow",
        batch_size=FILE_WINDOW_PAIRS,
        **pool.arguments(ray),
    )
