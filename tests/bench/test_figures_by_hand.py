"""Figures of rounds that differ, as one computes them by hand: fakes that take equal times cannot tell them apart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import pytest

from cappy_bench.speed.figures import Ratio, compare_with_peer, figures, is_as_right, paired_ratios
from cappy_bench.speed.markdown import error, number, size
from cappy_bench.speed.suite import best_peak
from cappy_bench.speed.tables import ratio_table, runner_table, share_table, verdict, workload_table
from tests.support.fake_tools import row_of

Rounds = Sequence[Sequence[float]]

ROUNDS = [[1.0, 2.0, 3.0], [2.0, 2.0, 2.5], [9.0, 1.0, 1.0]]
"""Seconds of three requests in three rounds: totals of 6, 6.5 and 11, whose mean is another one than their median."""
EXACT = {"max_error": 1e-6, "mean_error": 1e-7, "spearman": 1.0, "winner_agreement": 1.0}
CLOSE = {"max_error": 0.05, "mean_error": 0.01, "spearman": 0.99, "winner_agreement": 0.875}


def runner(name: str, rounds: Rounds, *, precision: str = "fp32", **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "precision": precision,
        "is_ours": name.startswith("cappy"),
        "setting": "by hand",
        "versions": {"package": "1.5"},
        "status": "ok",
        "reason": None,
        "load_seconds": [1.0, 9.0, 2.0],
        "parity": EXACT,
        "cells": [
            {
                "workload": "rerank",
                "status": "ok",
                "reason": None,
                "seconds": rounds,
                "computed_tokens": 800,
                "peak_bytes": 5_000_000,
            }
        ],
        **changes,
    }


def result(*runners: dict[str, Any]) -> dict[str, Any]:
    """One workload: 12 pairs in 3 requests, 600 tokens and 3e9 operations. 1e9 a second are float32's peak."""
    workload = {"name": "rerank", "pairs": 12, "requests": 3, "tokens": 600, "flops": 3e9}
    peak = {"fp32": {"flops": 1e9}, "bf16": {"flops": 4e9}, "int8": {"flops": 2e9}}
    return {"workloads": [workload], "peak": peak, "runners": list(runners)}


def one_request(*totals: float) -> list[list[float]]:
    """Rounds of these seconds in all."""
    return [[0.0, 0.0, total] for total in totals]


def test_figures_are_medians_of_rounds_and_percentiles_of_all_their_requests() -> None:
    made = result(runner("cappy", ROUNDS))
    found = figures(made, made["runners"][0], made["workloads"][0])
    assert found is not None
    assert found.requests == 3, "the same in each round"
    assert found.pairs_per_second == pytest.approx(12 / 6.5)
    assert found.tokens_per_second == pytest.approx(600 / 6.5)
    assert found.spread == pytest.approx((600 / 11, 600 / 6)), "the slowest round, and then the fastest"
    hundredths = statistics.quantiles([second for seconds in ROUNDS for second in seconds], n=100, method="inclusive")
    assert found.latency == pytest.approx([1000 * hundredths[share - 1] for share in (50, 95, 99)])
    assert found.padding_share == pytest.approx(0.25), "600 of 800 tokens were not padding"
    assert found.peak_share == pytest.approx(3e9 / 6.5 / 1e9)
    assert found.peak_bytes == 5_000_000


@pytest.mark.parametrize(("precision", "peak"), [("fp32", 1e9), ("fp16", 1e9), ("bf16", 4e9), ("int8", 2e9)])
def test_a_share_is_of_the_peak_in_that_precision(precision: str, peak: float) -> None:
    made = result(runner("cappy", ROUNDS, precision=precision))
    found = figures(made, made["runners"][0], made["workloads"][0])
    assert found is not None
    assert found.peak_share == pytest.approx(3e9 / 6.5 / peak)
    assert row_of(share_table(made), "cappy")[2] == f"{3e9 / 6.5 / peak:.0%}"


def test_a_ratio_is_the_median_of_the_rounds_ratios_and_not_the_ratio_of_medians() -> None:
    made = result(runner("cappy", one_request(1, 4, 3)), runner("torch", one_request(2, 4, 9)))
    assert compare_with_peer(made, made["runners"][1], "rerank") == Ratio("cappy", 2.0, 1.0, 3.0)
    assert paired_ratios([2.0, 4.0, 9.0], [1.0, 4.0, 2.0]) == [2.0, 1.0, 4.5]
    assert paired_ratios([6.0], [1.0, 2.0, 3.0]) == [6.0, 3.0, 2.0]
    assert paired_ratios([1.0, 2.0, 12.0], [2.0]) == [0.5, 1.0, 6.0]


def test_ours_is_the_fastest_by_its_median_and_not_by_one_round() -> None:
    made = result(
        runner("cappy", one_request(1, 8, 8)), runner("cappy-fp16", one_request(2, 2, 2)), runner("torch", ROUNDS)
    )
    ratio = compare_with_peer(made, made["runners"][2], "rerank")
    assert isinstance(ratio, Ratio)
    assert ratio.ours == "cappy-fp16"


def test_as_right_is_no_worse_in_rank_and_in_mean_error_or_within_rounding() -> None:
    assert is_as_right(CLOSE, CLOSE)
    assert not is_as_right(CLOSE, EXACT)
    assert not is_as_right({**CLOSE, "mean_error": 0.011}, CLOSE)
    assert not is_as_right({**CLOSE, "spearman": 0.98}, CLOSE)
    assert is_as_right({**CLOSE, "mean_error": 0.009, "spearman": 0.991}, CLOSE)
    assert not is_as_right({**EXACT, "max_error": 2e-4}, {**EXACT, "max_error": 9e-5, "mean_error": 5e-5})
    for largest, is_rounding in ((1e-4, True), (1.1e-4, False)):
        assert is_as_right({**CLOSE, "max_error": largest}, EXACT) == is_rounding


@pytest.mark.parametrize(
    ("theirs", "long", "short"),
    [
        ((2, 3, 4), "3.00x (2.00 to 4.00) cappy", "3.00"),
        ((0.9, 3, 4), "3.00x (0.90 to 4.00) cappy, even", "3.00 even"),
        ((1, 3, 4), "3.00x (1.00 to 4.00) cappy, even", "3.00 even"),
        ((0.2, 0.5, 1.1), "0.50x (0.20 to 1.10) cappy, even", "0.50 even"),
        ((0.2, 0.5, 1), "0.50x (0.20 to 1.00) cappy, even", "0.50 even"),
        ((0.2, 0.5, 0.9), "**0.50x (0.20 to 0.90): the peer wins** over cappy", "**0.50 peer wins**"),
    ],
)
def test_one_wins_only_if_every_round_says_so(theirs: tuple[float, ...], long: str, short: str) -> None:
    made = result(runner("cappy", one_request(1, 1, 1)), runner("torch", one_request(*theirs)))
    assert verdict(compare_with_peer(made, made["runners"][1], "rerank")) == long
    assert row_of(workload_table(made, "rerank"), "torch")[-1] == long
    assert row_of(ratio_table(made), "torch")[2:] == [short]


def test_a_row_shows_the_figures_and_the_fastest_is_first() -> None:
    hidden = runner("hidden", one_request(5, 5, 5), parity=CLOSE)
    hidden["cells"][0]["computed_tokens"] = None
    made = result(runner("slow", one_request(60, 60, 60)), runner("cappy", ROUNDS), hidden)
    table = workload_table(made, "rerank")
    assert [line.split("|")[1].strip(" *") for line in table.splitlines()[2:]] == ["hidden", "cappy", "slow"]
    figures_of_cappy = ["1.85", "92.3 (54.5 to 100)", "2,000", "", "", "25%", "46%", "5 MB", "1.0e-06", "1.0000", ""]
    assert row_of(table, "cappy")[2:] == figures_of_cappy
    assert row_of(table, "hidden")[7] == "?", "what a tool does not show is not 0"
    assert row_of(table, "hidden")[10:12] == ["0.05", "0.9900"]


@pytest.mark.parametrize(("requests", "shown"), [(19, 1), (20, 2), (99, 2), (100, 3)])
def test_a_percentile_is_shown_only_where_there_are_enough_requests(requests: int, shown: int) -> None:
    """Different ones: that each is repeated in three rounds makes no more of them."""
    seconds = [0.00113 * (place + 1) for place in range(requests)]
    hundredths = statistics.quantiles(seconds * 3, n=100, method="inclusive")
    expected = [number(1000 * hundredths[share - 1]) for share in (50, 95, 99)]
    table = workload_table(result(runner("cappy", [seconds] * 3)), "rerank")
    assert row_of(table, "cappy")[4:7] == [*expected[:shown], *[""] * (3 - shown)]


def test_a_workload_that_failed_in_one_round_has_no_speed_and_its_reason() -> None:
    broken = runner("broken", ROUNDS)
    broken["cells"][0] |= {"status": "failed", "reason": "no memory"}
    made = result(runner("cappy", ROUNDS), broken)
    assert figures(made, broken, made["workloads"][0]) is None
    assert row_of(workload_table(made, "rerank"), "broken")[2:] == ["-"] * 10 + ["no memory"]
    assert row_of(ratio_table(made), "broken")[2:] == ["-"]


def test_the_table_of_runners_has_versions_the_median_load_and_the_parity() -> None:
    row = row_of(runner_table(result(runner("torch", ROUNDS, parity=CLOSE))), "torch")
    assert row[2:] == ["by hand", "package 1.5", "2.0", "0.05", "0.01", "0.99000", "87.5%", ""]


def test_the_peak_is_the_best_of_the_rounds_with_how_it_was_reached() -> None:
    rounds = [{"fp32": {"flops": flops, "how": how}} for flops, how in ((2e9, "a"), (5e9, "b"), (1e9, "c"))]
    assert best_peak(rounds) == {"fp32": {"flops": 5e9, "how": "b", "rounds": [2e9, 5e9, 1e9]}}


def test_numbers_have_three_digits_and_sizes_are_of_powers_of_ten() -> None:
    assert [number(value) for value in (0.01234, 9.876, 98.76, 123.4, 999.7, 12345.6)] == [
        "0.0123", "9.88", "98.8", "123", "1,000", "12,346"
    ]  # fmt: skip
    assert [error(value) for value in (8.64e-7, 9.9e-4, 0.0123, 0.5)] == ["8.6e-07", "9.9e-04", "0.012", "0.5"]
    assert [size(count) for count in (1_500_000, 999_000_000, 1_420_000_000)] == ["2 MB", "999 MB", "1.42 GB"]
