"""Numbers of a training: what is refused, and the mixed precision that a device gets."""

from __future__ import annotations

from typing import Any

import pytest

from cappy_engine.errors import AdaptError
from cappy_export.adaptation.recipe import AdaptOptions, Recipe, choose_mixed_precision


@pytest.mark.parametrize(
    ("asked", "device", "has_bf16", "expected"),
    [
        ("auto", "cpu", False, "no"),
        ("auto", "cuda", True, "bf16"),
        ("auto", "cuda", False, "fp16"),
        ("no", "cuda", True, "no"),
        ("fp16", "cuda", True, "fp16"),
        ("bf16", "cpu", False, "bf16"),
    ],
)
def test_mixed_precision_is_chosen_by_device(asked: str, device: str, has_bf16: bool, expected: str) -> None:
    assert choose_mixed_precision(asked, device=device, has_bf16=has_bf16) == expected


@pytest.mark.parametrize(("asked", "device"), [("fp16", "cpu"), ("bf16", "cuda")])
def test_a_mixed_precision_that_the_device_lacks_is_an_error(asked: str, device: str) -> None:
    with pytest.raises(AdaptError, match="choose"):
        choose_mixed_precision(asked, device=device, has_bf16=False)


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"max_steps": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"warmup_fraction": 1.5},
        {"dropout": 1.0},
        {"weight_decay": -0.1},
        {"max_gradient_norm": 0.0},
        {"mixed_precision": "int8"},
        {"seed": -1},
        {"seed": 1.5},
        {"seed": 2**64},
        {"epochs": True},
        {"batch_size": 2.5},
        {"max_length": "512"},
        {"learning_rate": "2e-5"},
        {"weight_decay": True},
        {"dropout": "0.1"},
        {"mixed_precision": 16},
    ],
)
def test_a_number_out_of_range_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Recipe(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"negatives": 0},
        {"evaluate_every": 0},
        {"save_every": 0},
        {"save_every": "200"},
        {"held_out_fraction": 1.0},
        {"held_out_fraction": "0.1"},
        {"from_samples": "no"},
        {"resume": 1},
    ],
    ids=str,
)
def test_an_option_out_of_range_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        AdaptOptions(**options)
