"""How many actors a cluster gets, and what they leave of its cores."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cappy_engine.bulk.ray.pool import ClusterOptions, make_pool
from cappy_engine.bundle import EMBEDDED
from cappy_engine.options import ScorerOptions


def cluster_of(*nodes: tuple[int, int]) -> Any:
    """Make what Ray tells of nodes with so many cores and GPUs."""
    found = [{"Alive": True, "Resources": {"CPU": float(cpus), "GPU": float(gpus)}} for cpus, gpus in nodes]
    return SimpleNamespace(nodes=lambda: found)


@pytest.mark.parametrize(
    ("nodes", "threads", "device", "actors", "asked"),
    [
        ([(2, 0)], None, "cpu", 1, 1.0),
        ([(1, 0), (1, 0)], None, "cpu", 1, 0.75),
        ([(1, 0)], None, "cpu", 1, 0.0),
        ([(2, 0)], 1, "cpu", 2, 0.5),
        ([(3, 0)], 1, "cpu", 3, 0.6666),
        ([(4, 0)], 1, "cpu", 4, 0.75),
        ([(8, 0), (8, 0)], None, "cpu", 2, 7.0),
        ([(16, 0), (16, 0)], None, "cpu", 4, 7.5),
        ([(14, 0)], None, "cpu", 1, 7.75),
        ([(64, 8)], 1, "cuda", 8, 0.75),
        ([(4, 4)], None, "cuda", 4, 0.75),
        ([(2, 1), (2, 0)], None, "cuda", 1, 1.75),
    ],
)
def test_actors_of_a_dataset_leave_a_core_to_read_and_write_it_with(
    nodes: list[tuple[int, int]], threads: int | None, device: Any, actors: int, asked: float
) -> None:
    options = ScorerOptions(device=device, threads=threads)
    pool = make_pool(cluster_of(*nodes), EMBEDDED, options, ClusterOptions("auto"), leaves_core=True)
    ray = SimpleNamespace(data=SimpleNamespace(ActorPoolStrategy=lambda **asked: asked))
    arguments = pool.arguments(ray)
    assert (arguments["compute"]["max_size"], arguments["num_cpus"]) == (actors, pytest.approx(asked))
    assert sum(cpus for cpus, _ in nodes) - actors * arguments["num_cpus"] >= 1
