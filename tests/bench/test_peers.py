"""Runners are programs in processes and environments of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import cappy_bench.peers
from cappy_bench.make_checkpoint import make_family
from cappy_bench.peers import optimum_onnx, pytorch, reference
from cappy_bench.peers.batches import Batched, Inputs
from cappy_bench.peers.peer import Model, Pair, Scores
from cappy_bench.peers.process import (
    ENVIRONMENTS,
    RunnerFailed,
    WorkerProcess,
    in_short,
    link_packages,
    program,
    start_worker,
)
from cappy_bench.peers.specs import SPECS, Spec
from cappy_bench.peers.worker import Worker
from cappy_engine import Scorer
from cappy_engine.bundle import EMBEDDED
from cappy_export import ExportOptions, export
from cappy_export.proof.pairs import default_pairs


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import sys; sys.exit('no such model')", "ended with status 1: no such model"),
        ("""input(); print('{"error": "ValueError: too   large"}')""", "ValueError: too large"),
        (
            """import os; input(); print('{"seconds": [0.1, 0', end="", flush=True); os.abort()""",
            "ended with status -6",
        ),
        ("input(); print([1])", r"answered no object of JSON: '\[1\]'; its last lines"),
        ("input(); print('a warning of a library')", "answered no object of JSON: 'a warning of a library'"),
        ("import os; input(); os.write(1, b'\\xff\\n')", "answered no object of JSON"),
    ],
    ids=["dies", "answers with an error", "dies within an answer", "answers a list", "a text", "what is not UTF-8"],
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
        worker.ask({"do": "score", "requests": []})
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
    missing = Spec("one", "pytorch", "fp32", "a fake", ("no-such-package", "numpy"))
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


@pytest.mark.slow
def test_what_lies_in_the_current_folder_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(tmp_path)
    ours = next(one for one in SPECS if one.is_ours and one.precision == "int8")
    worker = start_worker(ours, Model(EMBEDDED, tmp_path, threads=1), tools=tmp_path)
    try:
        worker.ask({"do": "open"})
        answer = worker.ask({"do": "score", "requests": [[("Is the sky blue?", "Yes")]]})
    finally:
        worker.close()
    with Scorer.open(threads=1) as scorer:
        assert answer["scores"] == [scorer.score([("Is the sky blue?", "Yes")]).tolist()]


class Padding:
    """A runner that computes 100 tokens for each pair; `asked` are its calls."""

    def __init__(self) -> None:
        self.computed_tokens: int | None = 1000  # of an earlier call
        self.asked: list[int] = []

    def score(self, pairs: Sequence[Pair]) -> Scores:
        self.asked.append(len(pairs))
        self.computed_tokens = (self.computed_tokens or 0) + 100 * len(pairs)
        time.sleep(0.01 * len(pairs))
        return np.arange(len(pairs), dtype=np.float32)

    def token_ids(self, pairs: Sequence[Pair]) -> list[list[int]]:
        return [[0]] * len(pairs)


def test_each_request_is_one_timed_call_and_the_tokens_are_those_of_this_message(tmp_path: Path) -> None:
    runner = Padding()
    worker = Worker(Model(tmp_path, tmp_path, 1), "fp32", lambda model, precision: runner, None)
    worker.answer({"do": "open"})
    requests = [[["a", "b"]] * count for count in (3, 1)]
    for _ in range(2):
        begun = time.perf_counter()
        found = worker.answer({"do": "score", "requests": requests})
        assert sum(found["seconds"]) <= time.perf_counter() - begun
        assert found["computed_tokens"] == 400
        assert found["scores"] == [[0.0, 1.0, 2.0], [0.0]]
        assert found["seconds"][0] >= 0.03
        assert found["seconds"][1] >= 0.01
    assert runner.asked == [3, 1, 3, 1]
    runner.computed_tokens = None
    runner.score = lambda pairs: np.zeros(len(pairs), np.float32)  # type: ignore[method-assign]
    assert worker.answer({"do": "score", "requests": requests})["computed_tokens"] is None


def test_a_package_for_gpus_stands_in_for_the_one_of_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It has the CPU's provider too, so our runners run with it, and the report names it."""

    def version(name: str) -> str:
        if name not in ("onnxruntime-gpu", "tokenizers"):
            raise metadata.PackageNotFoundError(name)
        return "1.5"

    monkeypatch.setattr(metadata, "version", version)
    assert program(SPECS[0], tmp_path)[-1] == "cappy_bench.peers.cappy"
    worker = Worker(Model(tmp_path, tmp_path, 1), "fp32", lambda model, precision: Padding(), None)
    found = worker.answer({"do": "versions", "packages": list(SPECS[0].packages)})
    assert found == {"versions": {"onnxruntime-gpu": "1.5", "tokenizers": "1.5"}}
    with pytest.raises(metadata.PackageNotFoundError):
        worker.answer({"do": "versions", "packages": ["torch"]})


@pytest.mark.parametrize("pad_to", [None, 512])
def test_tokens_of_batches_count_with_their_padding(pad_to: int | None, tmp_path: Path) -> None:
    sizes: list[int] = []
    shapes: list[tuple[int, ...]] = []

    def run(inputs: Inputs) -> Scores:
        sizes.append(inputs["input_ids"].size)
        shapes.append(inputs["input_ids"].shape)
        assert inputs["attention_mask"].sum() <= sizes[-1]
        return np.zeros(len(inputs["input_ids"]), np.float32)

    runner = Batched(Model(EMBEDDED, tmp_path, 1), run, pad_token_id=1, batch_tokens=1024, pad_to=pad_to)
    pairs = [(f"word {'and so on ' * (place % 7)}", str(place)) for place in range(20)]
    runner.score(pairs)
    assert runner.computed_tokens == sum(sizes)
    assert (sum(sizes) == 20 * 512) == (pad_to == 512)
    assert sum(rows for rows, _ in shapes) == 20


def test_a_tool_that_computes_no_padding_counts_none(tmp_path: Path) -> None:
    model = Model(EMBEDDED, tmp_path, 1)
    pairs = [("a", "b"), ("one two three four five", "six")]

    def run(inputs: Inputs) -> Scores:
        return np.zeros(len(inputs["input_ids"]), np.float32)

    runner = Batched(model, run, pad_token_id=1, is_padded=False)
    runner.score(pairs)
    assert runner.computed_tokens == sum(map(len, runner.token_ids(pairs)))


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


@pytest.mark.slow
@pytest.mark.parametrize("tool", [reference, pytorch, optimum_onnx], ids=lambda tool: tool.__name__)
def test_a_model_that_tells_the_two_texts_apart_is_told(tool: Any, bert: tuple[Path, Path], tmp_path: Path) -> None:
    """BERT's token types are 1 for the response; the embeddings of a made-up one's types differ much."""
    checkpoint, bundle = bert
    model = Model(bundle, tmp_path, 1, checkpoint)
    if hasattr(tool, "prepare"):
        tool.prepare(model, "fp32")
    pairs = default_pairs()[:20]
    with Scorer.open(bundle, threads=1) as scorer:
        np.testing.assert_allclose(tool.open_runner(model, "fp32").score(pairs), scorer.score(pairs), atol=1e-5)


@pytest.mark.slow
def test_a_compiled_model_is_run_in_place_of_the_module(bert: tuple[Path, Path], tmp_path: Path) -> None:
    """By torch's own interpreter: inductor takes minutes."""
    module = AutoModelForSequenceClassification.from_pretrained(bert[0]).eval()
    run = pytorch.runs(module, torch.compile(module, backend="eager"))
    pairs, runner = default_pairs()[:2], Batched(Model(bert[1], tmp_path, 1), run, pad_token_id=0)
    np.testing.assert_allclose(runner.score(pairs), Scorer.open(bert[1]).score(pairs), atol=1e-5)


def test_every_runner_has_a_program_and_a_name_of_its_own() -> None:
    folder = Path(cappy_bench.peers.__path__[0])
    assert len({one.name for one in SPECS}) == len(SPECS)
    for one in SPECS:
        path = folder / (one.module if "." in one.module else f"{one.module}.py")
        text = path.read_text(encoding="utf-8")
        assert (
            path.suffix == ".mjs" or text.count(f"\n    serve({'WAYS[sys.argv[1]]' if one.way else 'open_runner'}") == 1
        )
        assert not one.way or f'"{one.way}": open_' in text
        assert one.environment in ("main", "node") or (ENVIRONMENTS / f"{one.environment}.txt").exists()
