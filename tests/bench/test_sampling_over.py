"""Candidates over a file that exists: it and its settings stay until the new ones are complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cappy_bench.candidates.decodings import choose_decodings
from cappy_bench.candidates.sample_options import SampleOptions
from cappy_bench.candidates.sampling import Totals, sample_file
from cappy_engine.bulk.folders import files_of_folder
from cappy_engine.bulk.output import replacement
from cappy_engine.errors import OutputError, SampleError
from tests.support.echo import Echo

LINES = [json.dumps({"instruction": f"Count {number}"}).encode() + b"\n" for number in range(7)]
TWO = choose_decodings(["greedy", "sampling"], count=2)


def sample(out: Path, *, stop: int | None = None, seed: int = 1, resume: bool = False, force: bool = False) -> Totals:
    echo = Echo(stop=None if stop is None else f"Count {stop}")
    return sample_file(LINES, out, echo, TWO, SampleOptions(seed=seed, batch_size=3, resume=resume, force=force))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A complete file, sampled with the seed 0."""
    sample(tmp_path / "out.jsonl", seed=0)
    return tmp_path / "out.jsonl"


def settings_beside(out: Path) -> Path:
    return out.with_name(out.name + ".settings.json")


def seed_beside(out: Path) -> int:
    return int(json.loads(settings_beside(out).read_text())["seed"])


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_stopped_run_says_how_to_go_on_and_what_force_would_remove(out: Path, tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=r"out.jsonl.partial; --resume --force goes on from there"):
        sample(out, stop=4, force=True)
    for resume in (False, True):
        with pytest.raises(OutputError, match=r"exists beside .* with --resume --force \(--force alone starts anew\)"):
            sample(out, resume=resume)
    assert len((tmp_path / "out.jsonl.partial").read_bytes().splitlines()) == 3
    assert sample(out, resume=True, force=True).resumed == 3


@pytest.mark.parametrize("stop", [0, 4], ids=["before anything is complete", "later"])
def test_settings_beside_a_file_stay_its_own_until_it_is_replaced(stop: int, out: Path, tmp_path: Path) -> None:
    before, settings = out.read_bytes(), settings_beside(out).read_bytes()
    for _ in range(2):
        with pytest.raises(SampleError, match="stopped"):
            sample(out, stop=stop, force=True)
        assert (out.read_bytes(), settings_beside(out).read_bytes()) == (before, settings)
    sample(out, force=True, resume=stop > 0)
    assert seed_beside(out) == 1
    assert names_in(tmp_path) == ["out.jsonl", "out.jsonl.settings.json"]
    sample(tmp_path / "expected.jsonl")
    assert out.read_bytes() == (tmp_path / "expected.jsonl").read_bytes()


def test_a_stopped_run_goes_on_where_the_file_was_moved_away(out: Path, tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="stopped"):
        sample(out, stop=4, force=True)
    out.rename(tmp_path / "old.jsonl")
    assert sample(out, resume=True).resumed == 3
    assert seed_beside(out) == 1
    assert names_in(tmp_path) == ["old.jsonl", "out.jsonl", "out.jsonl.settings.json"]


def test_a_stopped_run_goes_on_over_a_file_that_has_come(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(SampleError, match="stopped"):
        sample(out, stop=4)
    out.write_text("{}\n")
    assert sample(out, resume=True, force=True).resumed == 3
    assert seed_beside(out) == 1


def test_what_a_stopped_run_over_a_file_left_is_nothing_to_a_new_one(out: Path, tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="stopped"):
        sample(out, stop=4, force=True, seed=2)
    out.rename(tmp_path / "old.jsonl")
    sample(out, force=True)
    assert seed_beside(out) == 1
    assert names_in(tmp_path) == ["old.jsonl", "out.jsonl", "out.jsonl.settings.json"]


def test_a_users_file_with_the_name_of_the_settings_in_the_making_is_not_lost(out: Path, tmp_path: Path) -> None:
    mine = tmp_path / "out.jsonl.partial.settings.json"
    mine.write_text('{"mine": 1}')
    with pytest.raises(OutputError, match=r"partial\.settings\.json is in the way, and not of such a run"):
        sample(out, force=True)
    assert mine.read_text() == '{"mine": 1}'
    assert seed_beside(out) == 0


def test_settings_that_must_be_moved_with_the_file_are_named(out: Path) -> None:
    with pytest.raises(SampleError, match="stopped"):
        sample(out, stop=4, force=True)
    with pytest.raises(OutputError, match=r"move it and .*out\.jsonl\.settings\.json away and go on with --resume"):
        sample(out)


def test_a_run_that_is_stopped_as_it_replaces_the_file_can_be_gone_on_with(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(replacement, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            sample(out, force=True)
    assert sample(out, resume=True, force=True).resumed == 7
    assert seed_beside(out) == 1
    assert names_in(tmp_path) == ["out.jsonl", "out.jsonl.settings.json"]


def test_a_run_that_was_killed_as_it_began_over_a_file_begins_anew(out: Path, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.partial").touch()
    assert sample(out, resume=True, force=True).resumed == 0
    assert seed_beside(out) == 1


def test_what_a_stopped_run_keeps_beside_a_file_is_no_input(out: Path, tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="stopped"):
        sample(out, stop=4, force=True)
    assert files_of_folder(tmp_path) == [(out, Path("out.jsonl"))]


def test_the_instructions_are_not_replaced_by_their_candidates(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(b"".join(LINES))
    for source in (prompts, str(prompts)):
        with pytest.raises(OutputError, match=r"prompts\.jsonl"):
            sample_file(source, prompts, Echo(), TWO, SampleOptions(force=True))
    assert prompts.read_bytes() == b"".join(LINES)
    assert names_in(tmp_path) == ["prompts.jsonl"]
