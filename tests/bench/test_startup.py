"""The study of a process's start and memory, on the package's own model."""

from __future__ import annotations

import json

import pytest

from cappy_bench.studies.startup import main
from cappy_engine.bundle import EMBEDDED


@pytest.mark.slow
def test_a_started_process_tells_its_time_and_what_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(EMBEDDED), "--rounds", "1"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["int8"]
    weights = sum(path.stat().st_size for path in (EMBEDDED / "onnx").glob("*"))
    assert 0 < found["open_seconds"] < found["ready_seconds"]
    assert found["resident_bytes"] <= found["peak_bytes"]
    assert found["working_bytes"] <= found["counted_bytes"]
    assert 0 < found["tokenizer_bytes"] < found["working_bytes"]
    assert weights < found["working_bytes"]
