"""Runners are programs in processes and environments of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cappy_bench.peers
from cappy_bench.make_checkpoint import make_family
from cappy_bench.peers import optimum_onnx, reference, torch_eager
from cappy_bench.peers.batches import Batched, Inputs
from cappy_bench.peers.peer import Model, Scores
from cappy_bench.peers.process import ENVIRONMENTS, RunnerFailed, WorkerProcess, in_short, link_packages, start_worker
from cappy_bench.peers.specs import SPECS, Spec
from cappy_engine import Scorer
from cappy_engine.bundle import EMBEDDED
from cappy_export import ExportOptions, export
from cappy_export.proof.pairs import default_pairs


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import sys; sys.exit('no such model')", "ended with status 1: no such model"),
        ("""input(); print('{"error": "ValueError: too   large"}')""", "ValueError: too large"),
    ],
    ids=["dies", "answers with an error"],
)
def test_a_process_that_fails_says_why(script: str, reason: str, tmp_path: Path) -> None:
    worker = WorkerProcess([sys.executable, "-c", script], environment={}, log=tmp_path / "log")
    with pytest.raises(RunnerFailed, match=reason):
        worker.ask({"do": "open"})
    worker.close()


def test_what_a_tool_prints_does_not_come_between_the_answers(tmp_path: Path) -> None:
    noisy = tmp_path / "noisy.py"
    noisy.write_text(
        "import os\n"
        "from cappy_bench.peers.worker import serve\n"
        "def prepare(model, precision):\n"
        "    print('hello'); os.system('echo from a child')\n"
        "def open_runner(model, precision):\n"
        "    raise RuntimeError('out of luck')\n"
        "serve(open_runner, prepare)\n"
    )
    command = [sys.executable, str(noisy), "fp32", Model(Path("b"), Path("c"), 1).to_json()]
    worker = WorkerProcess(command, environment={}, log=tmp_path / "log")
    assert worker.ask({"do": "prepare"})["seconds"] >= 0
    with pytest.raises(RunnerFailed, match="RuntimeError: out of luck"):
        worker.ask({"do": "open"})
    with pytest.raises(RunnerFailed, match="the runner is not open"):
        worker.ask({"do": "score", "requests": [], "pad_to": None})
    worker.close()
    assert {"hello", "from a child"} <= set((tmp_path / "log").read_text().splitlines())


def test_reasons_hold_no_paths_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert in_short(f"no fp16\n  in {Path.cwd()}/bench/large") == "no fp16 in bench/large"


@pytest.mark.parametrize("environment", ["openvino", "llamacpp", "infinity", "node"])
def test_a_runner_whose_environment_is_missing_says_where_it_is_told_how_to_make_it(
    environment: str, tmp_path: Path
) -> None:
    missing = next(one for one in SPECS if one.environment == environment)
    with pytest.raises(RunnerFailed, match=rf"there is no .*\.venv-bench-{environment}; how to make it: ") as caught:
        start_worker(missing, Model(tmp_path, tmp_path, threads=1), tools=tmp_path)
    recipe = Path.cwd() / str(caught.value).rpartition(": ")[2]
    assert f".venv-bench-{environment}" in recipe.read_text(encoding="utf-8")


def test_a_runner_whose_package_is_missing_says_which(tmp_path: Path) -> None:
    missing = Spec("one", "torch_eager", "fp32", "a fake", ("no-such-package", "numpy"))
    with pytest.raises(RunnerFailed, match=r"not installed here: no-such-package; .*\.\[bench\]"):
        start_worker(missing, Model(tmp_path, tmp_path, threads=1), tools=tmp_path)


def test_another_environment_is_given_our_packages_and_no_others(tmp_path: Path) -> None:
    """Its own numpy must be used, not ours; and it needs no more of ours than numpy and tokenizers."""
    folder = link_packages(tmp_path / "packages")
    assert link_packages(folder) == folder, "a second run finds the links of the first"
    code = """
import sys
from importlib.machinery import PathFinder
allowed = {*sys.stdlib_module_names, "numpy", "tokenizers", "cappy_bench", "cappy_engine", "cappy_export"}


class Refuse(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse)
import cappy_bench.peers.batches, cappy_bench.peers.worker, cappy_export.proof.pairs
print(cappy_bench.__file__, len(cappy_export.proof.pairs.default_pairs()))
"""
    command = [sys.executable, "-P", "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(folder / "cappy_bench" / "__init__.py"), "279"], done.stderr
    assert {path.name for path in folder.iterdir()} == {"cappy_bench", "cappy_engine", "cappy_export"}


def test_what_lies_in_the_current_folder_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(tmp_path)
    ours = next(one for one in SPECS if one.is_ours and one.precision == "int8")
    worker = start_worker(ours, Model(EMBEDDED, tmp_path, threads=1), tools=tmp_path)
    try:
        worker.ask({"do": "open"})
        answer = worker.ask({"do": "score", "requests": [[("Is the sky blue?", "Yes")]], "pad_to": None})
    finally:
        worker.close()
    with Scorer.open(threads=1) as scorer:
        assert answer["scores"] == [scorer.score([("Is the sky blue?", "Yes")]).tolist()]


@pytest.mark.parametrize("at_once", [1, 3])
def test_batches_side_by_side_give_each_pair_its_own_score(at_once: int, tmp_path: Path) -> None:
    """The sum of a pair's token ids stands for its score; the first batches end last."""
    threads = set()

    def run(inputs: Inputs) -> Scores:
        threads.add(threading.get_ident())
        time.sleep(0.001 * inputs["input_ids"].shape[1] / 10)
        sums: Scores = (inputs["input_ids"] * inputs["attention_mask"]).sum(axis=1).astype(np.float32)
        return sums

    runner = Batched(Model(EMBEDDED, tmp_path, 1), run, pad_token_id=1, batch_tokens=64, at_once=at_once)
    pairs = [(f"word {'and so on ' * (place % 7)}", str(place)) for place in range(60)]
    expected = [sum(ids) for ids in runner.token_ids(pairs)]
    assert runner.score(pairs).tolist() == expected
    assert len(threads) == at_once
    assert threads != {threading.get_ident()} or at_once == 1
    assert runner.computed_tokens is not None
    assert runner.computed_tokens >= sum(len(ids) for ids in runner.token_ids(pairs))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Give a tiny BERT and its bundle."""
    folder = tmp_path_factory.mktemp("bert")
    checkpoint = make_family(folder / "checkpoint", "ms-marco-MiniLM-L6-v2", is_tiny=True)
    export(checkpoint, folder / "bundle", ExportOptions(precisions=("fp32",)))
    return checkpoint, folder / "bundle"


@pytest.mark.parametrize("tool", [reference, torch_eager, optimum_onnx], ids=lambda tool: tool.__name__)
def test_a_model_that_tells_the_two_texts_apart_is_told(tool: Any, bert: tuple[Path, Path], tmp_path: Path) -> None:
    """BERT's token types are 1 for the response; the embeddings of a made-up one's types differ much."""
    checkpoint, bundle = bert
    model = Model(bundle, tmp_path, 1, checkpoint)
    if hasattr(tool, "prepare"):
        tool.prepare(model, "fp32")
    pairs = default_pairs()[:20]
    with Scorer.open(bundle, threads=1) as scorer:
        np.testing.assert_allclose(tool.open_runner(model, "fp32").score(pairs), scorer.score(pairs), atol=1e-5)


def test_every_runner_has_a_program_and_a_name_of_its_own() -> None:
    folder = Path(cappy_bench.peers.__path__[0])
    assert len({one.name for one in SPECS}) == len(SPECS)
    for one in SPECS:
        path = folder / (one.module if "." in one.module else f"{one.module}.py")
        assert path.suffix == ".mjs" or path.read_text(encoding="utf-8").count("\n    serve(open_runner") == 1
        assert one.environment in ("main", "node") or (ENVIRONMENTS / f"{one.environment}.txt").exists()
