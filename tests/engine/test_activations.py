"""Scores are raw unless a sigmoid is asked for, and it leaves the order as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from cappy_engine.activations import activated, sigmoid
from cappy_engine.testing import FakeSession, fake_scorer

PAIRS = [("Is the sky blue?", answer) for answer in ("Yes", "No", "Perhaps, at noon")]


@pytest.mark.parametrize("score", [-3e38, -800.0, -0.5, 0.0, 0.5, 800.0, 3e38])
def test_a_sigmoid_never_overflows(score: float) -> None:
    (found,) = activated(np.array([score], np.float32), "sigmoid").tolist()
    assert found == pytest.approx(sigmoid(float(np.float32(score))), abs=1e-7)
    assert 0 <= found <= 1


def test_scores_are_raw_unless_a_sigmoid_is_asked_for() -> None:
    with fake_scorer() as scorer:
        raw = scorer.score(PAIRS)
        np.testing.assert_array_equal(scorer.score(PAIRS, activation="identity"), raw)
        found = scorer.score(PAIRS, activation="sigmoid")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-raw.astype(float))), rtol=1e-6)


def test_a_ranking_by_sigmoids_has_the_order_of_the_raw_scores() -> None:
    with fake_scorer() as scorer:
        responses = [response for _, response in PAIRS]
        raw = scorer.rank("Is the sky blue?", responses)
        found = scorer.rank("Is the sky blue?", responses, activation="sigmoid")
    assert [candidate.index for candidate in found] == [candidate.index for candidate in raw]
    assert [candidate.score for candidate in found] == [sigmoid(candidate.score) for candidate in raw]


def test_scores_whose_sigmoids_are_equal_keep_their_order() -> None:
    large = FakeSession(lambda ids: 100.0 + len(ids))
    found = fake_scorer(large).rank("Is the sky blue?", ["Yes", "No, it is not"], activation="sigmoid")
    assert [(candidate.index, candidate.score) for candidate in found] == [(1, 1.0), (0, 1.0)]


@pytest.mark.parametrize("activation", ["softmax", "Sigmoid", None, 1])
def test_another_activation_is_refused_before_anything_is_scored(activation: Any) -> None:
    session = FakeSession()
    scorer = fake_scorer(session)
    calls: Sequence[Any] = (scorer.score, lambda pairs, **how: scorer.rank("a", ["b"], **how))
    for call in calls:
        with pytest.raises(ValueError, match=r"unknown activation .*; choose from identity, sigmoid"):
            call(PAIRS, activation=activation)
    assert not session.batches
