"""`make bench-full` names what it measures after the checkpoint."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.support.places import ROOT


def planned(*words: str) -> str:
    """The commands that make would run."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--dry-run", "--no-print-directory", "bench-full", "ROBERTA=roberta", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return " ".join(done.stdout.replace("\\\n", " ").split())


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_result_of_ones_own_checkpoint_has_its_name(slash: str) -> None:
    text = planned(f"CHECKPOINT=some/where/mine{slash}", "RESULTS=results")
    assert '--title "mine" --checkpoint some/where/mine --bundle bench/mine-bundle --work bench/mine-work' in text
    assert "cappy export some/where/mine bench/mine-bundle " in text
    assert "--out results/mine-" in text
    assert "compare results/mine-" in text
    assert "cappy-large" not in text


@pytest.mark.parametrize("words", [[], ["CHECKPOINT=bench/large"], ["CHECKPOINT=bench/large/"]])
def test_the_made_up_checkpoint_stands_for_cappy_large(words: list[str]) -> None:
    text = planned(*words, "RESULTS=results")
    assert '--title "cappy-large\'s size" --checkpoint bench/large --bundle bench/large-bundle' in text
    assert "--out results/cappy-large-" in text
