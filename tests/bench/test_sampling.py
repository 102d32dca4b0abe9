"""Files of candidates: what a line holds, and that a run which was stopped goes on as if it had not been."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cappy_bench.candidates.decodings import PAPER, Decoding, choose_decodings
from cappy_bench.candidates.llm import LocalLLM, open_llm
from cappy_bench.candidates.sample_options import LLMOptions, SampleOptions
from cappy_bench.candidates.sampling import Totals, sample_file
from cappy_engine.errors import OutputError, SampleError
from cappy_export.adaptation.samples import read_samples
from tests.support.echo import Echo
from tests.support.small_llms import make_llm

ROWS: list[dict[str, Any]] = [
    {"dataset": "count", "example_idx": number, "instruction": f"\nCount {number} ", "references": [str(number), "é"]}
    for number in range(7)
]
LINES = [json.dumps(row).encode() + b"\n" for row in ROWS]
TWO = choose_decodings(["greedy", "sampling"], count=2)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LocalLLM:
    return open_llm(make_llm(tmp_path_factory.mktemp("llms") / "t5", "t5"), LLMOptions(device="cpu"), max_new_tokens=6)


def sample(
    source: Any, out: Path, sampler: Any = None, *, decodings: Sequence[Decoding] = TWO, seed: int = 0,
    batch_size: int = 3, resume: bool = False, **hooks: Any,
) -> Totals:  # fmt: skip
    options = SampleOptions(seed=seed, batch_size=batch_size, resume=resume)
    return sample_file(source, out, sampler or Echo(), decodings, options, **hooks)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


# What is written


def test_a_line_is_the_inputs_fields_and_the_candidates(tmp_path: Path) -> None:
    totals = sample(LINES, tmp_path / "out.jsonl")
    lines = read(tmp_path / "out.jsonl")
    assert [{name: line[name] for name in row} for row, line in zip(ROWS, lines, strict=True)] == ROWS
    for line in lines:
        assert list(line)[4:9] == ["samples", "decodings", "log_likelihoods", "token_counts", "cut"]
        assert line["decodings"] == ["greedy", "sampling", "sampling"]
        assert line["samples"][0] == ""
        assert line["samples"][2].startswith(line["instruction"])
        assert (line["log_likelihoods"], line["token_counts"]) == ([-1.5, -1.5, -2.5], [3, 3, 3])
        assert line["cut"] == [False, False, True]
    assert [line.get("prompt_cut") for line in lines] == [None] * 4 + [True] + [None] * 2
    assert dataclasses.replace(totals, seconds=0) == Totals(7, 7, 21, cut=7, empty=14, prompts_cut=1)
    assert not (tmp_path / "out.jsonl.partial").exists()


@pytest.mark.slow
def test_adaptation_reads_what_was_written(llm: LocalLLM, tmp_path: Path) -> None:
    sample(LINES, tmp_path / "out.jsonl", llm, decodings=PAPER)
    sampled = read_samples(tmp_path / "out.jsonl")
    assert [each.instruction for each in sampled] == [row["instruction"] for row in ROWS]
    assert [list(each.references) for each in sampled] == [row["references"] for row in ROWS]
    assert all(len(each.samples) == 17 for each in sampled)


def test_each_batch_has_a_seed_of_its_own_that_comes_from_the_seed_and_its_place(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        sample(LINES, tmp_path / f"{name}.jsonl", seed=seed)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "same.jsonl").read_bytes()
    seeds = [line["samples"][2].split()[2] for line in read(tmp_path / "one.jsonl")]
    assert seeds[0] == seeds[1] == seeds[2] != seeds[3]
    assert len(set(seeds)) == 3
    assert not set(seeds) & {line["samples"][2].split()[2] for line in read(tmp_path / "other.jsonl")}


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
def test_a_file_plain_or_gzipped_is_as_good_as_its_lines(name: str, tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + b"\n".join(LINES)  # a BOM and blank lines
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    sample(tmp_path / name, tmp_path / "out.jsonl")
    sample(LINES, tmp_path / "expected.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "expected.jsonl").read_bytes()


def test_other_fields_come_back_as_they_were(tmp_path: Path) -> None:
    row = {"instruction": "日本", "x": {"a": [1, None, 0.1, 10**30]}, "lone": "\ud800", "references": None}
    sample([json.dumps(row).encode()], tmp_path / "out.jsonl")
    (line,) = read(tmp_path / "out.jsonl")
    assert {name: line[name] for name in row} == row


def test_settings_keep_what_decided_the_candidates(tmp_path: Path) -> None:
    sample(LINES, tmp_path / "out.jsonl", seed=5)
    settings = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    assert settings["sampler"] == {"model": "echo", "limits": {"new": 3}}
    assert [Decoding(**each) for each in settings["decodings"]] == list(TWO)
    assert (settings["seed"], settings["batch_size"], settings["versions"]) == (5, 3, {"echo": "1"})
    assert settings["input"]["examples"] == 7


def test_progress_is_told_after_every_batch(tmp_path: Path) -> None:
    told: list[Totals] = []
    totals = sample(LINES, tmp_path / "out.jsonl", progress=told.append)
    assert [each.examples for each in told] == [0, 3, 6, 7]
    assert told[-1] == totals


# Stopped and resumed


@pytest.mark.parametrize("error", [SampleError("no answer"), KeyboardInterrupt(), SystemExit(143)], ids=repr)
def test_a_run_that_was_stopped_goes_on_to_the_same_file(error: BaseException, tmp_path: Path) -> None:
    sample(LINES, tmp_path / "expected.jsonl")
    with pytest.raises(type(error)):
        sample(LINES, tmp_path / "out.jsonl", Echo(stop=ROWS[4]["instruction"], error=error))
    assert len(read(tmp_path / "out.jsonl.partial")) == 3
    assert not (tmp_path / "out.jsonl").exists()
    again = Echo()
    totals = sample(LINES, tmp_path / "out.jsonl", again, resume=True)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "expected.jsonl").read_bytes()
    assert again.asked == [row["instruction"] for row in ROWS[3:]]
    assert dataclasses.replace(totals, seconds=0) == Totals(7, 7, 21, cut=7, empty=14, prompts_cut=1, resumed=3)


def test_an_error_says_which_examples_it_is_about_and_what_is_kept(tmp_path: Path) -> None:
    with pytest.raises(SampleError) as caught:
        sample(LINES, tmp_path / "out.jsonl", Echo(stop=ROWS[6]["instruction"], error=SampleError("no answer")))
    assert str(caught.value) == (
        f"in the batch of examples 7 to 7: no answer\n6 complete examples are in {tmp_path / 'out.jsonl.partial'}; "
        "--resume goes on from there, also where a line of PROMPTS behind them was taken out"
    )


def test_a_run_that_fails_before_its_first_example_is_complete_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    """What mends it is often another option, with which a run cannot go on."""
    with pytest.raises(SampleError, match="no example is complete, so nothing was kept"):
        sample(LINES, tmp_path / "out.jsonl", Echo(stop=ROWS[0]["instruction"]))
    assert list(tmp_path.iterdir()) == []
    sample(LINES, tmp_path / "out.jsonl", Echo(facts={"model": "echo"}))


@pytest.mark.slow
def test_a_real_llm_gives_the_same_candidates_after_a_stop(llm: LocalLLM, tmp_path: Path) -> None:
    sample(LINES, tmp_path / "expected.jsonl", llm, decodings=PAPER)

    def stop(totals: Totals) -> None:
        if totals.examples == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(LINES, tmp_path / "out.jsonl", llm, decodings=PAPER, progress=stop)
    sample(LINES, tmp_path / "out.jsonl", llm, decodings=PAPER, resume=True)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "expected.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"batch_size": 4}, "batch_size was 3, is 4"),
        ({"sampler": Echo(facts={"model": "echo", "limits": {"new": 4}})}, "sampler.limits.new was 3, is 4"),
        ({"sampler": Echo(facts={"model": "echo"})}, "sampler.limits.new was 3, is not set"),
        ({"decodings": TWO[:1]}, "decodings was .*, is "),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_run_goes_on_only_with_its_own_settings(change: dict[str, Any], shown: str, tmp_path: Path) -> None:
    with pytest.raises(SampleError):
        sample(LINES, tmp_path / "out.jsonl", Echo(stop=ROWS[4]["instruction"]))
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    arguments = {"source": LINES, "resume": True, **change}
    with pytest.raises(OutputError, match=f"out.jsonl.partial belongs to another run .*{shown}"):
        sample(out=tmp_path / "out.jsonl", **arguments)
    assert (tmp_path / "out.jsonl.partial").read_bytes() == before


def test_other_versions_may_go_on_and_are_kept(tmp_path: Path) -> None:
    with pytest.raises(SampleError):
        sample(LINES, tmp_path / "out.jsonl", Echo(stop=ROWS[4]["instruction"]))
    said: list[str] = []
    sample(LINES, tmp_path / "out.jsonl", Echo(versions={"echo": "2"}), resume=True, say=said.append)
    settings = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    assert settings["versions"] == {"echo": "1"}
    assert [each["versions"] for each in settings["resumed_with"]] == [{"echo": "2"}]
    assert any("goes on with what is not as before: versions.echo was 1, is 2" in line for line in said)


@pytest.mark.parametrize(
    ("later", "shown"),
    [
        ([*LINES[3:4], *LINES[5:]], "input.examples was 7, is 6; input.sha256 was"),
        ([*LINES[3:4], LINES[4].replace(b"Count", b"Count to"), *LINES[5:]], "before: input.sha256 was"),
        ([], "input.examples was 7, is 3; input.sha256 was"),
    ],
    ids=["taken out", "changed", "all taken out"],
)
def test_a_run_goes_on_where_a_line_behind_the_finished_ones_was_changed_or_taken_out(
    later: list[bytes], shown: str, tmp_path: Path
) -> None:
    """So that one prompt which the LLM refuses does not cost what is finished."""
    with pytest.raises(SampleError):
        sample(LINES, tmp_path / "out.jsonl", Echo(stop=ROWS[4]["instruction"]))
    said: list[str] = []
    sample([*LINES[:3], *later], tmp_path / "out.jsonl", resume=True, say=said.append)
    sample([*LINES[:3], *later], tmp_path / "expected.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "expected.jsonl").read_bytes()
    assert any(shown in line for line in said)
    settings = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    expected = json.loads((tmp_path / "expected.jsonl.settings.json").read_text())
    assert settings["input"]["examples"] == 7
    assert [each["input"] for each in settings["resumed_with"]] == [expected["input"]]


@pytest.mark.parametrize("source", [LINES[:2], LINES[1:], [LINES[0], b'{"instruction": "other"}', *LINES[2:]]])
def test_a_run_does_not_go_on_where_a_finished_line_was_changed_or_taken_out(
    source: list[bytes], tmp_path: Path
) -> None:
    with pytest.raises(SampleError):
        sample(LINES, tmp_path / "out.jsonl", Echo(stop=ROWS[4]["instruction"]))
    before = (tmp_path / "out.jsonl.settings.json").read_bytes()
    with pytest.raises(OutputError, match=r"out.jsonl.partial is not of this run.* give the input as it was"):
        sample(source, tmp_path / "out.jsonl", resume=True)
    assert len(read(tmp_path / "out.jsonl.partial")) == 3
    assert (tmp_path / "out.jsonl.settings.json").read_bytes() == before


@pytest.mark.parametrize("spoil", [(b"Count 1", b"Count 9", 2), (b"}\n", b"}}\n", 1), (b"", b"[]\n", 1)], ids=str)
def test_a_partial_file_that_was_spoilt_is_refused(spoil: tuple[bytes, bytes, int], tmp_path: Path) -> None:
    with pytest.raises(SampleError):
        sample(LINES, tmp_path / "out.jsonl", Echo(stop=ROWS[4]["instruction"]))
    path, (old, new, number) = tmp_path / "out.jsonl.partial", spoil
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(OutputError, match=f"line {number} of .*out.jsonl.partial is not of this run"):
        sample(LINES, tmp_path / "out.jsonl", resume=True)


@pytest.mark.parametrize("kept", [40, 400, 500], ids=lambda kept: f"{kept} bytes left")
def test_a_file_torn_within_a_batch_goes_on_to_the_same_file(kept: int, tmp_path: Path) -> None:
    """Its complete lines stay, and the others are what they would have been."""
    sample(LINES, tmp_path / "expected.jsonl")
    whole = (tmp_path / "expected.jsonl").read_bytes()
    with pytest.raises(SampleError):
        sample(LINES, tmp_path / "out.jsonl", Echo(stop=ROWS[6]["instruction"]))
    (tmp_path / "out.jsonl.partial").write_bytes(whole[:kept])
    assert sample(LINES, tmp_path / "out.jsonl", resume=True).resumed == whole[:kept].count(b"\n")
    assert (tmp_path / "out.jsonl").read_bytes() == whole


# What is refused


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "line 2: not JSON"),
        (b'{"question": "a"}', "line 2: has no field 'instruction'; found 'question'"),
        (b'{"instruction": 3}', "line 2: instruction must be a str, got int 3"),
        (b'{"instruction": "a", "samples": []}', "line 2: has a field 'samples' already"),
        (b'{"instruction": "a", "cut": null}', "line 2: has a field 'cut' already"),
        (b'{"instruction": "refused"}', "instruction 2 is too long"),
    ],
)
def test_a_bad_line_is_refused_before_anything_is_sampled(line: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(LINES[0] + line)
    sampler = Echo()
    with pytest.raises(SampleError, match=problem):
        sample(tmp_path / "in.jsonl", tmp_path / "out.jsonl", sampler, batch_size=1)
    assert sampler.asked == []
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_what_cannot_be_read_or_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=r"the instructions cannot be read: .*none\.jsonl"):
        sample(tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    (tmp_path / "torn.gz").write_bytes(gzip.compress(b"".join(LINES))[:-9])
    with pytest.raises(SampleError, match="the instructions cannot be read"):
        sample(tmp_path / "torn.gz", tmp_path / "out.jsonl")
    with pytest.raises(SampleError, match="the input holds no instructions"):
        sample([b" \n"], tmp_path / "out.jsonl")
    for name in ("out.jsonl.gz", "out.json", "out"):
        with pytest.raises(SampleError, match=rf"choose a name that ends in \.jsonl, not .*{name}$"):
            sample(LINES, tmp_path / name)
    with pytest.raises(OutputError, match="nothing to resume"):
        sample(LINES, tmp_path / "out.jsonl", resume=True)
