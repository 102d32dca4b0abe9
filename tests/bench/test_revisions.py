"""The study of revisions: two engines in processes of their own, in turn, on the same pairs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from cappy_bench.speed.workloads import Workload
from cappy_bench.studies.revisions import HERE, commit_of, compare, open_worker

PAIRS = (("Is the sky blue?", "Yes"), ("Is grass blue?", "No"))


@pytest.mark.slow
@pytest.mark.parametrize(("other", "differ"), [("fp32", False), ("int8", True)])
def test_both_are_measured_in_each_round_and_their_scores_compared(bundle: Path, other: str, *, differ: bool) -> None:
    workers = {"before": open_worker(HERE, bundle, other), "now": open_worker(HERE, bundle, "fp32")}
    try:
        found = compare(workers, Workload("bulk", (PAIRS,), np.array([8, 8])), rounds=2)
    finally:
        for worker in workers.values():
            worker.close()
    assert {name: len(seconds) for name, seconds in found["seconds"].items()} == {"before": 2, "now": 2}
    ratios = [before / now for before, now in zip(found["seconds"]["before"], found["seconds"]["now"], strict=True)]
    assert found["ratio"] == pytest.approx(sum(ratios) / 2)
    assert (found["largest_difference"] > 0) == differ


def test_a_revision_that_git_does_not_know_is_an_error_in_git_s_words(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        commit_of("no-such-revision")
    assert "fatal" in capfd.readouterr().err
