"""What a run that was stopped says, and what one says that goes on with it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

from cappy_engine import Scorer, ScorerOptions
from cappy_engine.batching import Grouping
from cappy_engine.bulk.resume.names import Names
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.bundle import EMBEDDED
from cappy_engine.dispatcher import Dispatcher
from cappy_engine.errors import OutputError
from cappy_engine.testing import PAD_TOKEN_ID, FakeSession, fake_scorer
from cappy_engine.tokenizer import PairTokenizer
from tests.support.bulk_files import WINDOW, pairs_of, run, stopped, write_rows


def test_other_kernels_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They change scores: another CPU has others."""
    source, out = write_rows(tmp_path / "in.jsonl", pairs_of(60)), tmp_path / "out.jsonl"
    options, said = ScorerOptions(precision="int8", device="cpu"), list[str]()
    with Scorer.open_with(EMBEDDED, options) as scorer:
        kernels = scorer.info.kernels.split()[0]
        stopped(monkeypatch, 3, lambda: run(scorer, source, out))
    if kernels == "none:":
        pytest.skip("no kernels were compiled")
    monkeypatch.setenv("CAPPY_KERNELS", "none")
    with Scorer.open_with(EMBEDDED, options) as scorer:
        run(scorer, source, out, resume=True, say=said.append)
    assert said == [f"note: {out}.partial goes on with what is not as before: versions.kernels was {kernels}, is none"]


def test_threads_that_share_batches_otherwise_are_another_run(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", pairs_of(20)), tmp_path / "out.jsonl"
    with Scorer.open(bundle, device="cpu", threads=2, mode="latency") as scorer:
        stopped(monkeypatch, 2, lambda: run(scorer, source, out))
    with (
        Scorer.open(bundle, device="cpu", threads=2, mode="throughput") as scorer,
        pytest.raises(OutputError, match=r"scorer\.mode was latency, is throughput"),
    ):
        run(scorer, source, out, resume=True)


@pytest.mark.parametrize(
    ("grouping", "problem"),
    [
        (Grouping(512, "removed"), r"scorer\.padding was allowed, is removed"),
        (Grouping(512, buckets=(64, 512)), r"scorer\.buckets was \[\], is \[64, 512\]"),
    ],
)
def test_batches_of_another_form_are_another_run(
    tmp_path: Path, tokenizer: PairTokenizer, monkeypatch: pytest.MonkeyPatch, grouping: Grouping, problem: str
) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", pairs_of(20)), tmp_path / "out.jsonl"
    stopped(monkeypatch, 2, lambda: run(fake_scorer(tokenizer=tokenizer), source, out))
    other = Scorer(tokenizer, Dispatcher(FakeSession(), grouping, pad_token_id=PAD_TOKEN_ID))
    with pytest.raises(OutputError, match=problem):
        run(other, source, out, resume=True)


def test_inputs_in_another_order_are_another_run(
    tmp_path: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [write_rows(tmp_path / f"{number}.csv", pairs_of(20)) for number in range(2)]
    stopped(monkeypatch, 3, lambda: run(scorer, sources, tmp_path / "out.csv"))
    with pytest.raises(OutputError, match=r"belongs to another run .*input\.1:1\.csv was .*, is not set"):
        run(scorer, sources[::-1], tmp_path / "out.csv", resume=True)


def test_a_run_that_replaces_rejects_alone_is_told_to_go_on_with_force(
    tmp_path: Path, tokenizer: PairTokenizer
) -> None:
    source, out, said = write_rows(tmp_path / "in.jsonl", pairs_of(60)), tmp_path / "out.jsonl", list[str]()
    bad: dict[str, Any] = {
        "rejects": tmp_path / "bad.jsonl",
        "options": RowOptions("skip", window=WINDOW),
        "force": True,
    }
    bad["rejects"].write_text("old")
    with pytest.raises(Exception, match="told to fail"):
        run(fake_scorer(FakeSession(fails_at=3), tokenizer=tokenizer), source, out, say=said.append, **bad)
    assert said[-1] == f"what was written before this is in {out}.partial; go on with --resume --force"
    assert run(fake_scorer(tokenizer=tokenizer), source, out, resume=True, **bad).pairs_before


def test_a_run_that_replaces_a_file_goes_on_as_its_advice_says(tmp_path: Path, tokenizer: PairTokenizer) -> None:
    source, out, said = write_rows(tmp_path / "in.jsonl", pairs_of(60)), tmp_path / "out.jsonl", list[str]()
    out.write_text("old")
    with pytest.raises(Exception, match="told to fail"):
        run(fake_scorer(FakeSession(fails_at=3), tokenizer=tokenizer), source, out, force=True, say=said.append)
    assert said == [f"what was written before this is in {out}.partial; go on with --resume --force"]
    before = Names(out).partial.read_bytes()
    with pytest.raises(OutputError, match=r"out.jsonl exists beside what .* or have it replaced with --resume -"):
        run(fake_scorer(tokenizer=tokenizer), source, out, resume=True)
    assert Names(out).partial.read_bytes() == before
    assert run(fake_scorer(tokenizer=tokenizer), source, out, resume=True, force=True).pairs_before
    assert len(out.read_text().splitlines()) == 60


@pytest.mark.parametrize("removals", range(7))
def test_a_run_that_ends_while_it_cleans_up_is_complete(
    tmp_path: Path, tokenizer: PairTokenizer, monkeypatch: pytest.MonkeyPatch, removals: int
) -> None:
    source, out, said = write_rows(tmp_path / "in.jsonl", pairs_of(20)), tmp_path / "out.jsonl", list[str]()
    unlink, left = os.unlink, [removals]

    def interrupted(path: Path, **options: object) -> None:
        if out.exists():
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        unlink(path, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as here, contextlib.suppress(KeyboardInterrupt):
        here.setattr(os, "unlink", interrupted)
        run(fake_scorer(tokenizer=tokenizer), source, out, say=said.append)
        assert removals == 6  # there are no more
    assert not said
    if removals < 6:
        run(fake_scorer(tokenizer=tokenizer), source, out, resume=True, say=said.append)
        assert said == [f"{out} is complete already"]
    assert len(out.read_text().splitlines()) == 20
    assert {path.name for path in tmp_path.iterdir()} == {source.name, out.name}
