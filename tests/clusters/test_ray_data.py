"""A job on a cluster gives what one process gives, also where a worker is killed while it scores."""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from cappy_engine.activations import ACTIVATIONS, Activation
from cappy_engine.bulk.folders import Folder, files_of_folder
from cappy_engine.bulk.ray.cluster import score_dataset, score_on_cluster
from cappy_engine.bulk.ray.pool import VARIABLES, ClusterOptions, connected, make_pool
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.bulk.tasks import ScoreTask
from cappy_engine.bulk.totals import Totals
from cappy_engine.bundle import EMBEDDED
from cappy_engine.cli.main import main
from cappy_engine.errors import BundleError, CappyError
from cappy_engine.nodes import BundleOfNodes
from cappy_engine.options import ScorerOptions
from cappy_engine.scorer import Scorer
from tests.clusters.conftest import FILES, ROWS, check_same, children_of, command, done_in, kill_when

pytestmark = pytest.mark.slow


def raylets(cluster: Any) -> set[int]:
    """List the processes that start those of the workers."""
    return {
        process.process.pid for node in cluster.list_all_nodes() for process in node.all_processes.get("raylet", [])
    }


def test_where_no_cluster_answers_a_command_says_so_and_what_to_do(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not ray.is_initialized(), "this test stands before those that connect this process"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    arguments = ["score", str(samples), "-o", str(tmp_path / "scored"), "--ray"]
    assert main([*arguments, address]) == 1
    message = f"cappy score: no Ray cluster answers at '{address}' (Connection refused); is Ray running there?"
    assert message in capsys.readouterr().err
    monkeypatch.setenv("RAY_ADDRESS", address)  # of a cluster that ended
    assert main(arguments) == 1
    assert message in capsys.readouterr().err
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    note = tmp_path / "ray" / "ray_current_cluster"
    note.parent.mkdir()
    note.write_text(address)
    with pytest.raises(CappyError, match="no Ray cluster answers"), connected(ray, "auto"):
        pass
    assert not set(VARIABLES) & set(os.environ)


def test_a_killed_job_goes_on_and_a_killed_worker_loses_and_repeats_nothing(
    cluster: Any, samples: Path, local: Path, tmp_path: Path
) -> None:
    out, partial = tmp_path / "scored", tmp_path / "scored.partial"
    arguments = ("score", samples, "-o", out, "--ray", cluster.address)
    first = command(*arguments)
    kill_when(lambda: done_in(partial) >= 2, lambda: first.pid, first)
    first.communicate()
    time.sleep(1)  # what it began ends with it
    kept = done_in(partial)
    assert 2 <= kept < FILES
    second = command(*arguments, "--resume")
    killed = kill_when(
        lambda: done_in(partial) >= kept + 4 and bool(children_of(raylets(cluster))),
        lambda: children_of(raylets(cluster))[0],
        second,
    )
    before = done_in(partial)
    _, told = second.communicate(timeout=300)
    assert second.returncode == 0, told
    assert before < FILES, "the worker was killed when all was done"
    assert not Path(f"/proc/{killed}").exists()
    assert f"{ROWS * (FILES - kept)} pairs scored" in told
    assert f", {ROWS * kept} before, " in told
    assert "Traceback" not in told
    check_same(samples, out, local)
    assert not partial.exists()


def test_bad_rows_are_listed_and_all_others_scored(connection: None, samples: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["Yes", None, "No", "Yes", None]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"instruction": ["Is it?"] * 5, "response": texts}), tmp_path / "in" / "a.parquet")
    files = files_of_folder(tmp_path / "in")
    cluster = ClusterOptions(slice_rows=2)
    # Slices are scored at once: either may be the first to have its bad row found.
    with pytest.raises(CappyError, match=r"a.parquet, row (2|5): response must be a str, got NoneType None$"):
        score_on_cluster(Folder(files, tmp_path / "out"), cluster=cluster)
    seen: list[Totals] = []
    folder = Folder(files, tmp_path / "out", options=RowOptions(on_error="skip"))
    totals = score_on_cluster(
        folder, cluster=cluster, rejected=tmp_path / "bad", resume=True, progress=lambda found: seen.append(found)
    )
    assert (totals.pairs, totals.refused) == (3, 2)
    assert seen
    found = [len(pq.read_table(tmp_path / "out" / f"a-0000{number}.parquet")) for number in range(3)]
    assert found == [1, 2, 0]
    listed = sorted(path.name for path in (tmp_path / "bad").iterdir())
    assert listed == ["a-00000.parquet.rejects.jsonl", "a-00002.parquet.rejects.jsonl"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_dataset_gets_scores_beside_its_columns(connection: None, activation: Activation) -> None:
    texts = ["Yes", "No"]
    rows = [{"id": place, "prompt": "Is the sky blue?", "response": text} for place, text in enumerate(texts)]
    task = ScoreTask("prompt", score_field="reward", activation=activation)
    dataset = score_dataset(ray.data.from_items(rows), task=task, cluster=ClusterOptions(actors=1))
    with Scorer.open() as scorer:
        expected = scorer.score([("Is the sky blue?", text) for text in texts], activation=activation)
    for row in dataset.take_all():
        assert row["reward"] == pytest.approx(expected[row["id"]], abs=1e-5)
        assert row["reward_truncated"] is False
    with pytest.raises(CappyError, match="the dataset has no column 'instruction'; found 'id', 'prompt', 'response'"):
        score_dataset(ray.data.from_items(rows))
    with pytest.raises(ValueError, match="unknown too_long 'typo'"):
        score_dataset(ray.data.from_items(rows), too_long="typo")  # type: ignore[arg-type]


def test_a_dataset_is_read_and_written_as_ray_does_it(connection: None, samples: Path, tmp_path: Path) -> None:
    """Reading and writing take a whole core, which actors on all cores would keep for ever."""
    import pyarrow.parquet as pq

    file = samples / "00.parquet"
    rows = score_dataset(ray.data.read_parquet(str(file)))
    work = threading.Thread(target=rows.write_parquet, args=[str(tmp_path / "scored")], daemon=True)
    work.start()
    work.join(300)
    assert not work.is_alive(), "Ray waits for a core"
    scored = pq.read_table(tmp_path / "scored")
    assert sorted(scored["id"].to_pylist()) == sorted(pq.read_table(file)["id"].to_pylist())
    assert scored["score"].null_count == 0


def test_a_node_with_another_bundle_is_refused(
    connection: None, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meant = dataclasses.replace(BundleOfNodes.of(EMBEDDED, ScorerOptions(threads=1)), digest="0" * 64)
    monkeypatch.setattr(BundleOfNodes, "of", lambda bundle, options: meant)
    node = rf"node {socket.gethostname()} \([\d.]+\)"
    with pytest.raises(CappyError, match=rf"^{node} has another bundle at .*; copy the job's bundle to every node$"):
        score_on_cluster(Folder(files_of_folder(samples), tmp_path / "scored"))


def test_a_cluster_without_room_is_told(connection: None, samples: Path, tmp_path: Path) -> None:
    folder = Folder(files_of_folder(samples), tmp_path / "scored")
    nodes = "its nodes have 1 core and 0 GPUs, 1 core and 0 GPUs"
    with pytest.raises(CappyError, match=f"no node of this Ray cluster has 64 cores for an actor; {nodes}"):
        score_on_cluster(folder, options=ScorerOptions(threads=64))
    with pytest.raises(CappyError, match=f"has 1 core and a GPU for an actor; {nodes}"):
        score_on_cluster(folder, options=ScorerOptions(device="cuda"))
    with pytest.raises(BundleError):
        score_on_cluster(folder, tmp_path / "no-bundle")
    assert not (tmp_path / "scored.partial").exists()


def test_actors_share_the_cores_of_a_node_with_several_gpus(cluster: Any, connection: None) -> None:
    """Ray takes our word for what a node has."""
    node = cluster.add_node(num_cpus=5, num_gpus=2)
    try:
        wanted = [(None, None), (3, None), (1, None), (1, 1)]
        pools = [
            make_pool(ray, EMBEDDED, ScorerOptions(device="cuda", threads=threads), ClusterOptions(actors=actors))
            for threads, actors in wanted
        ]
        assert [(pool.cores, pool.gpus, pool.actors) for pool in pools] == [(2, 1, 2), (3, 1, 1), (1, 1, 2), (1, 1, 1)]
        with pytest.raises(CappyError, match=r"has 6 cores and a GPU for an actor; .* 5 cores and 2 GPUs"):
            make_pool(ray, EMBEDDED, ScorerOptions(device="cuda", threads=6), ClusterOptions())
    finally:
        cluster.remove_node(node)
