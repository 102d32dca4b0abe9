"""A run goes on only from notes of the same: of the machine, model, texts, threads, code and tools."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from cappy_bench.machine import describe_machine
from cappy_bench.peers.cappy import default_settings
from cappy_bench.peers.peer import Model
from cappy_bench.peers.process import start_worker
from cappy_bench.peers.specs import SPECS
from cappy_bench.speed import measure as measuring
from cappy_bench.speed.run_options import RunOptions
from cappy_bench.speed.suite import Plan
from cappy_engine import Scorer
from cappy_engine.bundle import EMBEDDED, MANIFEST, open_bundle, seal
from cappy_engine.cpu.execution import Execution
from cappy_engine.cpu.tuned import prepare_folder, tuned_key, tuning_facts, write_tuned
from cappy_engine.errors import BenchmarkError
from tests.support.bundles import copy_bundle
from tests.support.places import MINI, ROOT

PAIRS = ROOT / "export" / "cappy_export" / "proof" / "parity_pairs.jsonl"
Begin = Callable[..., tuple[Model, Path]]


class Stopped(Exception):
    """Ends a run where the suite would begin."""


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Begin:
    """Give a function that begins a run, and returns its model and the file of its notes."""
    seen: list[tuple[Model, Path]] = []

    def stop(plan: Plan, *, notes: Path, **others: object) -> None:
        seen.append((plan.model, notes))
        raise Stopped

    usual: dict[str, Any] = {"suite": "smoke", "pairs": PAIRS, "work": tmp_path / "work"}

    def begin_run(**options: Any) -> tuple[Model, Path]:
        with pytest.raises(Stopped):
            measuring.measure(RunOptions(**{**usual, **options}), say=print)
        return seen[-1]

    monkeypatch.setattr(measuring, "run_suite", stop)
    monkeypatch.chdir(tmp_path)
    return begin_run


@pytest.mark.slow
def test_a_result_tells_whether_its_run_was_resumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    is_stopped = iter([True, False, False])

    def run_suite(plan: Plan, *, notes: Path, **others: object) -> dict[str, Any]:
        notes.touch()
        if next(is_stopped):
            raise Stopped
        return {"workloads": [one.describe() for one in plan.workloads], "runners": []}

    monkeypatch.setattr(measuring, "run_suite", run_suite)
    options = RunOptions(suite="smoke", pairs=PAIRS, work=tmp_path / "work", out=tmp_path / "result.json", force=True)
    with pytest.raises(Stopped):
        measuring.measure(options, say=print)
    assert [measuring.measure(options, say=print)["is_resumed"] for _ in range(2)] == [True, False]


@pytest.mark.slow
def test_no_tool_finds_what_it_converted_of_another_model(begin: Begin, tmp_path: Path) -> None:
    """Tools convert a checkpoint once, and then take what lies in their folder."""
    other = shutil.copytree(MINI, tmp_path / MINI.name)
    copy = copy_bundle(tmp_path / "bundle")
    manifest = json.loads((copy / MANIFEST).read_bytes())
    del manifest["source"]["files"]  # else it is refused beside another checkpoint
    (copy / MANIFEST).write_text(json.dumps(seal(manifest)))
    folders = [begin(bundle=copy, checkpoint=path)[0].folder for path in (MINI, MINI, other)]
    config, weights = other / "config.json", other / "model.safetensors"
    config.write_text(config.read_text() + "\n")
    folders.append(begin(bundle=copy, checkpoint=other)[0].folder)
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    folders.append(begin(bundle=copy, checkpoint=other)[0].folder)
    assert folders[0] == folders[1] == folders[2]
    assert len(set(folders)) == 3


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_bundle_of_another_checkpoint_is_refused(name: str, begin: Begin, tmp_path: Path) -> None:
    other = shutil.copytree(MINI, tmp_path / MINI.name)
    assert begin(checkpoint=other)
    content = (other / name).read_bytes()
    (other / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if name.startswith("model") else content + b" ")
    with pytest.raises(BenchmarkError, match=rf"was made of another checkpoint than .*\(not the same: {name}\);"):
        measuring.measure(RunOptions(checkpoint=other, out=tmp_path / "x.json"), say=print)


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_code(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result has one commit and one version of each tool, so its rounds must not be of two."""
    notes = begin()[1]
    assert begin()[1] == notes
    monkeypatch.setattr(metadata, "distributions", lambda **others: [])
    assert begin()[1] != notes


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [{"threads": 1}, {"seed": 1}, {"workloads": ("bulk",)}, {"checkpoint": MINI}],
    ids=lambda other: next(iter(other)),
)
def test_a_run_does_not_go_on_with_what_was_measured_otherwise(begin: Begin, other: dict[str, Any]) -> None:
    asked = {"threads": 2}
    _, notes = begin(**asked)
    assert begin(**asked, rounds=9, runners=("cappy-int8",), max_seconds=5.0)[1] == notes
    assert begin(**{**asked, **other})[1] != notes


@pytest.mark.slow
def test_a_run_does_not_go_on_on_another_machine_or_with_another_bundle(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = copy_bundle(tmp_path / "bundle")
    notes = begin(bundle=copy)[1]
    manifest = copy / MANIFEST
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    other = begin(bundle=copy)[1]
    described = describe_machine()
    found = {notes, other}
    for changes in ({"cpu": "another"}, {"cpu_stepping": "another"}):
        monkeypatch.setattr(measuring, "describe_machine", lambda changes=changes: {**described, **changes})
        found.add(begin(bundle=copy)[1])
    assert len(found) == 4


def write_package(tools: Path, environment: str, name: str, version: str) -> None:
    """Install a package, as pip and npm leave it."""
    if environment == "node":
        folder = tools / ".venv-bench-node" / "node_modules" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text(json.dumps({"name": name, "version": version}))
        return
    packages = tools / f".venv-bench-{environment}" / "lib" / "python3.11" / "site-packages"
    shutil.rmtree(packages, ignore_errors=True)
    folder = packages / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ("openvino", "openvino"),
        ("openvino", "nncf"),
        ("infinity", "infinity_emb"),
        ("node", "onnxruntime-node"),
        ("node", "@huggingface/transformers"),
    ],
)
def test_a_run_does_not_go_on_with_another_version_of_a_tool_in_an_environment_of_its_own(
    environment: str, name: str, begin: Begin, tmp_path: Path
) -> None:
    """A result has one version of each tool, so its rounds must not be of two."""
    notes = []
    for version in ("1.0", "1.1"):
        write_package(tmp_path / "tools", environment, name, version)
        notes.append(begin(tools=tmp_path / "tools")[1])
    assert notes[0] != notes[1]


@pytest.mark.parametrize("asked", [("questions",), ("bulk", "questions")], ids=" ".join)
def test_a_workload_that_the_suite_has_not_is_named_and_not_left_out(asked: tuple[str, ...], begin: Begin) -> None:
    with pytest.raises(BenchmarkError, match=r"the suite smoke has no workload questions, only interactive, .*long;"):
        begin(workloads=asked)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("CAPPY_KERNELS", ("auto", "none")),
        ("ORT_DISABLE_TELEMETRY", ("1", "0")),
        ("OMP_PROC_BIND", ("true", "false")),
    ],
)
def test_a_run_does_not_go_on_with_another_value_of_a_variable(
    name: str, values: Sequence[str], begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = []
    for value in values:
        monkeypatch.setenv(name, value)
        notes.append(begin()[1])
    monkeypatch.setenv("OTHER_" + name, "1")
    assert begin()[1] == notes[1] != notes[0]


def test_the_kernels_in_use_are_part_of_what_a_run_goes_on_with(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler there are none, and no variable says so."""
    notes = begin()[1]
    without = {**default_settings(EMBEDDED, "int8", 1), "kernels": "none: the library cannot be loaded"}
    monkeypatch.setattr(measuring, "default_settings", lambda *asked: without)
    assert begin()[1] != notes


@pytest.mark.slow
def test_a_runner_takes_no_answer_of_cappy_tune_and_tells_how_it_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPPY_CACHE", str(tmp_path / "cache"))
    facts = tuning_facts(open_bundle(EMBEDDED), "int8", 2)
    prepare_folder(tmp_path / "cache")
    write_tuned(tmp_path / "cache", tuned_key(facts), Execution("throughput", 256, "measured"), facts)
    with Scorer.open(threads=2, precision="int8") as scorer:
        assert (scorer.info.mode, scorer.info.max_batch_tokens) == ("throughput", 256)
        kernels = scorer.info.kernels
    ours = next(one for one in SPECS if one.name == "cappy-int8")
    worker = start_worker(ours, Model(EMBEDDED, tmp_path, threads=2), tools=tmp_path)
    try:
        settings = worker.ask({"do": "open"})["settings"]
    finally:
        worker.close()
    assert settings == default_settings(EMBEDDED, "int8", 2)
    assert settings == {
        "kernels": kernels,
        "mode": "both",
        "mode_reason": "auto: a small model is held twice",
        "max_batch_tokens": 512,
        "tuned": False,
    }
