"""optimum computes one batch on all threads, or a batch for each thread, with the same scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cappy_bench.peers.peer import Model
from cappy_bench.peers.process import start_worker
from cappy_bench.peers.specs import SPECS
from cappy_bench.speed.workers import runner_model
from cappy_engine.bundle import EMBEDDED
from cappy_export.proof.pairs import default_pairs
from tests.support.places import MINI

PAIRS = default_pairs()[:40]


def test_every_runner_with_streams_stands_behind_the_same_without() -> None:
    names = [one.name for one in SPECS]
    with_streams = [name for name in names if name.endswith("-streams")]
    assert {"optimum-streams", "optimum-int8-streams", "openvino-streams"} <= set(with_streams)
    for name in with_streams:
        assert names[names.index(name) - 1] == name.removesuffix("-streams")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimum", "optimum-int8"])
def test_streams_of_optimum_give_its_scores_of_cappy_mini(name: str, tmp_path: Path) -> None:
    model = Model(EMBEDDED, tmp_path, threads=2, checkpoint=MINI)
    scores = []
    for asked in (name, f"{name}-streams"):
        spec = next(one for one in SPECS if one.name == asked)
        worker = start_worker(spec, runner_model(model, spec), tools=tmp_path)
        try:
            worker.ask({"do": "prepare"})
            worker.ask({"do": "open"})
            requests = [*([pair] for pair in PAIRS[:4]), PAIRS]
            scores.append(
                [score for found in worker.ask({"do": "score", "requests": requests})["scores"] for score in found]
            )
        finally:
            worker.close()
    alone, side_by_side = np.array(scores)
    assert np.std(alone) > 0.05
    np.testing.assert_allclose(alone[:4], side_by_side[:4], atol=1e-6)
    if name == "optimum":
        np.testing.assert_allclose(alone[4:], side_by_side[4:], atol=1e-5)
    else:  # the batches of many pairs are others, and dynamic int8's scores depend on their batch
        assert np.corrcoef(alone[4:], side_by_side[4:])[0, 1] > 0.98
