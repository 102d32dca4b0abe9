"""Tools with known times and scores, in place of processes, and a whole result of them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cappy_bench.machine import describe_machine
from cappy_bench.peers.peer import Model, Pair
from cappy_bench.peers.process import RunnerFailed
from cappy_bench.peers.specs import Spec
from cappy_bench.speed.figures import SCHEMA, useful_flops
from cappy_bench.speed.suite import Plan, run_suite
from cappy_bench.speed.texts import make_pool
from cappy_bench.speed.workloads import Sizes, Workload, make_workloads
from cappy_engine.bundle import EMBEDDED
from cappy_engine.tokenizer import PairTokenizer

SIZES = Sizes(interactive=6, lengths=2, rerank=2, bulk=24, long=3, questions=4)
SECONDS_PER_CHARACTER = 1e-3
SHAPE = {"hidden_size": 8, "intermediate_size": 32, "layers": 2}


def true_score(pair: Pair) -> float:
    """What the fakes' reference says: any number that differs between pairs."""
    return float(np.sin(sum(map(ord, pair[0] + pair[1]))))


@dataclass
class FakeTool:
    """A tool in place of a process: scores and times by rule. `calls` is how often it was asked for scores."""

    spec: Spec
    slowness: float = 1.0
    score: Callable[[Pair], float] = true_score
    token_ids: Callable[[Pair], list[int]] = lambda pair: [len(text) for text in pair]
    fails_at: str | None = None
    drops_last: bool = False
    calls: list[int] = field(default_factory=list)

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Answer as `cappy_bench.peers.worker` does."""
        if message["do"] == self.fails_at:
            raise RunnerFailed(f"no {self.fails_at} today")
        if message["do"] == "versions":
            return {"versions": dict.fromkeys(message["packages"], "1.0")}
        if message["do"] == "token_ids":
            return {"token_ids": [self.token_ids((first, second)) for first, second in message["pairs"]]}
        if message["do"] != "score":
            return {"seconds": 0.0}
        requests = [[(first, second) for first, second in request] for request in message["requests"]]
        self.calls.append(len(requests))
        characters = [sum(len(first) + len(second) for first, second in request) for request in requests]
        scores = [[self.score(pair) for pair in request] for request in requests]
        if self.drops_last:
            scores[-1] = scores[-1][:-1]
        return {
            "seconds": [SECONDS_PER_CHARACTER * count * self.slowness for count in characters],
            "scores": scores,
            "computed_tokens": None,
            "peak_bytes": 1_000_000,
        }

    def close(self) -> None:
        """Nothing to end."""


def spec(name: str, precision: str = "fp32") -> Spec:
    module = "cappy" if name.startswith("cappy") else "fake"
    return Spec(name, module, precision, "a fake", ("fake",))


@dataclass(frozen=True)
class Run:
    """How the suite runs: without a checkpoint the parity is the one in `exported`."""

    notes: Path | None = None
    rounds: int = 2
    max_seconds: float = 1e9
    has_checkpoint: bool = True
    exported: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def run_on_fakes(
    workloads: list[Workload], folder: Path, tools: Sequence[FakeTool], run: Run = Run()
) -> dict[str, Any]:
    """Run the suite on fakes; returns a whole result. The first tool may be the reference."""
    by_name = {tool.spec.name: tool for tool in (FakeTool(spec("reference")), *tools)}
    plan = Plan(
        specs=[tool.spec for tool in tools if tool.spec.name != "reference"],
        workloads=workloads,
        model=Model(folder, folder / "work", 1, folder if run.has_checkpoint else None),
        rounds=run.rounds,
        max_seconds=run.max_seconds,
        reserve_bytes=0,
        exported=run.exported,
    )
    measured = run_suite(
        plan,
        notes=run.notes or folder / f"notes-{uuid.uuid4().hex}.jsonl",
        peak=lambda threads: {"fp32": {"flops": 1e12, "how": "fake"}, "int8": {"flops": 2e12, "how": "fake"}},
        start=lambda asked, model: by_name[asked.name],
    )
    for entry, workload in zip(measured["workloads"], plan.timed, strict=True):
        entry["flops"] = useful_flops(SHAPE, workload.token_counts.tolist())
    return {
        "schema": SCHEMA,
        "title": "fakes",
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 1.0,
        "is_resumed": False,
        "commit": "none",
        "machine": describe_machine(),
        "settings": {"threads": 1, "seed": 0, "rounds": 2, "max_seconds": 60.0, "pairs": "words"},
        "model": {"name": "fake", "weights_sha256": "0" * 64, "parameters": 1000, "shape": SHAPE},
        **measured,
    }


def runner_of(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(runner for runner in result["runners"] if runner["name"] == name)
    return found


def row_of(table: str, name: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.strip("| *").startswith(f"{name} ") or f"*{name}*" in line)
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="session")
def tokenizer() -> PairTokenizer:
    return PairTokenizer.from_file(EMBEDDED / "tokenizer.json", max_length=512)


@pytest.fixture(scope="session")
def workloads(tokenizer: PairTokenizer) -> list[Workload]:
    words = ["sky", "blue", "is", "the", "question", "answer", "why"]
    return make_workloads(make_pool(words, seed=0, count=600), tokenizer, SIZES, seed=0)


Measure = Callable[..., dict[str, Any]]


@pytest.fixture
def measure(workloads: list[Workload], tmp_path: Path) -> Measure:
    """Give a function that runs the suite on fakes: `measure(tool, ..., run=Run(...))`."""

    def run_tools(*tools: FakeTool, run: Run = Run()) -> dict[str, Any]:
        return run_on_fakes(workloads, tmp_path, tools, run)

    return run_tools
