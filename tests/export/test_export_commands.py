"""`cappy export`, `adapt` and `verify` on the command line: help, wrong usage, options out of range."""

from __future__ import annotations

from pathlib import Path

import pytest

from cappy_engine.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "status", "problem"),
    [
        ("export checkpoint", 2, "Missing argument 'BUNDLE'"),
        ("export checkpoint OUT --precision fp64", 2, "'fp64' is not one of 'fp32', 'fp16', 'bf16', 'int8'"),
        ("export checkpoint OUT --precision fp32,int8", 2, "repeat the option: --precision fp32 --precision int8"),
        ("export checkpoint OUT --precision fp32 int8", 2, "for each value: --precision ... --precision int8"),
        ("export checkpoint OUT --max-length -3", 2, "'--max-length': -3 is not in the range x>=1"),
        ("export checkpoint OUT --limit nonsense", 1, "'nonsense'"),
        ("export checkpoint OUT --limit fp64.max_error=1", 1, "'fp64.max_error=1'"),
        ("export checkpoint OUT --limit fp32.min_spearman=97", 2, "min_spearman must be -1 to 1, got 97"),
        ("verify bundle --checkpoint OUT --limit fp32.max_error=-1", 2, "max_error must be 0 or more, and finite"),
        ("verify bundle", 2, "Missing option '--checkpoint'"),
        ("adapt checkpoint train.jsonl", 2, "Missing argument 'OUT'"),
        ("adapt checkpoint train.jsonl OUT --held-out-fraction 1", 2, "held_out_fraction must be 0 or more and less"),
        ("adapt checkpoint train.jsonl OUT --batch-size 0", 2, "'--batch-size': 0 is not in the range x>=1"),
        ("adapt checkpoint train.jsonl OUT --learning-rate 0", 2, "learning_rate must be a number above 0, got 0.0"),
        ("adapt checkpoint train.jsonl OUT --learning-rate nan", 2, "learning_rate must be finite, got nan"),
    ],
)
def test_an_option_out_of_range_is_refused_at_once(
    arguments: str, status: int, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main([out if word == "OUT" else word for word in arguments.split()]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert problem in captured.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["export", "verify", "adapt"])
def test_help_shows_the_options_of_the_dataclass_and_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"\n\nexamples:\n  cappy {command} " in out
    flag = {"export": "--float32-product PART", "verify": "--limit PRECISION.NAME=VALUE", "adapt": "--warmup-fraction"}
    assert flag[command] in out
