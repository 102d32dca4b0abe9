"""Files that a run did not write are never replaced or removed, whatever they are called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cappy_engine import Scorer
from cappy_engine.bulk.resume.names import Names
from cappy_engine.bulk.resume.partial_file import open_growing
from cappy_engine.errors import OutputError
from cappy_engine.storage import json_bytes
from tests.support.bulk_files import WINDOW, Stop, pairs_of, run, stopped, write_rows

SETTINGS = {"model": "m", "seed": 0}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "in.jsonl", pairs_of(3 * WINDOW))


@pytest.mark.parametrize("name", ["settings.json.new", "progress.json", "progress.json.new"])
@pytest.mark.parametrize("content", [b"mine", b'{"seed": 0}\n', b'{\n  "bytes of mine": 1}', None], ids=repr)
def test_a_file_or_folder_of_any_of_our_names_is_not_lost(content: bytes | None, name: str, out: Path) -> None:
    mine = out.with_name(f"out.jsonl.{name}")
    if content is None:
        mine.mkdir()
    else:
        mine.write_bytes(content)
    problem = f"out.jsonl.{name} is in the way, and not of such a run"
    with open_growing(Names(out), resume=False) as growing, pytest.raises(OutputError, match=problem):
        growing.begin(SETTINGS, {})
    assert list(out.parent.iterdir()) == [mine]
    assert content is None or mine.read_bytes() == content


@pytest.mark.parametrize("size", [0, 1, 4, 10, 100])
def test_what_a_killed_run_left_of_its_settings_is_replaced(size: int, out: Path) -> None:
    settings = Names(out).settings
    settings.with_name(f"{settings.name}.new").write_bytes(json_bytes(SETTINGS)[:size])
    with open_growing(Names(out), resume=False) as growing:
        growing.begin(SETTINGS, {})
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.jsonl.partial", "out.jsonl.settings.json"]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["settings.json", "progress.json", "made"])
def test_files_of_the_user_beside_an_output_are_not_lost(
    name: str, force: bool, resume: bool, tmp_path: Path, source: Path, scorer: Scorer
) -> None:
    pytest.importorskip("pyarrow")
    mine = tmp_path / f"out.parquet.{name}"
    mine.write_bytes(b'{"mine": 1}')
    with pytest.raises(OutputError, match=f"out.parquet.{name} is in the way, and not of such a run; move or remove"):
        run(scorer, source, tmp_path / "out.parquet", force=force, resume=resume)
    assert mine.read_bytes() == b'{"mine": 1}'
    assert {path.name for path in tmp_path.iterdir()} == {mine.name, source.name}
    run(scorer, source, tmp_path / "out.jsonl")  # for which this is no name of ours


def test_a_file_of_the_user_that_appears_during_a_run_is_not_lost(
    tmp_path: Path, source: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    out, made = tmp_path / "out.parquet", tmp_path / "out.parquet.made"
    stopped(monkeypatch, 2, lambda: run(scorer, source, out))
    made.write_bytes(b"mine")
    for _ in range(2):
        with pytest.raises(OutputError, match=r"out\.parquet\.made is in the way"):
            run(scorer, source, out, resume=True)
    assert made.read_bytes() == b"mine"
    made.unlink()
    assert run(scorer, source, out, resume=True).pairs_before == WINDOW


@pytest.mark.parametrize("goes_on", [True, False])
def test_what_a_killed_run_left_of_the_complete_file_is_replaced(
    goes_on: bool, tmp_path: Path, source: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    out, made = tmp_path / "out.parquet", tmp_path / "out.parquet.made"

    def stop(*args: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("cappy_engine.bulk.formats.tables.write_parquet_of", stop)
        with pytest.raises(Stop):
            run(scorer, source, out)
    assert made.exists()
    made.write_bytes(bytes(100_000))  # more than it will be
    run(scorer, source, out, resume=goes_on, force=not goes_on)
    assert {path.name for path in tmp_path.iterdir()} == {out.name, source.name}
    run(scorer, source, tmp_path / "whole.parquet")
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_a_mark_that_is_not_one_is_an_error_and_what_was_written_is_kept(
    tmp_path: Path, source: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    stopped(monkeypatch, 2, lambda: run(scorer, source, out))
    names = Names(out)
    before = names.partial.read_bytes()
    names.progress.write_text(json.dumps({"mine": 1}))
    with pytest.raises(OutputError, match=r"out\.jsonl\.progress\.json cannot be read \(it is not of such a run\)"):
        run(scorer, source, out, resume=True)
    assert names.partial.read_bytes() == before
    assert json.loads(names.progress.read_text()) == {"mine": 1}


def test_an_output_through_a_link_leaves_nothing_beside_it(
    tmp_path: Path, source: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    out = tmp_path / "link.jsonl"
    out.symlink_to("real/out.jsonl")
    (tmp_path / "bad.jsonl").symlink_to("real/bad.jsonl")
    stopped(monkeypatch, 2, lambda: run(scorer, source, out, rejects=tmp_path / "bad.jsonl"))

    def stop(*args: object) -> None:
        raise Stop

    with pytest.raises(Stop):
        run(scorer, source, out, resume=True, rejects=tmp_path / "bad.jsonl", done=stop)
    said: list[str] = []
    run(scorer, source, out, resume=True, rejects=tmp_path / "bad.jsonl", say=said.append)
    assert said == [f"{tmp_path}/real/out.jsonl is complete already"]
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == ["bad.jsonl", "out.jsonl"]
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link.jsonl", "bad.jsonl", source.name}


def test_an_output_and_its_rejects_are_two_files(tmp_path: Path, source: Path, scorer: Scorer, out: Path) -> None:
    link = tmp_path / "bad.jsonl"
    link.symlink_to(out.name)
    with pytest.raises(OutputError, match=r"--rejects and -o are both .*out\.jsonl; choose another name"):
        run(scorer, source, out, rejects=link)
    assert {path.name for path in tmp_path.iterdir()} == {link.name, source.name}
