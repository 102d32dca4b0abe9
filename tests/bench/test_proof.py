"""The proof's pairs judge a runner, and have no time: fakes in place of tools, and pools of texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cappy_bench.peers.peer import Pair
from cappy_bench.speed.measure import measure as measure_options
from cappy_bench.speed.report import write_report
from cappy_bench.speed.run_options import RunOptions
from cappy_bench.speed.tables import missing_table
from cappy_bench.speed.texts import make_pool
from cappy_bench.speed.workloads import PROOF, Workload, make_workloads
from cappy_engine.errors import BenchmarkError
from cappy_engine.storage import json_bytes
from cappy_engine.tokenizer import PairTokenizer
from tests.support.fake_tools import SIZES, FakeTool, Run, row_of, run_on_fakes, runner_of, spec, true_score

TEXTS = make_pool(["sky", "blue", "is", "the", "question", "answer", "why"], seed=0, count=600)
WITH_PROOF = replace(SIZES, proof=30)


@pytest.fixture(scope="module")
def proven(tokenizer: PairTokenizer) -> list[Workload]:
    """The workloads, and the proof behind them."""
    return make_workloads(TEXTS, tokenizer, WITH_PROOF, seed=0)


def test_the_proof_takes_other_pairs_and_leaves_all_workloads_as_they_are(
    proven: list[Workload], workloads: list[Workload]
) -> None:
    *timed, proof = proven
    assert [one.sha256 for one in timed] == [one.sha256 for one in workloads]
    assert (proof.name, len(proof.requests), len(set(proof.pairs))) == (PROOF, 1, 30)
    alone = {pair for one in timed if one.name != "rerank" for pair in one.pairs}
    assert not alone & set(proof.pairs)


def test_of_few_texts_the_proof_takes_what_is_left(tokenizer: PairTokenizer) -> None:
    needed = 6 + 6 * 2 + 24 + 3 + 4 + 2
    found = {count: make_workloads(TEXTS[:count], tokenizer, WITH_PROOF, seed=0) for count in (needed, needed + 7)}
    assert PROOF not in [one.name for one in found[needed]]
    assert len(found[needed + 7][-1].pairs) == 7


@pytest.mark.parametrize(
    ("wanted", "names"), [(["bulk"], ["bulk"]), (["bulk", PROOF], ["bulk", PROOF]), ([], [*SIZES.names, PROOF])]
)
def test_the_proof_can_be_left_out(wanted: list[str], names: list[str], tokenizer: PairTokenizer) -> None:
    found = make_workloads(TEXTS, tokenizer, WITH_PROOF, seed=0, wanted=wanted)
    assert [one.name for one in found] == names


def test_a_run_of_the_proof_alone_would_measure_nothing(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    asked = RunOptions(bundle=bundle, checkpoint=checkpoint, workloads=(PROOF,), out=tmp_path / "result.json")
    with pytest.raises(BenchmarkError, match="the workload proof has no time; name another one, too"):
        measure_options(asked, say=lambda line: None)


def test_the_proof_is_scored_once_and_has_no_speed(proven: list[Workload], tmp_path: Path) -> None:
    seen: list[Pair] = []

    def score(pair: Pair) -> float:
        seen.append(pair)
        return true_score(pair)

    result = run_on_fakes(proven, tmp_path, [FakeTool(spec("peer"), score=score)], Run(rounds=3))
    assert {seen.count(pair) for pair in proven[-1].pairs} == {1}
    assert PROOF not in [entry["name"] for entry in result["workloads"]]
    runner = runner_of(result, "peer")
    assert PROOF not in [cell["workload"] for cell in runner["cells"]]
    assert runner["parity"]["pairs"] == sum(len(one.pairs) for one in proven)


def test_a_runner_that_is_wrong_on_the_proofs_pairs_alone_is_wrong(proven: list[Workload], tmp_path: Path) -> None:
    victim = proven[-1].pairs[3]
    bad = FakeTool(spec("bad"), score=lambda pair: true_score(pair) + 2e-4 * (pair == victim))
    found = runner_of(run_on_fakes(proven, tmp_path, [bad, FakeTool(spec("good"))]), "bad")
    assert (found["status"], found["reason"]) == ("wrong", "max error 0.0002, limit 0.0001")


def test_a_runner_that_cannot_score_the_proof_is_not_taken_for_right(proven: list[Workload], tmp_path: Path) -> None:
    class Choosy(FakeTool):
        def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
            if message["do"] == "score" and len(message["requests"][0]) == len(proven[-1].pairs):
                self.fails_at = "score"
            return super().ask(message)

    result = run_on_fakes(proven, tmp_path, [Choosy(spec("choosy")), FakeTool(spec("good"))])
    reason = "the proof's pairs were not scored: no score today"
    assert (runner_of(result, "choosy")["status"], runner_of(result, "choosy")["reason"]) == ("failed", reason)
    assert reason in row_of(missing_table(result), "choosy")[-1]


def test_the_report_tells_how_many_pairs_judged(proven: list[Workload], tmp_path: Path) -> None:
    result = run_on_fakes(proven, tmp_path, [FakeTool(spec("peer")), FakeTool(spec("choosy"))])
    runner_of(result, "choosy")["parity"]["pairs"] = 3  # as where it could not run a workload
    (tmp_path / "fakes.json").write_bytes(json_bytes(result))
    page = write_report(tmp_path).read_text()
    pairs = sum(len(one.pairs) for one in proven)
    assert f"Errors and correlations are those of {pairs} pairs, of which 30 were scored once, without a time." in page


def test_without_a_checkpoint_nothing_is_scored_for_a_proof(tmp_path: Path) -> None:
    asked = RunOptions(workloads=("interactive",), rounds=1, work=tmp_path / "work", out=tmp_path / "result.json")
    assert measure_options(asked, say=lambda line: None)["proof"] is None
