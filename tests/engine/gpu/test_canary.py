"""A GPU that gives a wrong score does not serve, and a bundle that cannot tell is refused."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import numpy as np
import pytest

from cappy_engine.batching import Batch
from cappy_engine.bundle import Bundle
from cappy_engine.canary import check_canary, read_canary
from cappy_engine.errors import BundleError, DeviceUnavailable
from cappy_engine.exact import ExactModel
from cappy_engine.options import ScorerInfo
from cappy_engine.testing import FakeSession, score_of
from tests.support.bundles import Change, Manifest
from tests.support.gpus import (
    BUCKETS,
    BUDGET,
    LONGEST,
    TOKENS,
    FakeRuntime,
    PlacedSession,
    Score,
    open_faked,
    write_gpu_bundle,
)

# What is refused


MIDDLE = TOKENS[3]
RIGHT = f"{score_of(MIDDLE):.5f}".replace(".", r"\.")
WRONG: dict[str, tuple[Score, str]] = {
    "one score off": (
        lambda ids: score_of(ids) + 0.003 * (ids == MIDDLE),  # by mean, all would be well
        rf"{score_of(MIDDLE) + 0.003:.5f} for a pair .* whose score is {RIGHT}, and 0\.001 is allowed",
    ),
    "one score too low": (
        lambda ids: score_of(ids) - 0.003 * (ids == MIDDLE),
        rf"{score_of(MIDDLE) - 0.003:.5f} for a pair .* whose score is {RIGHT}, and 0\.001 is allowed",
    ),
    "no number": (
        lambda ids: float("nan") if ids == MIDDLE else score_of(ids),
        rf"nan for a pair .* whose score is {RIGHT}, and 0\.001 is allowed",
    ),
    "infinite": (
        lambda ids: float("inf") if ids == MIDDLE else score_of(ids),
        rf"inf for a pair .* whose score is {RIGHT}, and 0\.001 is allowed",
    ),
    "all the same": (lambda ids: 0.5, r"0\.50000 for a pair .* whose score is 0\.\d{5}, and 0\.001 is allowed"),
}


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_score_of_the_canary_stops_the_start(sealed: Bundle, root: Path, device: str, wrong: str) -> None:
    score, problem = WRONG[wrong]
    runtime = FakeRuntime(lambda device, gpu: PlacedSession(device, score))
    with pytest.raises(
        DeviceUnavailable, match=f"device '{device}' gives wrong scores: {problem}, at .*; nothing was scored"
    ):
        open_faked(sealed, root, runtime, device=device)


def test_the_largest_difference_of_all_batches_is_told(sealed: Bundle) -> None:
    canary = read_canary(sealed.manifest.document, "tensorrt", "int8")
    session = FakeSession(lambda ids: score_of(ids) - 0.003 * (ids == TOKENS[0]))
    batches = [Batch(np.array([row]), len(TOKENS[row])) for row in (0, 1)]
    assert check_canary(session, canary, batches, pad_token_id=1) == pytest.approx(0.003, abs=1e-6)


def test_a_wrong_engine_of_a_bucket_that_no_pair_of_the_canary_needs_stops_the_start(
    tmp_path: Path, root: Path
) -> None:
    def change(document: Manifest) -> None:  # as an export leaves it: short pairs, and the longest
        pairs = document["canary"]["pairs"]
        ends = [pair for pair in pairs if len(pair["input_ids"]) <= BUCKETS[0] or len(pair["input_ids"]) == LONGEST]
        document["canary"]["pairs"] = ends

    bundle, opens = write_gpu_bundle(tmp_path / "bundle", change=change), count()

    def make(device: str, gpu: int) -> PlacedSession:
        return PlacedSession(device, (lambda ids: 0.5) if next(opens) == 1 else score_of)

    with pytest.raises(DeviceUnavailable, match=rf"gives wrong scores: 0\.50000 .* x {BUCKETS[1]} tokens"):
        open_faked(bundle, root, FakeRuntime(make), device="tensorrt")


def test_one_wrong_gpu_of_two_stops_the_start(sealed: Bundle, root: Path) -> None:
    runtime = FakeRuntime(lambda device, gpu: PlacedSession(device, score_of if gpu == 0 else lambda ids: 0.5))
    with pytest.raises(DeviceUnavailable, match=r"^GPU 1: device 'cuda' gives wrong scores"):
        open_faked(sealed, root, runtime, gpus=[0, 1])
    assert len(runtime.opened) == 2


@pytest.mark.parametrize(
    ("device", "precision", "reach"), [("cuda", "fp16", 0.002), ("tensorrt", "int8", 0.1), ("tensorrt", "fp32", 0.0)]
)
def test_an_exact_winner_on_a_gpu_reckons_with_twice_what_the_canary_tolerates(
    sealed: Bundle, device: str, precision: str, reach: float
) -> None:
    info = ScorerInfo(
        str(sealed.path), device, "", precision, "", 1, "latency", "", "allowed", BUDGET, LONGEST, gpus=(0,)
    )
    assert ExactModel(sealed, info).reach() == pytest.approx(reach)


def pair_of(tokens: int) -> Manifest:
    """A pair of the canary with so many tokens, and its right score."""
    return {"input_ids": [5] * tokens, "token_type_ids": [0] * tokens, "score": score_of([5] * tokens)}


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda document: document.pop("canary"), id="none at all"),
        pytest.param(lambda document: document["canary"].pop("pairs"), id="no pairs"),
        pytest.param(lambda document: document["canary"].pop("tolerance"), id="no tolerances"),
        pytest.param(lambda document: document["canary"]["tolerance"].clear(), id="none for the device"),
        pytest.param(
            lambda document: [found.pop("fp16") for found in document["canary"]["tolerance"].values()],
            id="none for the precision",
        ),
        pytest.param(lambda document: document["canary"]["pairs"][2].pop("score"), id="a pair without score"),
        pytest.param(lambda document: document["canary"].update(pairs=[[1, 2]]), id="no pairs but numbers"),
        pytest.param(lambda document: document["canary"]["pairs"].append(pair_of(0)), id="a pair of no tokens"),
        pytest.param(lambda document: document["canary"]["pairs"].append(pair_of(LONGEST + 1)), id="too long a pair"),
    ],
)
def test_a_bundle_that_cannot_prove_this_model_is_refused(
    tmp_path: Path, root: Path, device: str, change: Change
) -> None:
    runtime = FakeRuntime()
    problem = f"no canary for fp16 on {device} .*export it again with --target {device}"
    with pytest.raises(BundleError, match=problem):
        open_faked(write_gpu_bundle(tmp_path / "bundle", change=change), root, runtime, device=device)
    assert not runtime.opened


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda canary: canary["pairs"].clear(), id="no pair"),
        pytest.param(lambda canary: canary["tolerance"]["cuda"].update(fp16=0), id="a tolerance of 0"),
        pytest.param(lambda canary: canary["tolerance"]["cuda"].update(fp16=-1), id="a negative tolerance"),
        pytest.param(lambda canary: canary["tolerance"]["cuda"].update(fp16="nan"), id="a tolerance that is none"),
        pytest.param(lambda canary: canary["pairs"][0].update(score="nan"), id="a score that is none"),
    ],
)
def test_a_canary_that_proves_nothing_is_refused(tmp_path: Path, root: Path, change: Change) -> None:
    bundle = write_gpu_bundle(tmp_path / "bundle", change=lambda document: change(document["canary"]))
    with pytest.raises(BundleError, match=r"canary for fp16 on cuda .*export it again"):
        open_faked(bundle, root, FakeRuntime())
