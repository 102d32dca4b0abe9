"""`cappy score --ray`: which options go with it, and what is told before a cluster is asked for anything."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cappy_engine.bulk.ray.pool import ClusterOptions
from cappy_engine.cli.main import main
from tests.support.bulk_files import pairs_of, write_rows


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    pytest.importorskip("pyarrow")
    return write_rows(tmp_path / "a.parquet", pairs_of(5))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--ray"], "--ray writes a folder; name it with -o"),
        (["--ray", "-o", "-"], "--ray writes a folder; name it with -o"),
        (["-o", "out", "--force", "--ray"], "--ray writes a new folder; remove the one that is there, and leave out"),
        (
            ["-o", "out", "--on-error", "skip", "--ray"],
            "--ray leaves bad rows out only if they are listed; name a folder",
        ),
        (["-o", "out", "--on-error", "stop", "--rejects", "bad", "--ray"], "--rejects leaves bad rows out; give it"),
        (["-o", "out", "--rejects", "out", "--ray"], "--rejects and -o are both out; choose another name"),
        (
            ["-o", "out", "--gpu", "0", "--device", "cuda", "--ray"],
            "--ray gives each actor a GPU of its own; leave out",
        ),
        (["-", "-o", "out", "--ray"], "--ray reads Parquet files, and - is a stream; name files or folders"),
        (
            ["-o", "out", "--ray", "other.parquet"],
            "'other.parquet' is not the address of a Ray cluster; it is HOST:PORT",
        ),
        (["-o", "out", "--ray=ray://head:10001"], "'ray://head:10001' is not the address of a Ray cluster"),
    ],
)
def test_options_that_do_not_go_with_a_cluster_are_wrong_usage(
    arguments: list[str], problem: str, samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", str(samples), *arguments]) == 2
    assert problem in " ".join(capsys.readouterr().err.split())


def test_files_in_place_of_the_address_are_told_so_before_files_are_missed(
    samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", "--ray", str(samples), "-o", "out"]) == 2
    assert "is not the address of a Ray cluster" in capsys.readouterr().err


def test_without_ray_a_command_says_what_to_install(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["score", str(samples), "-o", str(tmp_path / "out"), "--ray"]) == 1
    assert "needs the package 'ray'; in a clone of cappy-engine, run: pip install -c" in capsys.readouterr().err
    assert not (tmp_path / "out.partial").exists()


def test_rows_that_are_not_parquet_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow")
    rows = write_rows(tmp_path / "a.jsonl", pairs_of(5))
    assert main(["score", str(rows), "-o", str(tmp_path / "out"), "--ray", "10.0.0.1:6379"]) == 1
    assert "a.jsonl is JSON Lines, and a cluster takes Parquet only" in capsys.readouterr().err


@pytest.mark.parametrize("rejects", ["out/bad", "out.partial", "out.partial/bad", "link", "link/bad", "."])
def test_bad_rows_go_to_a_folder_apart_from_the_results(
    rejects: str, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the results could not get their name in the end, or the bad rows were removed."""
    (tmp_path / "link").symlink_to("out")
    arguments = ["score", str(samples), "-o", str(tmp_path / "out"), "--rejects", str(tmp_path / rejects)]
    assert main([*arguments, "--ray", "10.0.0.1:6379"]) == 1
    problem = f"{tmp_path / rejects} and {tmp_path / 'out'} are one, or one in the other; choose a folder beside it"
    assert problem in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "link"]


@pytest.mark.parametrize(
    "wrong", [{"address": "10.0.0.1"}, {"address": ""}, {"address": None}, {"actors": 0}, {"slice_rows": 0}]
)
def test_options_of_a_cluster_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"is not the address|actors|slice_rows"):
        ClusterOptions(**wrong)  # type: ignore[arg-type]
