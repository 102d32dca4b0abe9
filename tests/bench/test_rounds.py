"""What the suite does round by round: the warm-up, limits of time and memory, and rounds that are not alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from cappy_bench.peers.peer import Model, Pair
from cappy_bench.peers.process import RunnerFailed
from cappy_bench.peers.specs import Spec
from cappy_bench.speed.figures import figures
from cappy_bench.speed.tables import workload_table
from cappy_bench.speed.workers import Workers
from cappy_bench.speed.workloads import LENGTHS, Workload
from tests.support.fake_tools import FakeTool, Measure, Run, row_of, runner_of, spec, true_score


class Told(FakeTool):
    """A fake whose answers are changed: `change` gets the answer, the message and how many scores were asked before."""

    change: Callable[[dict[str, Any], Mapping[str, Any], int], dict[str, Any]]

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        before = len(self.calls)
        return self.change(super().ask(message), message, before) if message["do"] == "score" else super().ask(message)


def told(name: str, change: Callable[[dict[str, Any], Mapping[str, Any], int], dict[str, Any]]) -> Told:
    tool = Told(spec(name))
    tool.change = change
    return tool


def test_every_runner_meets_pairs_of_all_lengths_before_it_is_timed(
    measure: Measure, workloads: list[Workload]
) -> None:
    asked: list[Mapping[str, Any]] = []

    def keep(answer: dict[str, Any], message: Mapping[str, Any], before: int) -> dict[str, Any]:
        asked.append(message)
        return answer

    measure(FakeTool(spec("cappy")), told("peer", keep))
    first, *others = [message["requests"] for message in asked]
    counts = {pair: count for one in workloads for pair, count in zip(one.pairs, one.token_counts, strict=True)}
    assert [len(request) for request in first] == [1] * len(LENGTHS) + [len(LENGTHS)]
    assert [pair for request in first[:-1] for pair in request] == first[-1]
    for length, pair in zip(LENGTHS, first[-1], strict=True):
        assert abs(counts[pair] - length) == min(abs(count - length) for count in counts.values())
    assert others == [one.requests for one in workloads] * 2


def test_memory_is_the_most_of_all_rounds_and_each_runner_has_its_own_loads_and_versions(measure: Measure) -> None:
    peaks = iter([1, *[5_000_000] * 6, *[9_000_000] * 6, *[7_000_000] * 6])  # the first is the warm-up's
    peer = told("peer", lambda answer, *_: {**answer, "peak_bytes": next(peaks), "computed_tokens": 700})
    result = measure(FakeTool(spec("cappy")), peer, run=Run(rounds=3))
    assert {cell["peak_bytes"] for cell in runner_of(result, "peer")["cells"]} == {9_000_000}
    assert {cell["computed_tokens"] for cell in runner_of(result, "peer")["cells"]} == {700}, "of one round"
    for name in ("cappy", "peer"):
        assert runner_of(result, name)["versions"] == {"fake": "1.0"}
        assert len(runner_of(result, name)["load_seconds"]) == 1


def test_a_workload_that_fails_in_a_later_round_has_no_speed_and_the_others_have(measure: Measure) -> None:
    def fail_later(answer: dict[str, Any], message: Mapping[str, Any], before: int) -> dict[str, Any]:
        if before == 8:  # after the warm-up and the 6 workloads of a round: the second one of the next round
            raise RunnerFailed("no memory")
        return answer

    result = measure(FakeTool(spec("cappy")), told("peer", fail_later), run=Run(rounds=3))
    peer = runner_of(result, "peer")
    assert [cell["status"] for cell in peer["cells"]] == ["ok", "failed", *["ok"] * 4]
    assert row_of(workload_table(result, "lengths"), "peer")[-1] == "no memory"
    assert figures(result, peer, result["workloads"][1]) is None


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_a_score_that_is_not_a_number_in_one_round_is_enough(measure: Measure, *, has_checkpoint: bool) -> None:
    def spoil(answer: dict[str, Any], message: Mapping[str, Any], before: int) -> dict[str, Any]:
        if before == 9:  # in the second round
            answer["scores"][0][0] = float("nan")
        return answer

    found = runner_of(measure(told("cappy", spoil), run=Run(rounds=3, has_checkpoint=has_checkpoint)), "cappy")
    assert (found["status"], found["reason"]) == ("wrong", "1 scores are not numbers")


@pytest.mark.parametrize("has_checkpoint", [True, False])
@pytest.mark.parametrize("spoiled", [1, 7], ids=["in the first round", "in the second round"])
def test_as_many_scores_as_pairs_but_not_of_each_request_are_wrong(
    spoiled: int, measure: Measure, *, has_checkpoint: bool
) -> None:
    def move(answer: dict[str, Any], message: Mapping[str, Any], before: int) -> dict[str, Any]:
        scores: list[list[float]] = answer["scores"]
        return {**answer, "scores": [scores[0] + scores[1], [], *scores[2:]]} if before == spoiled else answer

    found = runner_of(measure(told("cappy", move), run=Run(has_checkpoint=has_checkpoint)), "cappy")
    assert (found["status"], found["reason"]) == ("wrong", "6 scores for 6 pairs of interactive")


@pytest.mark.parametrize("place", [0, -1])
def test_one_pair_with_other_token_ids_is_enough(place: int, measure: Measure, workloads: list[Workload]) -> None:
    victim = workloads[place].pairs[place]

    def token_ids(pair: Pair) -> list[int]:
        return [len(text) + (pair == victim) for text in pair]

    found = runner_of(measure(FakeTool(spec("bad"), token_ids=token_ids)), "bad")
    assert found["reason"] == "other token ids than the reference's for 1 pairs"


def test_a_workload_is_repeated_up_to_the_limit_of_time(measure: Measure, workloads: list[Workload]) -> None:
    seconds = [1e-3 * sum(len(first) + len(second) for first, second in one.pairs) for one in workloads]
    limit = sorted(seconds)[3] * 1.001
    cells = runner_of(measure(FakeTool(spec("cappy")), run=Run(rounds=3, max_seconds=limit)), "cappy")["cells"]
    assert [len(cell["seconds"]) for cell in cells] == [3 if total <= limit else 1 for total in seconds]


@pytest.mark.parametrize(("off", "status"), [(2e-3, "ok"), (2e-2, "wrong")])
def test_limits_are_in_units_of_the_spread_of_the_scores(off: float, status: str, measure: Measure) -> None:
    """Scores of some rerankers go from -50 to 50, in which 1e-4 is less than float32 can hold."""
    reference = FakeTool(spec("reference"), score=lambda pair: 50 * true_score(pair))
    tool = FakeTool(spec("cappy"), score=lambda pair: 50 * true_score(pair) + off)
    assert runner_of(measure(reference, tool), "cappy")["status"] == status


def test_winners_that_are_kept_are_those_among_the_candidates_of_an_instruction(
    measure: Measure, workloads: list[Workload]
) -> None:
    def coarse(pair: Pair) -> float:
        return round(true_score(pair) * 8) / 8

    def winners(score: Callable[[Pair], float]) -> list[Pair]:
        return [max(candidates, key=score) for candidates in groups.values() if len(candidates) > 1]

    groups: dict[str, list[Pair]] = {}
    for pair in (pair for one in workloads for pair in one.pairs):
        groups.setdefault(pair[0], []).append(pair)
    found = runner_of(measure(FakeTool(spec("cappy", "int8"), score=coarse)), "cappy")["parity"]
    kept = [one == other for one, other in zip(winners(true_score), winners(coarse), strict=True)]
    assert found["winner_agreement"] == pytest.approx(sum(kept) / len(kept))
    assert found["pairs"] == sum(len(one.pairs) for one in workloads)


def test_memory_is_made_by_ending_the_runner_that_was_unused_for_longest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    events: list[str] = []

    class Counted(FakeTool):
        def close(self) -> None:
            events.append(f"end {self.spec.name}")

    def start(asked: Spec, model: Model) -> Counted:
        events.append(f"start {asked.name}")
        return Counted(asked)

    def available() -> int:
        """There is memory for two."""
        running = sum(1 if event.startswith("start") else -1 for event in events)
        return 1000 if running < 2 else 999

    monkeypatch.setattr("cappy_bench.speed.workers.available_bytes", available)
    workers = Workers(Model(tmp_path, tmp_path, 1), start, warm_up=[("a", "b")], reserve_bytes=1000)
    for name in ("one", "two", "one", "three", "one", "two"):
        workers.get(spec(name))
    assert events == ["start one", "start two", "end two", "start three", "end three", "start two"]
    assert {name: len(seconds) for name, seconds in workers.load_seconds.items()} == {"one": 1, "two": 2, "three": 1}
