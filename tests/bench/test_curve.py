"""`cappy bench curve` draws logs of training, and refuses what is not one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from cappy_bench.quality import curve_plot
from cappy_bench.quality.curve_plot import plot_curves
from cappy_engine.cli.main import main


def write_log(folder: Path, *, holds_out: bool = True) -> Path:
    folder.mkdir()
    steps = [{"step": step, "loss": 1 / step, "gradient_norm": 2.0, "tokens_per_second": 900} for step in range(1, 9)]
    ends = [{"step": step, "held_out_loss": 0.2, "constant_loss": 0.22} for step in (0, 8)]
    lines = [json.dumps(entry) for entry in ([ends[0], *steps, ends[1]] if holds_out else steps)]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.slow
def test_logs_of_folders_and_files_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write_log(tmp_path / "first"), write_log(tmp_path / "second")
    plot = tmp_path / "curve.svg"
    assert main(["bench", "curve", str(first), str(second / "log.jsonl"), str(plot)]) == 0
    assert capsys.readouterr().out == f"{plot}\n"
    drawn = plot.read_text()
    assert all(text in drawn for text in ("first, held out", "second, the best constant", "gradient norm"))
    assert main(["bench", "curve", str(first), str(plot)]) == 1  # it exists
    assert main(["bench", "curve", str(first), str(plot), "--force"]) == 0


def test_lines_are_the_steps_figures_and_the_losses_on_what_was_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = Figure()
    monkeypatch.setattr(curve_plot, "write_plot", lambda draw, path, *, force: draw(figure))
    steps = [
        {"step": step, "loss": 1 / step, "gradient_norm": 2.0 * step, "tokens_per_second": 900 + step}
        for step in (1, 2, 4)
    ]
    ends = [{"step": 0, "held_out_loss": 0.5, "constant_loss": 0.22}, {"step": 4, "held_out_loss": 0.2}]
    plot_curves({"run": [ends[0], *steps, ends[1]]}, Path("curve.svg"), force=False)
    loss, norm, speed = ([np.asarray(line.get_xydata()) for line in axes.lines] for axes in figure.axes)
    assert loss[0].tolist() == [[1, 1], [2, 0.5], [4, 0.25]]
    assert loss[1].tolist() == [[0, 0.5], [4, 0.2]]
    assert loss[2][:, 1].tolist() == [0.22, 0.22]
    assert [line.tolist() for line in norm] == [[[1, 2], [2, 4], [4, 8]]]
    assert [line.tolist() for line in speed] == [[[1, 901], [2, 902], [4, 904]]]


def test_a_training_that_held_nothing_out_has_its_name_in_the_plot(tmp_path: Path) -> None:
    logs = [str(write_log(tmp_path / name, holds_out=name == "third")) for name in ("first", "second", "third")]
    assert main(["bench", "curve", *logs, str(tmp_path / "curve.svg")]) == 0
    drawn = (tmp_path / "curve.svg").read_text()
    assert all(f">{text}<" in drawn for text in ("first", "second", "third, held out"))
    assert ">third<" not in drawn


@pytest.mark.slow
@pytest.mark.parametrize("half", [b'{"st', b'{"step": 9, "loss": 0.1, "grad', b'{"step": 9, "note": "\xc3'])
def test_a_last_line_that_was_not_written_to_its_end_is_left_out_and_said(
    tmp_path: Path, half: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_log(tmp_path / "run")
    assert main(["bench", "curve", str(folder), str(tmp_path / "whole.svg")]) == 0
    assert capsys.readouterr().err == ""
    with (folder / "log.jsonl").open("ab") as log:
        log.write(half)
    assert main(["bench", "curve", str(folder), str(tmp_path / "cut.svg")]) == 0
    assert f"leaving out the last line of {folder / 'log.jsonl'}: it is not complete" in capsys.readouterr().err
    assert (tmp_path / "cut.svg").read_bytes() == (tmp_path / "whole.svg").read_bytes()


def test_a_last_line_without_a_line_break_that_is_complete_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = write_log(tmp_path / "run") / "log.jsonl"
    log.write_bytes(log.read_bytes().rstrip())
    assert main(["bench", "curve", str(log), str(tmp_path / "curve.svg")]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("behind", ['{"st\n', '\n{"st', '{"st\n{"step": 9}'])
def test_any_other_line_that_is_not_whole_is_refused(
    tmp_path: Path, behind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_log(tmp_path / "run")
    with (folder / "log.jsonl").open("a") as log:
        log.write(behind)
    assert main(["bench", "curve", str(folder), str(tmp_path / "curve.svg")]) == 1
    assert "log.jsonl is not a log of cappy adapt" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "not JSON", "[]", '{"loss": 1}'])
def test_what_is_no_log_is_named(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.jsonl").write_text(content)
    assert main(["bench", "curve", str(tmp_path), str(tmp_path / "curve.svg")]) == 1
    assert "log.jsonl is not a log of cappy adapt" in capsys.readouterr().err
