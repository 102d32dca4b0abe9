"""A server that runs already is named in the result, and compared with this machine only where it runs on it."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from cappy_bench.load import serve_measure
from cappy_bench.load.infinity_server import infinity_command, infinity_environment
from cappy_bench.load.load_options import LoadOptions
from cappy_bench.load.load_tables import load_tables
from cappy_bench.load.mix import Load
from cappy_bench.load.offline import Offline
from cappy_bench.load.server_process import (
    CHOSEN,
    Running,
    find_server,
    is_here,
    read_info,
    serve_command,
    start_server,
)
from cappy_engine.bundle import EMBEDDED
from cappy_engine.errors import BenchmarkError
from cappy_engine.options import ScorerOptions


def test_infinity_runs_as_ours_does_in_float32_with_as_many_threads_and_no_network(tmp_path: Path) -> None:
    folder = tmp_path / ".venv-bench-infinity"
    (folder / "lib" / "python3.11" / "site-packages" / "fastapi").mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "bin" / "infinity_emb").touch()
    program, *words = infinity_command(tmp_path / "model", tools=tmp_path, port=8123)
    assert program == str(folder / "bin" / "infinity_emb")
    asked = {name: value for name, value in itertools.pairwise(words) if name.startswith("--")}
    assert (asked["--model-id"], asked["--port"]) == (str(tmp_path / "model"), "8123")
    assert (asked["--dtype"], asked["--device"], asked["--engine"]) == ("float32", "cpu", "torch")
    variables = infinity_environment(3)
    assert {variables[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")} == {"3"}
    assert {variables[name] for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")} == {"1"}


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("localhost", True), ("192.0.2.1", False), ("no-such-host.invalid", False)],
)
def test_a_host_is_this_machine_if_its_address_is_one_of_ours(host: str, expected: bool) -> None:
    assert is_here(host) == expected


OURS = json.dumps({**dict.fromkeys(CHOSEN, "any"), "limits": {}}).encode()


@pytest.mark.parametrize(
    ("status", "body"), [(503, OURS), (201, OURS), (200, b"{}"), (200, b"[]"), (200, b"1"), (200, b"hello")]
)
def test_a_server_that_is_not_ready_or_not_ours_is_not_measured(status: int, body: bytes) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        try:
            address = ("127.0.0.1", listening.server_port)
            if status == 200:
                assert find_server(f"http://127.0.0.1:{address[1]}").address == address
            else:
                with pytest.raises(BenchmarkError, match="/ready does not answer 200"):
                    find_server(f"http://127.0.0.1:{address[1]}")
            with pytest.raises(BenchmarkError, match=r"/info (answers|cannot be read)"):
                read_info(address)
        finally:
            listening.shutdown()
            thread.join()


class Watched(Offline):
    """The scorer without a server, of which one sees what it is asked for."""

    options: ScorerOptions
    asked: list[list[int]]

    def __init__(self, bundle: Path, options: ScorerOptions, load: Load, *, log: Path) -> None:
        super().__init__(bundle, options, load, log=log)
        Watched.options, Watched.asked = options, []

    def all(self, places: Sequence[int]) -> float:
        Watched.asked.append(list(places))
        return super().all(places)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("server") / "serve.log"
    small = {"CAPPY_SERVE_MAX_QUEUE_PAIRS": "2"}
    running = start_server(serve_command(EMBEDDED, ["--threads", "1"]), log=log, environment=small)
    yield running
    running.stop()


@pytest.mark.slow
@pytest.mark.parametrize(("beside", "connections"), [(True, None), (False, 2)], ids=["on this machine", "on another"])
def test_the_result_has_the_address_without_a_password_and_no_comparison_with_another_machine(
    beside: bool,
    connections: int | None,
    server: Running,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not beside:
        monkeypatch.setattr(serve_measure, "is_here", lambda host: False)
    monkeypatch.setattr(serve_measure, "Offline", Watched)
    host, port = server.address
    options = LoadOptions(
        url=f"http://somebody:secret@{host}:{port}/",
        seconds=0.5,
        requests=12,
        sizes=(1, 2),
        connections=connections,
        out=tmp_path / "new" / "x.json",
    )
    result = serve_measure.measure_load(options, [], say=print)
    assert "secret" not in json.dumps(result)
    settings: dict[str, Any] = json.loads((tmp_path / "new" / "x.json").read_bytes())["settings"]
    assert (settings["connections"], settings["sizes"]) == (connections, [1, 2])
    (found,) = result["servers"]
    assert (found["url"], found["is_here"]) == (f"http://{host}:{port}", beside)
    assert ("overhead_ms" in found["unloaded"], "ratio" in found["saturation"]) == (beside, beside)
    if connections is None:
        assert found["saturation"]["refused"]["count"] == 0, "no more are under way than the queue has room for"
    load, alone, info = result["load"], result["offline"], found["info"]
    assert Watched.options == ScorerOptions(**{name: info[name] for name in CHOSEN}), "the server's own"
    assert Watched.asked[0] == list(range(12))
    assert alone["tokens_per_second"] * alone["seconds"] == pytest.approx(load["tokens"], rel=0.05)
    assert alone["pairs_per_second"] * alone["seconds"] == pytest.approx(load["pairs"], rel=0.05)
    assert alone["batch_ms"] == pytest.approx(1e3 * info["max_batch_tokens"] / alone["tokens_per_second"], rel=0.01)
    bounds = [verdict["what"] for verdict in found["bounds"]]
    assert ("overload: p99 of accepted requests, ms" in bounds) == beside
    assert found["unloaded"]["scores"]["different"] == 0, "scores are compared wherever it runs"
    assert ("is not an address of this machine" in load_tables(result)) == (not beside)
