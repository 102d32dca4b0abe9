"""The report's pictures show the figures, each beside its runner's name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cappy_bench.machine import cpu_kind
from cappy_bench.speed import plots, report
from cappy_bench.speed.figures import figures
from cappy_bench.speed.marks import COLOURS, Bar, Line, Point, colour_of
from cappy_bench.speed.plots import draw_error_speed, draw_latency, draw_throughput
from cappy_bench.speed.report import draw_plots, section
from tests.support.fake_tools import FakeTool, Measure, runner_of, spec, true_score

TEXT = re.compile(
    r'<text [^>]*?transform="(?:rotate\(-?0 |translate\()(?P<x>[\d.]+) (?P<y>[\d.]+)\)"[^>]*>(?P<text>[^<]*)'
)


@pytest.fixture
def varied(measure: Measure) -> dict[str, Any]:
    """Give a result of two rounds, of which the second took three times as long; one runner is wrong."""
    tools = [
        FakeTool(spec("cappy")),
        FakeTool(spec("peer", "int8"), slowness=2.0, score=lambda pair: round(true_score(pair), 2)),
        FakeTool(spec("off"), score=lambda pair: true_score(pair) + 1),
    ]
    result = measure(*tools)
    for runner in result["runners"]:
        for cell in runner["cells"]:
            cell["seconds"] = [cell["seconds"][0], [3 * second for second in cell["seconds"][1]]]
    return result


@pytest.fixture
def drawn(varied: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, tuple[Any, str]]:
    """Give what each picture is drawn of, and its title."""
    found: dict[str, tuple[Any, str]] = {}
    for name in ("throughput", "latency", "error_speed"):

        def keep(marks: Any, path: Path, *, title: str, name: str = name) -> None:
            found[name] = (marks, title)

        monkeypatch.setattr(report, f"draw_{name}", keep)
    draw_plots(varied, tmp_path, "fakes")
    return found


def test_bars_are_the_figures_of_each_workload_and_a_wrong_runner_has_none(
    varied: dict[str, Any], drawn: dict[str, tuple[Any, str]]
) -> None:
    bars = {(bar.workload, bar.runner): bar for bar in drawn["throughput"][0]}
    assert {workload for workload, _ in bars} == set(report.PLOTTED)
    for workload in varied["workloads"]:
        if workload["name"] in report.PLOTTED:
            for name in ("cappy", "peer"):
                figure, bar = figures(varied, runner_of(varied, name), workload), bars[workload["name"], name]
                assert figure is not None
                assert (bar.tokens_per_second, bar.spread) == (figure.tokens_per_second, figure.spread)
                assert not bar.is_wrong
                assert bar.spread[1] == pytest.approx(3 * bar.spread[0])
            wrong = bars[workload["name"], "off"]
            assert (wrong.is_wrong, wrong.tokens_per_second) == (True, 0)


def test_lines_are_median_milliseconds_of_each_length(
    varied: dict[str, Any], drawn: dict[str, tuple[Any, str]]
) -> None:
    """Two pairs of each length in two rounds, of which the second takes three times as long: means of the rounds."""
    place, workload = next((at, one) for at, one in enumerate(varied["workloads"]) if one["name"] == "lengths")
    lines = {line.runner: line for line in drawn["latency"][0]}
    assert set(lines) == {"cappy", "peer"}
    for name, line in lines.items():
        first = np.array(runner_of(varied, name)["cells"][place]["seconds"][0])
        assert line.tokens == workload["steps"]
        assert line.milliseconds == pytest.approx(2000 * first.reshape(6, 2).mean(axis=1))


def test_a_line_is_of_the_median_round_and_of_the_median_pair_of_each_length(
    measure: Measure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = measure(FakeTool(spec("cappy")))
    (cell,) = (one for one in runner_of(result, "cappy")["cells"] if one["workload"] == "lengths")
    cell["seconds"] = [[1.0, 2.0, 9.0] * 6, [50.0, 60.0, 70.0] * 6, [2.0, 3.0, 30.0] * 6]
    drawn: list[Any] = []
    monkeypatch.setattr(report, "draw_latency", lambda lines, path, *, title: drawn.extend(lines))
    draw_plots(result, tmp_path, "fakes")
    assert [line.milliseconds for line in drawn] == [[3000.0] * 6]


def test_points_are_the_largest_error_and_the_speed_on_bulk(
    varied: dict[str, Any], drawn: dict[str, tuple[Any, str]]
) -> None:
    bulk = next(one for one in varied["workloads"] if one["name"] == "bulk")
    points = {point.runner: point for point in drawn["error_speed"][0]}
    assert set(points) == {"cappy", "peer"}
    for name, point in points.items():
        runner = runner_of(varied, name)
        figure = figures(varied, runner, bulk)
        assert figure is not None
        assert (point.max_error, point.tokens_per_second) == (runner["parity"]["max_error"], figure.tokens_per_second)
        assert (point.precision, point.is_ours) == (runner["precision"], name == "cappy")


def test_titles_and_the_page_name_the_cpu_and_the_threads_that_were_used(
    varied: dict[str, Any], drawn: dict[str, tuple[Any, str]]
) -> None:
    machine = {"cpu": "Some(R) CPU", "cores": 64, "instruction_sets": ["avx2"], "memory_bytes": 2**33}
    machine |= {"system": "Linux 6", "python": "3.12"}
    assert {title for _, title in drawn.values()} == {
        f"fakes ({cpu_kind(varied['machine'])}, {varied['settings']['threads']} threads)"
    }
    peak = {"fp32": {"flops": 1.5e11, "how": "a product", "rounds": [5e10, 1.5e11, 7e10]}}
    settings = {**varied["settings"], "threads": 3}
    page = section({**varied, "machine": machine, "settings": settings, "peak": {**varied["peak"], **peak}}, "fakes")
    assert page.startswith("## fakes on Some CPU, AVX2\n")
    assert "Some(R) CPU, 64 cores (avx2), 8 GiB, Linux 6, Python 3.12; 3 threads." in page
    assert "fp32: 150 Gop/s (a product; by round 50, 150, 70, median 70)" in page


def test_a_bar_has_its_own_name_and_speed_and_a_wrong_one_says_so(tmp_path: Path) -> None:
    bars = [
        Bar("bulk", "slow", "fp32", False, 1111.0, (1000.0, 1234.0), False),
        Bar("bulk", "off", "int8", False, 0.0, (0.0, 0.0), True),
        Bar("bulk", "cappy", "fp32", True, 3333.0, (3000.0, 4567.0), False),
        Bar("bulk", "other", "int8", False, 22.2, (20.0, 25.0), False),
    ]
    draw_throughput(bars, tmp_path / "bars.svg", title="made up")
    texts = [found.groupdict() for found in TEXT.finditer((tmp_path / "bars.svg").read_text(encoding="utf-8"))]
    heights = {each["text"]: float(each["y"]) for each in texts}
    for name, speed in (("slow", "1,111"), ("cappy", "3,333"), ("other", "22.2"), ("off", "wrong")):
        assert heights[name] == pytest.approx(heights[speed], abs=3)
    assert heights["cappy"] < heights["slow"] < heights["other"] < heights["off"], "the fastest is on top"


@pytest.mark.slow
def test_each_name_belongs_to_its_own_end_and_they_stand_in_the_order_of_their_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    speeds = {"slow": 1000.0, "cappy": 1020.0, "other": 1010.0, "off": 500.0}
    errors = {"slow": 1e-6, "cappy": 2e-6, "other": 3e-6, "off": float("nan")}
    points = [Point(name, "fp32", name == "cappy", errors[name], speeds[name]) for name in speeds]
    draw_error_speed(points, tmp_path / "error.svg", title="made up")
    texts = [found.groupdict() for found in TEXT.finditer((tmp_path / "error.svg").read_text(encoding="utf-8"))]
    heights = {each["text"]: float(each["y"]) for each in texts}
    assert heights["cappy"] < heights["other"] < heights["slow"] < heights["off"], "the fastest is on top"
    ends: dict[str, tuple[float, float]] = {}
    monkeypatch.setattr(
        plots, "name_ends", lambda figure, axes, of, at: ends.update(zip((one.runner for one in of), at, strict=True))
    )
    draw_error_speed(points, tmp_path / "error.svg", title="made up")
    assert ends == {name: (1.0 if name == "off" else errors[name], speeds[name]) for name in speeds}
    lines = [Line(name, "fp32", False, [16, 32], [speed / 2, speed]) for name, speed in speeds.items()]
    draw_latency(lines, tmp_path / "latency.svg", title="made up")
    assert ends == {name: (32, speed) for name, speed in speeds.items()}


def test_ours_are_dark_and_others_light_in_the_colour_of_their_precision() -> None:
    def brightness(colour: str) -> int:
        return sum(bytes.fromhex(colour[1:]))

    for precision in ("fp32", "fp16", "bf16", "int8"):
        ours, others = colour_of(precision, is_ours=True), colour_of(precision, is_ours=False)
        assert brightness(ours) < brightness(others)
    assert len({colour for pair in COLOURS.values() for colour in pair}) == 2 * len(COLOURS)
