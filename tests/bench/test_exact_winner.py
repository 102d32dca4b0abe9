"""The study of exact winners counts as one does by hand with the scorers' own ranks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from cappy_bench.studies.exact_winner import compare, main
from cappy_engine import Scorer
from tests.support.places import TINY, parity_pairs


@pytest.mark.slow
def test_winners_that_are_kept_and_candidates_that_are_scored_again_are_counted() -> None:
    responses = sorted({response for _, response in parity_pairs() if len(response) < 40})
    instructions = list(dict.fromkeys(instruction for instruction, _ in parity_pairs() if 20 < len(instruction) < 400))
    groups = {instruction: responses[place::12] for place, instruction in enumerate(instructions[:12])}
    found = compare(TINY, groups)
    assert (found["groups"], found["candidates"]) == (12, sum(map(len, groups.values())))
    again = kept = groups_again = 0
    with (
        Scorer.open(TINY, device="cpu", precision="fp32") as fp32,
        Scorer.open(TINY, device="cpu", precision="int8") as int8,
    ):
        for instruction, candidates in groups.items():
            best = fp32.rank(instruction, candidates)[0].index
            kept += int8.rank(instruction, candidates)[0].index == best
            ranked = int8.rank(instruction, candidates, exact_winner=True)
            assert ranked[0].index == best
            again += sum(candidate.is_exact for candidate in ranked)
            groups_again += any(candidate.is_exact for candidate in ranked)
    assert found["winners_kept"] == {"int8": pytest.approx(kept / 12), "int8 with exact winner": 1.0}
    assert found["candidates_scored_again"] == pytest.approx(again / found["candidates"])
    assert found["groups_scored_again"] == pytest.approx(groups_again / 12)
    assert all(seconds > 0 for seconds in found["seconds"].values())


def test_candidates_are_read_packed_too_and_without_any_the_study_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": "Is it wet?", "response": response} for response in ("Yes", "No", "Yes")]
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    (tmp_path / "some.jsonl.gz").write_bytes(gzip.compress(lines))
    main([str(TINY), str(tmp_path / "some.jsonl.gz")])
    assert capsys.readouterr().out.startswith("1 groups, 2 candidates\n")
    (tmp_path / "none.jsonl").write_bytes(lines.splitlines(keepends=True)[0])
    with pytest.raises(SystemExit):
        main([str(TINY), str(tmp_path / "none.jsonl")])
    assert "has two different candidates or more" in capsys.readouterr().err
