"""Commands that read JSON Lines refuse a file whose name is that of another format, and say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from cappy_engine.cli.main import main
from tests.support.places import MINI


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv.gz", "rows.parquet"])
@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "promptsource", "FILE"],
        ["tune", "--pairs", "FILE"],
        ["export", str(MINI), "out", "--pairs", "FILE"],
        ["adapt", str(MINI), "FILE", "out", "--from-samples"],
    ],
    ids=lambda words: words[0],
)
def test_a_file_that_its_name_says_is_not_json_lines_is_told_as_what_it_is(
    command: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("instruction,response\nIs the sky blue?,Yes\n")
    assert main([word.replace("FILE", name) for word in command]) == 1
    kind = {"rows.csv": "CSV", "rows.tsv.gz": "TSV", "rows.parquet": "Parquet"}[name]
    assert f"{name} is {kind}, and JSON Lines are read here; convert it first" in capsys.readouterr().err
