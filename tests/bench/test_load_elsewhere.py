"""A server that runs already is named in the result, and compared with this machine only where it runs on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cappy_bench.load import serve_measure
from cappy_bench.load.load_options import LoadOptions
from cappy_bench.load.load_tables import load_tables
from cappy_bench.load.server_process import Running, is_here, serve_command, start_server
from cappy_engine.bundle import EMBEDDED


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("localhost", True), ("192.0.2.1", False), ("no-such-host.invalid", False)],
)
def test_a_host_is_this_machine_if_its_address_is_one_of_ours(host: str, expected: bool) -> None:
    assert is_here(host) == expected


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("server") / "serve.log"
    running = start_server(serve_command(EMBEDDED, ["--threads", "1"]), log=log)
    yield running
    running.stop()


@pytest.mark.slow
@pytest.mark.parametrize("beside", [True, False], ids=["on this machine", "on another"])
def test_the_result_has_the_address_without_a_password_and_no_comparison_with_another_machine(
    beside: bool,
    server: Running,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not beside:
        monkeypatch.setattr(serve_measure, "is_here", lambda host: False)
    host, port = server.address
    options = LoadOptions(
        url=f"http://somebody:secret@{host}:{port}/",
        seconds=0.5,
        requests=4,
        sizes=(1, 2),
        connections=2,
        out=tmp_path / "new" / "x.json",
    )
    result = serve_measure.measure_load(options, [], say=print)
    assert "secret" not in json.dumps(result)
    settings: dict[str, Any] = json.loads((tmp_path / "new" / "x.json").read_bytes())["settings"]
    assert (settings["connections"], settings["sizes"]) == (2, [1, 2])
    (found,) = result["servers"]
    assert (found["url"], found["is_here"]) == (f"http://{host}:{port}", beside)
    assert ("overhead_ms" in found["unloaded"], "ratio" in found["saturation"]) == (beside, beside)
    bounds = [verdict["what"] for verdict in found["bounds"]]
    assert ("overload: p99 of accepted requests, ms" in bounds) == beside
    assert found["unloaded"]["scores"]["different"] == 0, "scores are compared wherever it runs"
    assert ("is not an address of this machine" in load_tables(result)) == (not beside)
