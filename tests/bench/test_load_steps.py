"""A server is taken through the steps of `cappy bench serve`, beside a scorer; it ends as tables and a document."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from cappy_bench.load.bodies import NATIVE
from cappy_bench.load.bounds import judge
from cappy_bench.load.connections import Client, post
from cappy_bench.load.driving import Target
from cappy_bench.load.infinity_server import infinity_command
from cappy_bench.load.load_options import LoadOptions
from cappy_bench.load.load_steps import Asked, Server, measure_server
from cappy_bench.load.load_tables import load_tables
from cappy_bench.load.mix import Load
from cappy_bench.load.offline import Offline
from cappy_bench.load.server_process import find_server, read_info, start_server
from cappy_engine.cli.main import main
from cappy_engine.errors import BenchmarkError
from tests.support.http_answers import Handle, answer, answering
from tests.support.places import ROOT

pytestmark = pytest.mark.slow

SIZES = [1, 2, 1, 4]
TOKENS_PER_SECOND = 2000.0


class FakeOffline:
    """A scorer with known scores and times, in place of a process."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.expected = [np.full(size, 0.5) for size in load.sizes]

    def each(self, places: Sequence[int]) -> list[float]:
        return [self.all([place]) for place in places]

    def all(self, places: Sequence[int]) -> float:
        return float(self.load.tokens[list(places)].sum()) / TOKENS_PER_SECOND


class FakeServer:
    """Scores one request after another at the scorer's speed; refuses those that come while `most` wait."""

    def __init__(self, most: int) -> None:
        self.most, self.waiting, self.count = most, 0, 0
        self.device = asyncio.Lock()

    async def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.count += 1
        if self.waiting >= self.most:
            return 429, {"error": "busy"}
        self.waiting += 1
        async with self.device:
            await asyncio.sleep(len(body["candidates"]) * 10 / TOKENS_PER_SECOND)
        self.waiting -= 1
        other = 0.25 if self.count % 3 == 0 else 0.5
        return 200, {"results": [{"index": place, "score": other} for place, _ in enumerate(body["candidates"])]}


def in_json(handle: Callable[[dict[str, Any]], Awaitable[tuple[int, Any]]]) -> Handle:
    """Give what answers bytes, from what answers documents."""

    async def answer_bytes(body: bytes) -> bytes:
        status, found = await handle(json.loads(body))
        return answer(status, json.dumps(found).encode())

    return answer_bytes


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """A server that gives another score to every third request, and takes three at a time."""
    requests = tuple(tuple(("Is it so?", f"answer {place}") for place in range(size)) for size in SIZES)
    load = Load(requests, np.array(SIZES) * 10, "made up")
    options = LoadOptions(seconds=0.5, overload=6.0, soak=0.3 / 60, requests=len(SIZES))
    asked = Asked(options, load, cast(Offline, FakeOffline(load)), TOKENS_PER_SECOND, lambda line: None)

    async def run() -> dict[str, Any]:
        async with answering(in_json(FakeServer(most=3).answer)) as address:
            client = Client(*address)
            bodies = [post(address, NATIVE.path, NATIVE.body(pairs)) for pairs in requests]
            target = Target(client, bodies, deadline_seconds=5.0)
            server = Server("a fake", target, NATIVE, connections=3, rooms=(), pid=os.getpid())
            try:
                return await measure_server(server, asked, beside_offline=True)
            finally:
                client.close()

    return asyncio.run(run())


def test_every_step_is_measured_and_what_was_refused_or_scored_otherwise_is_counted(measured: dict[str, Any]) -> None:
    assert list(measured) == ["unloaded", "saturation", "overload", "soak"]
    for step in ("unloaded", "saturation"):
        assert measured[step]["refused"]["count"] == 0
    assert measured["overload"]["refused"]["count"] > 0
    for step in measured.values():
        assert (step["failed"], step["hung"]) == (0, 0)
        assert step["accepted"]["count"] + step["refused"]["count"] == step["requests"]
        assert step["scores"]["compared"] == step["accepted"]["count"]
    assert 0 < measured["overload"]["scores"]["different"] < measured["overload"]["accepted"]["count"]
    assert measured["overload"]["scores"]["max_difference"] == 0.25


def test_the_server_is_compared_with_the_scorer_request_by_request_and_round_by_round(measured: dict[str, Any]) -> None:
    unloaded, saturation = measured["unloaded"], measured["saturation"]
    assert unloaded["scorer"]["count"] == unloaded["overhead_ms"]["count"] == unloaded["accepted"]["count"]
    assert list(unloaded["overhead_ms_by_pairs"]) == ["1", "2", "4"]
    assert unloaded["overhead_ms"]["p50"] >= 0, "the fake takes as long as the scorer, and the way to it"
    assert saturation["scorer_tokens_per_second"] == pytest.approx(TOKENS_PER_SECOND)
    assert 0 < saturation["ratio"]["least"] <= saturation["ratio"]["median"] <= saturation["ratio"]["most"] < 1.05
    one = saturation["rounds"][0]
    assert saturation["requests_per_second"] == pytest.approx(saturation["tokens_per_second"] / 20, rel=1e-3)
    assert one["tokens"] / one["scorer"] == pytest.approx(TOKENS_PER_SECOND, rel=1e-2)
    assert measured["overload"]["rate"] == pytest.approx(6 * saturation["requests_per_second"], rel=1e-3)


def tables_of(*servers: dict[str, Any]) -> str:
    server = {"name": "a fake", "status": "ok", "connections": 3, "ready_seconds": None, "setting": "made up"}
    load = {"requests": 4, "requests_by_pairs": {"1": 2, "2": 1}, "tokens": 80, "texts": "made up"}
    offline = {"tokens_per_second": 2000.0, "pairs_per_second": 200.0}
    return load_tables({"load": load, "offline": offline, "servers": [{**server, **changes} for changes in servers]})


def test_the_tables_show_every_step_and_the_bounds(measured: dict[str, Any]) -> None:
    text = tables_of(
        {**measured, "bounds": judge(measured, batch_ms=10.0)},
        {"name": "infinity", "status": "skipped", "reason": "not installed"},
    )
    assert "infinity: skipped, not installed" in text
    assert text.count("| overload ") == 1 + 3 + 1, "outcomes, by pairs, resources"
    assert "(by 0.25)" in text
    (row,) = [line for line in text.splitlines() if "other scores than" in line]
    assert "NO" in row
    assert "ended with" not in text
    json.dumps(measured, allow_nan=False)


def test_the_tables_say_why_requests_failed_and_that_the_server_crashed(measured: dict[str, Any]) -> None:
    overload = {**measured["overload"], "failed": 12, "problems": {"status 503": 2, "connection closed": 10}}
    lines = tables_of({**measured, "overload": overload, "end_status": -9}).splitlines()
    assert "overload, failed: connection closed (10), status 503 (2)" in lines
    assert "The server ended with status -9: its log, beside the result, may say why." in lines
    assert "ended with" not in tables_of({**measured, "end_status": -15})


# The server's process


def script(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "server.py").write_text(text, encoding="utf-8")
    return [sys.executable, str(tmp_path / "server.py")]


SERVER = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        scorer = {"device": "cpu", "precision": "int8", "threads": 2, "mode": "both", "max_batch_tokens": 512}
        body = json.dumps({**scorer, "limits": {}}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print("a line before", file=sys.stderr)
print(f"serving on http://127.0.0.1:{server.server_port}", file=sys.stderr, flush=True)
server.serve_forever()
"""


def test_a_server_is_started_where_it_says_it_listens_and_is_ended(tmp_path: Path) -> None:
    running = start_server(script(tmp_path, SERVER), log=tmp_path / "logs" / "serve.log")
    try:
        assert read_info(running.address)["precision"] == "int8"
        host, port = running.address
        assert find_server(f"http://{host}:{port}/").address == running.address
    finally:
        assert running.stop() == -15
    assert running.stop() == -15, "it can be stopped twice"
    with pytest.raises(BenchmarkError, match=f"http://{host}:{port}/ready does not answer 200"):
        find_server(f"http://{host}:{port}")


def test_a_server_that_ends_at_once_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="ended with status 3: the port is taken"):
        start_server(
            script(tmp_path, "import sys; print('the port is taken'); sys.exit(3)"), log=tmp_path / "serve.log"
        )


@pytest.mark.parametrize("behind", ["/v1", "?a=1", "#a", ":abc", ":70000"])
def test_only_a_servers_address_is_taken(behind: str) -> None:
    for url in (f"http://127.0.0.1{behind}", "https://127.0.0.1", "127.0.0.1:8000", "http://[::1"):
        with pytest.raises(BenchmarkError, match="is not the address of a server"):
            find_server(url)


def test_infinity_without_its_environment_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"no server of infinity in .*how to make it: .*infinity\.txt"):
        infinity_command(tmp_path, tools=tmp_path, port=1)


# Another generator


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
def test_the_script_for_wrk_sends_all_requests_in_turn_and_sums_up_as_json(tmp_path: Path) -> None:
    asked: list[str] = []

    async def scored(body: dict[str, Any]) -> tuple[int, Any]:
        asked.append(body["instruction"])
        await asyncio.sleep(0.02)
        return (429 if len(asked) % 4 == 0 else 200), {"results": []}

    bodies = tmp_path / "bodies.jsonl"
    bodies.write_bytes(b"".join(NATIVE.body([(name, "Yes")]) + b"\n" for name in ("one", "two", "three")))

    async def run() -> dict[str, Any]:
        async with answering(in_json(scored)) as (host, port):
            words = ["wrk", "-t1", "-c1", "-d1s", "--script", str(ROOT / "docs/examples/load/rank.lua")]
            process = await asyncio.create_subprocess_exec(
                *words, f"http://{host}:{port}", stdout=subprocess.PIPE, env={**os.environ, "BODIES": str(bodies)}
            )
            output, _ = await process.communicate()
            assert process.returncode == 0
            return cast(dict[str, Any], json.loads(output.decode().strip().split("\n")[-1]))

    found = asyncio.run(run())
    assert asked[:6] == ["two", "three", "one"] * 2, "wrk makes the first request twice, and sends it once"
    assert 0 <= len(asked) - found["requests"] <= 1, "the last one may be under way at the end"
    assert found["not_200"] == found["requests"] // 4
    assert found["failed"] == 0
    assert found["p50_ms"] >= 20


# The command


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--url", "http://127.0.0.1:1", "--threads", "2"], "--threads is for a server that is started"),
        (["--pairs-per-request", "0"], "0 is not in the range"),
        (["--out", "same", "--bodies", "same"], "need two files"),
    ],
)
def test_what_cannot_be_meant_is_wrong_usage(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", *arguments]) == 2
    assert problem in capsys.readouterr().err


def test_results_that_are_there_are_kept_and_nothing_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    out.write_text("mine")
    assert main(["bench", "serve", "--out", str(out), "--url", "http://127.0.0.1:1"]) == 1
    assert "result.json exists" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_a_real_server_is_measured_and_its_scores_are_the_scorers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, bodies = tmp_path / "result.json", tmp_path / "bodies.jsonl"
    words = ["bench", "serve", "--out", str(out), "--bodies", str(bodies), "--seconds", "1", "--requests", "12"]
    sizes = ["--pairs-per-request", "1", "--pairs-per-request", "3", "--threads", "1"]
    assert main([*words, *sizes]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_bytes())
    (server,) = result["servers"]
    assert (server["status"], server["end_status"], server["info"]["threads"]) == ("ok", 0, 1)
    for step in ("unloaded", "saturation", "overload"):
        assert server[step]["accepted"]["count"] > 0
        assert (server[step]["failed"], server[step]["hung"]) == (0, 0)
        assert server[step]["scores"] == {
            "compared": server[step]["accepted"]["count"],
            "different": 0,
            "unreadable": 0,
            "max_difference": 0.0,
        }
    assert server["saturation"]["refused"]["count"] == 0
    lines = bodies.read_text(encoding="utf-8").split("\n")
    assert [set(json.loads(line)) for line in lines[:-1]] == [{"instruction", "candidates"}] * 12
