"""`cappy bench` measures, compares and reports in any folder."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from cappy_bench.machine import code_digest, cpu_kind, describe_machine, file_word
from cappy_bench.peers.cappy import default_settings
from cappy_bench.peers.specs import SPECS
from cappy_bench.speed import measure as measuring
from cappy_bench.speed.figures import useful_flops
from cappy_bench.speed.measure import choose_runners, describe_model
from cappy_bench.speed.run_options import RunOptions
from cappy_bench.speed.suite import Plan
from cappy_bench.speed.tables import workload_table
from cappy_bench.speed.texts import make_pool
from cappy_bench.speed.workloads import DESCRIPTIONS
from cappy_engine.bundle import EMBEDDED, open_bundle, seal
from cappy_engine.cli.main import main
from cappy_engine.errors import BenchmarkError
from tests.support.bundles import copy_bundle
from tests.support.fake_tools import FakeTool, Measure, row_of, spec
from tests.support.places import MINI

RESULT = Path("bench/results", f"cappy-mini-{file_word(cpu_kind(describe_machine()))}.json")
SLOW = ("torch-compile", "torch-autocast", "torch-bf16")
"""They compile, or multiply bfloat16, which most processors emulate."""
MADE_UP_PEAK = {"fp32": {"flops": 1e12, "how": "made up"}, "int8": {"flops": 2e12, "how": "made up"}}


@pytest.mark.slow
def test_the_packages_own_model_is_measured_on_ones_own_texts_in_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real engine; the machine's peak, which takes long, is made up."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measuring, "measure_peak", lambda threads: MADE_UP_PEAK)
    words = make_pool([f"word{place}" for place in range(50)], seed=0, count=60)
    lines = [json.dumps({"instruction": first, "response": second}) for first, second in words]
    Path("pairs.jsonl").write_text("\n".join(lines))
    options = RunOptions(suite="smoke", workloads=("interactive", "bulk"), threads=1, pairs=Path("pairs.jsonl"))
    result = measuring.measure(options, say=lambda line: None)
    (ours,) = result["runners"]
    assert (ours["name"], ours["status"], ours["parity"]["pairs"]) == ("cappy-int8", "ok", 279)
    assert [len(cell["seconds"]) for cell in ours["cells"]] == [2, 2]
    assert ours["settings"] == default_settings(EMBEDDED, "int8", 1)
    assert result["variables"]["OMP_NUM_THREADS"] == "1"
    assert "worst" not in json.dumps(result)
    assert (result["title"], result["settings"]["pairs"]) == ("cappy-mini", "the file pairs.jsonl")
    assert json.loads(RESULT.read_bytes()) == result
    assert not list(Path("bench").glob("notes-*")), "a run that ended leaves no notes"


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (RunOptions(), ["cappy-int8"]),
        (RunOptions(checkpoint=MINI), [one.name for one in SPECS]),
        (RunOptions(checkpoint=MINI, runners=("torch", "cappy")), ["cappy", "torch"]),
        (RunOptions(checkpoint=MINI, environments=("node",)), ["transformers.js", "transformers.js-int8"]),
    ],
)
def test_with_a_checkpoint_other_tools_are_measured_too(options: RunOptions, names: list[str]) -> None:
    assert [one.name for one in choose_runners(options, open_bundle(EMBEDDED))] == names


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (RunOptions(runners=("cappy-int8", "torch")), "torch"),
        (RunOptions(runners=("cappy",)), "cappy"),
        (RunOptions(environments=("openvino",)), "openvino"),
    ],
    ids=["another tool", "a precision that the bundle has not", "another environment"],
)
def test_what_cannot_be_measured_without_a_checkpoint_is_named(options: RunOptions, named: str) -> None:
    with pytest.raises(BenchmarkError, match=f"nothing to measure for {named}: without --checkpoint .*int8"):
        choose_runners(options, open_bundle(EMBEDDED))


@pytest.mark.slow
def test_code_is_told_from_other_code_by_its_files_alone(tmp_path: Path) -> None:
    copies = [tmp_path / "one" / "package", tmp_path / "two" / "package"]
    for copy in copies:
        (copy / "native").mkdir(parents=True)
        (copy / "code.py").write_text("speed = 1")
        (copy / "native" / "kernels.so").write_bytes(b"fast")
    (copies[0] / "__pycache__").mkdir()
    (copies[0] / "__pycache__" / "code.pyc").write_bytes(b"any")
    assert code_digest(copies[:1]) == code_digest(copies[1:])
    (copies[0] / "native" / "kernels.so").write_bytes(b"slow")
    assert code_digest(copies[:1]) != code_digest(copies[1:])


def test_a_bundle_and_its_checkpoint_tell_the_same_of_the_model() -> None:
    """So that `compare` takes a result with a checkpoint and one without as of one model."""
    alone, compared = (describe_model(open_bundle(EMBEDDED), path) for path in (None, MINI))
    assert alone["name"] == "cappy-mini"
    for name in ("weights_sha256", "parameters", "shape"):
        assert alone[name] == compared[name]


def test_the_size_of_a_checkpoint_is_that_of_all_its_files(tmp_path: Path) -> None:
    copy = shutil.copytree(MINI, tmp_path / "checkpoint")
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    parts = {f"model-0000{part}-of-00002.safetensors": sorted(tensors)[part - 1 :: 2] for part in (1, 2)}
    for name, part in parts.items():
        save_file({each: tensors[each] for each in part}, copy / name)
    index = {"weight_map": {each: name for name, part in parts.items() for each in part}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    size = describe_model(open_bundle(EMBEDDED), copy)["weights_bytes"]
    assert size == sum((copy / name).stat().st_size for name in parts)


@pytest.mark.parametrize(
    ("name", "instruction_sets", "kind", "word"),
    [
        (
            "Intel(R) Xeon(R) Processor @ 2.50GHz",
            ["avx2", "avx512_vnni", "avx512f"],
            "Intel Xeon Processor @ 2.50GHz, AVX-512 VNNI",
            "intel-xeon-2.50ghz-avx-512-vnni",
        ),
        (
            "INTEL(R) XEON(R) PLATINUM 8581C CPU @ 2.30GHz",
            ["amx_bf16", "amx_int8", "avx2", "avx512_bf16", "avx512_vnni", "avx512f", "avx_vnni"],
            "INTEL XEON PLATINUM 8581C CPU @ 2.30GHz, AMX bf16",
            "intel-xeon-platinum-8581c-2.30ghz-amx-bf16",
        ),
        ("", [], "", "unknown"),
    ],
)
def test_a_result_is_named_by_its_kind_of_cpu(name: str, instruction_sets: list[str], kind: str, word: str) -> None:
    assert cpu_kind({"cpu": name, "instruction_sets": instruction_sets}) == kind
    assert file_word(kind) == word


@pytest.mark.slow
def test_the_commands_compare_list_and_report(
    measure: Measure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, slowness in (("before", 2.0), ("after", 1.0)):
        result = measure(FakeTool(spec("cappy"), slowness=slowness), FakeTool(spec("peer")))
        (tmp_path / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    before, after = str(tmp_path / "before.json"), str(tmp_path / "after.json")
    assert main(["bench", "compare", before]) == 0
    assert "the peer wins" in capsys.readouterr().out
    assert main(["bench", "compare", before, after]) == 0
    assert row_of(capsys.readouterr().out, "cappy")[2:] == ["2.00x"] * len(DESCRIPTIONS)
    (tmp_path / "other").mkdir()
    same = shutil.copyfile(after, tmp_path / "other" / "before.json")
    assert main(["bench", "compare", before, str(same)]) == 0
    assert capsys.readouterr().out.startswith(f"useful tokens/s of {same} over those of {before}\n")
    assert main(["bench", "compare", before, after, before]) == 2
    assert main(["bench", "compare", str(tmp_path / "no.json")]) == 1
    assert "no.json" in capsys.readouterr().err
    assert main(["bench", "list"]) == 0
    assert row_of(capsys.readouterr().out, "openvino")[2] == "openvino"
    assert main(["bench", "report", "--results", str(tmp_path)]) == 0
    before_page = (tmp_path / "README.md").read_bytes()
    (tmp_path / "README.md").write_text("mine")
    assert main(["bench", "report", "--results", str(tmp_path)]) == 1
    assert (tmp_path / "README.md").read_text() == "mine"
    assert main(["bench", "report", "--results", str(tmp_path), "--force"]) == 0
    assert (tmp_path / "README.md").read_bytes() == before_page
    assert (tmp_path / "README.md").exists()


@pytest.mark.slow
def test_the_tools_of_this_environment_give_the_references_scores(
    checkpoint: Path,
    bundle: Path,
    preloaded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In two processes for each tool, that need not import PyTorch."""
    monkeypatch.setattr(measuring, "measure_peak", lambda threads: MADE_UP_PEAK)
    monkeypatch.setattr(sys, "executable", str(preloaded / "python"))
    names = [one.name for one in SPECS if one.environment == "main" and not one.name.startswith(SLOW)]
    out = tmp_path / "result.json"
    main(
        [
            "bench",
            "run",
            "--suite",
            "smoke",
            "--checkpoint",
            str(checkpoint),
            "--bundle",
            str(bundle),
            "--out",
            str(out),
        ]
        + ["--work", str(tmp_path / "work"), "--threads", "1", "--rounds", "1"]
        + [argument for name in names for argument in ("--runner", name)]
    )
    written = capsys.readouterr()
    printed = json.loads(written.out.splitlines()[-1])
    assert printed == json.loads(out.read_text(encoding="utf-8"))
    assert workload_table(printed, "bulk") in written.out
    assert "cappy-int8: ready" in written.err
    # int8 and bf16 of a tiny model of random weights may lose its order; what is exact must be exact
    assert {one["name"]: one["status"] for one in printed["runners"] if one["precision"] not in ("int8", "bf16")} == {
        one.name: "ok" for one in SPECS if one.name in names and one.precision not in ("int8", "bf16")
    }
    for one in printed["runners"]:
        assert one["status"] in ("ok", "wrong"), one["reason"]
        ran = [cell["status"] == "ok" for cell in one["cells"]]
        assert one["parity"]["pairs"] == sum(
            workload["pairs"] for workload, is_ok in zip(printed["workloads"], ran, strict=True) if is_ok
        )


@pytest.mark.slow
def test_a_result_tells_what_was_asked_for_and_is_named_by_the_model_and_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plans: list[Plan] = []

    def run_suite(plan: Plan, *, notes: Path, **others: object) -> dict[str, Any]:
        plans.append(plan)
        notes.touch()
        return {"workloads": [one.describe() for one in plan.workloads], "runners": []}

    monkeypatch.setattr(measuring, "run_suite", run_suite)
    machine = {**describe_machine(), "cpu": "Some(R) CPU @ 1GHz", "instruction_sets": ["avx2"]}
    monkeypatch.setattr(measuring, "describe_machine", lambda: machine)
    options = RunOptions(suite="smoke", threads=3, rounds=7, max_seconds=5.0, seed=2)
    result = measuring.measure(options, say=lambda line: None)
    assert json.loads(Path("bench/results/cappy-mini-some-1ghz-avx2.json").read_bytes()) == result
    (plan,) = plans
    assert (plan.model.threads, plan.rounds, plan.max_seconds) == (3, 7, 5.0)
    assert plan.reserve_bytes == 4 * result["model"]["weights_bytes"]
    settings = {"suite": "smoke", "threads": 3, "rounds": 7, "max_seconds": 5.0, "seed": 2}
    assert result["settings"] == {**settings, "pairs": "made of words of the package's parity pairs"}
    for workload, described in zip(plan.workloads, result["workloads"], strict=True):
        assert described["flops"] == useful_flops(result["model"]["shape"], workload.token_counts.tolist())
        assert described["sha256"] == workload.sha256


def test_no_text_of_a_proof_gets_into_a_result(tmp_path: Path) -> None:
    """The manifest has the worst pairs of both proofs, with and without kernels."""
    copy = copy_bundle(tmp_path / "bundle")
    manifest = json.loads((copy / "manifest.json").read_bytes())
    parity = manifest["parity"]["precisions"]["int8"]
    worst = {"pairs": [{"instruction": "a text of somebody", "response": "another"}]}
    parity |= {"worst": worst, "without_kernels": {"max_error": 0.5, "worst": worst, "more": [{"worst": worst}]}}
    (copy / "manifest.json").write_text(json.dumps(seal(manifest)))
    exported = measuring.exported_parity(open_bundle(copy))
    assert "text of somebody" not in json.dumps(exported)
    assert exported["int8"]["without_kernels"] == {"max_error": 0.5, "more": [{}]}
    assert exported["int8"]["pairs"] == manifest["parity"]["pairs"]["count"]


def test_a_result_is_not_written_over_what_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy, data = copy_bundle(tmp_path / "bundle"), tmp_path / "data"
    data.mkdir()
    for path in (data / "promptsource_test.jsonl.gz", tmp_path / "pairs.jsonl"):
        path.write_bytes(b"mine")
    for name in ("bundle/manifest.json", "bundle/onnx/model.onnx", "data/promptsource_test.jsonl.gz", "pairs.jsonl"):
        path = tmp_path / name
        before = path.read_bytes()
        texts = ["--data", str(data)] if path.is_relative_to(data) else ["--pairs", str(tmp_path / "pairs.jsonl")]
        assert main(["bench", "run", "--bundle", str(copy), "--out", str(path), "--force", *texts]) == 1
        assert f"the input {path} is the output too" in capsys.readouterr().err
        assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["run", "serve"])
def test_texts_from_two_places_are_wrong_usage(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing was said of the folder, whose tasks were not read."""
    monkeypatch.chdir(tmp_path)
    assert main(["bench", name, "--pairs", "pairs.jsonl", "--data", "data"]) == 2
    assert "the texts are those of --pairs or those of --data, and both are given" in capsys.readouterr().err


@pytest.mark.parametrize(("folder", "is_refused"), [("typo", True), ("empty", True), (str(MINI), False)])
def test_a_checkpoint_of_infinity_that_is_not_there_is_found_before_anything_is_measured(
    folder: str, is_refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours was measured first, and infinity was then left out."""
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    assert main(["bench", "serve", "--infinity", folder, "--url", "http://127.0.0.1:1"]) == 1
    problem = f"--infinity needs a checkpoint's folder, and {folder} has no config.json"
    assert (problem in capsys.readouterr().err) == is_refused
