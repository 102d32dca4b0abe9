"""How a server begins, changes its model and ends: with nothing lost, and never with wrong scores."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cappy_engine import __version__
from cappy_engine.scorer import Scorer
from tests.support.bundles import copy_bundle
from tests.support.servers import COMMAND, SECONDS, Server, faulty, pairs_of, serving, started

pytestmark = pytest.mark.slow

SKY = "Is the sky blue?"
ONE = pairs_of((SKY, "Yes"))


def test_ctrl_c_ends_a_server_like_sigterm(bundle: Path) -> None:
    with serving("--bundle", str(bundle)) as server:
        assert server.stop(signal.SIGINT) == 0


def test_a_bundle_that_takes_the_place_of_another_answers_from_then_on(bundle: Path, tmp_path: Path) -> None:
    """Requests go on while the model changes, and none of them fails."""
    current = tmp_path / "current"
    current.symlink_to(bundle)
    embedded = Scorer.open()
    with serving("--bundle", str(current), "--precision", "int8") as server:
        before = server.post("/v1/score", ONE).json()["results"][0]["score"]
        statuses: set[int] = set()
        is_over = threading.Event()

        def ask() -> None:
            while not is_over.is_set():
                statuses.add(server.post("/v1/score", ONE).status_code)

        asking = [threading.Thread(target=ask) for _ in range(4)]
        for thread in asking:
            thread.start()
        current.unlink()
        current.symlink_to(Path(Scorer.open.__globals__["EMBEDDED"]))
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_line("its model answers from now on")
        after = server.post("/v1/score", ONE).json()["results"][0]["score"]
        is_over.set()
        for thread in asking:
            thread.join()
        assert statuses == {200}
        assert after == embedded.score([(SKY, "Yes")])[0] != before
        assert server.metric('cappy_swaps_total{result="done"}') == 1


def test_information_log_and_metrics_tell_which_bundle_answers(bundle: Path, tmp_path: Path) -> None:
    """A link stays the same when another bundle takes its place, and so does the name of the model."""
    folders = [tmp_path / "first", tmp_path / "second"]
    folders[0].symlink_to(bundle)
    shutil.copytree(Path(Scorer.open.__globals__["EMBEDDED"]), folders[1])
    digests = [json.loads((folder / "manifest.json").read_text())["manifest_sha256"] for folder in folders]
    current = tmp_path / "current"
    current.symlink_to(folders[0])
    with serving("--bundle", str(current), "--precision", "int8") as server:
        assert f"cappy {__version__} opens {current}" in server.log
        server.wait_for_line(f"model current: int8 on cpu, of {bundle.resolve()}, manifest {digests[0][:12]}")
        for folder, digest in zip(folders, digests, strict=True):
            current.unlink()
            current.symlink_to(folder)
            server.process.send_signal(signal.SIGHUP)
            told = server.wait_for_line(
                f"from now on: current: int8 on cpu, of {folder.resolve()}, manifest {digest[:12]}"
            )
            assert "the bundle was opened again; its model answers" in told
            assert f"cappy {__version__} opens {current} again" in server.log
            found = server.get("/info").json()
            assert (found["bundle"], found["manifest_sha256"]) == (str(folder.resolve()), digest)
            labels = f'device="cpu",manifest_sha256="{digest}",model="current",precision="int8",version="{__version__}"'
            assert server.metric(f"cappy_model_info{{{labels}}}") == 1
            assert server.get("/metrics").text.count("cappy_model_info{") == 1


def test_a_model_that_hangs_ends_the_process(bundle: Path, tmp_path: Path) -> None:
    """It answers nobody any more, and only a new process helps."""
    trigger = tmp_path / "trigger"
    options = ["--request-seconds", "0.2", "--drain-seconds", "0.1"]
    with serving("--bundle", str(bundle), *options, command=faulty("hangs", trigger)) as server:
        server.wait_until(lambda: server.post("/v1/score", ONE).status_code == 200)
        trigger.touch()
        assert server.post("/v1/score", ONE).status_code == 503
        server.wait_until(lambda: server.get("/ready").status_code == 503)
        assert (server.get("/ready").json(), server.get("/health").status_code) == ({"status": "broken"}, 200)
        assert server.wait() == 1
        assert "a run of the model has not ended in 2 seconds" in server.log


def test_a_bundle_that_cannot_be_opened_changes_nothing(bundle: Path, tmp_path: Path) -> None:
    copy = copy_bundle(tmp_path / "copy")
    with serving("--bundle", str(copy), "--precision", "fp32") as server:
        before = server.post("/v1/score", ONE).json()
        (copy / "tokenizer.json").write_text("{}")
        server.process.send_signal(signal.SIGHUP)
        assert "tokenizer.json" in server.wait_for_line("the old model goes on")
        assert server.post("/v1/score", ONE).json() == before
        assert server.get("/ready").status_code == 200
        assert server.metric('cappy_swaps_total{result="failed"}') == 1
        assert "Traceback" not in server.log


def test_a_mistake_of_ours_while_a_bundle_is_opened_again_has_a_traceback(bundle: Path, tmp_path: Path) -> None:
    trigger = tmp_path / "trigger"
    with serving("--bundle", str(bundle), command=faulty("open-bug", trigger)) as server:
        trigger.touch()
        server.process.send_signal(signal.SIGHUP)
        assert "a mistake" in server.wait_for_line("the old model goes on")
        server.wait_for_line("ZeroDivisionError: ")
        assert server.post("/v1/score", ONE).status_code == 200


def test_a_model_that_scores_otherwise_than_its_bundle_says_is_not_served(bundle: Path, tmp_path: Path) -> None:
    trigger = tmp_path / "trigger"
    trigger.touch()
    with started(["--bundle", str(bundle)], command=faulty("wrong", trigger)) as server:
        assert server.wait() == 1
        assert "the model gives wrong scores: 0.12300 for a pair of the bundle" in server.log


def test_a_swap_to_a_model_with_wrong_scores_is_refused(bundle: Path, tmp_path: Path) -> None:
    trigger = tmp_path / "trigger"
    with serving("--bundle", str(bundle), command=faulty("wrong", trigger)) as server:
        trigger.touch()
        server.process.send_signal(signal.SIGHUP)
        assert "wrong scores" in server.wait_for_line("the old model goes on")


def test_a_model_that_begins_to_fail_ends_the_process(bundle: Path, tmp_path: Path) -> None:
    trigger = tmp_path / "trigger"
    with serving("--bundle", str(bundle), command=faulty("fails", trigger)) as server:
        assert server.post("/v1/score", ONE).status_code == 200
        trigger.touch()
        assert server.post("/v1/score", ONE).status_code in (500, 503)
        with contextlib.suppress(httpx.TransportError):  # it says so until it ends
            server.wait_until(lambda: server.get("/ready").status_code == 503)
        assert server.wait() == 1
        assert "the model fails on pairs that it scored when it was exported: the device is gone" in server.log


@pytest.mark.parametrize(
    ("options", "status", "problem"),
    [
        (["--bundle", "/nowhere"], 1, "/nowhere"),
        (["--host", "0.0.0.0"], 2, "host '0.0.0.0' can be reached by others; give --api-key-file"),
        (["--host", "0.0.0.0", "--no-key", "--api-key-file", "keys"], 2, "exclude each other"),
        (["--api-key-file", "/nowhere"], 1, "the API keys of /nowhere cannot be read"),
        (["--host", "192.0.2.1", "--no-key"], 1, "cannot listen on 192.0.2.1"),
        (["--port", "70000"], 2, "port must be at most 65535"),
        (["--request-seconds", "0"], 2, "request-seconds"),
        (["--drain-seconds", "1e11"], 2, "drain_seconds must be at most 86400, a day, got 1e+11"),
        (["--unix-socket", "s", "--port", "9000"], 2, "unix_socket and port exclude each other; give one of them"),
        (["--unix-socket", "s", "--host", "::1"], 2, "unix_socket and host exclude each other; give one of them"),
        (["--unix-socket", "/nowhere/socket"], 1, "cannot listen on /nowhere/socket"),
    ],
)
def test_a_server_that_cannot_be_what_was_asked_ends_and_says_why(
    options: list[str], status: int, problem: str
) -> None:
    with started(options) as server:
        assert server.wait() == status
        assert problem in server.log


def test_a_port_that_is_taken_is_named(server: Server) -> None:
    port = str(httpx.URL(server.url).port)
    with started(["--port", port]) as second:
        assert second.wait() == 1
        assert second.log == f"cappy serve: cannot listen on 127.0.0.1, port {port}: Address already in use\n"


def test_every_option_has_a_variable(bundle: Path) -> None:
    variables = {"CAPPY_SERVE_BUNDLE": str(bundle), "CAPPY_SERVE_PRECISION": "int8", "CAPPY_SERVE_MAX_PAIRS": "7"}
    with serving(variables=variables) as server:
        found = server.get("/info").json()
        assert (found["precision"], found["limits"]["max_pairs"]) == ("int8", 7)
        assert found["model"] == bundle.name


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("CAPPY_SERVE_BUNDLE", "", "the variable CAPPY_SERVE_BUNDLE is empty"),
        ("CAPPY_SERVE_PROT", "1", "did you mean CAPPY_SERVE_PORT"),
        ("CAPPY_SERVE_MAX_PAIRS", "many", "many"),
    ],
)
def test_a_variable_that_would_change_nothing_is_an_error(name: str, value: str, problem: str) -> None:
    with started(variables={name: value}) as server:
        assert server.wait() == 2
        assert problem in server.log


def test_a_unix_socket_is_its_owner_s_alone_and_goes_at_the_end(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))  # by a server that was killed
    left.close()
    with serving("--bundle", str(bundle), "--unix-socket", str(path)) as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://here") as client:
            assert client.post("/v1/score", json=ONE).status_code == 200
        with started(["--unix-socket", str(path)]) as second:
            assert second.wait() == 1
            assert "Address already in use" in second.log
        assert server.stop() == 0
    assert not path.exists()


def test_logs_are_json_for_a_collector_and_hold_no_text(bundle: Path) -> None:
    with serving("--bundle", str(bundle), "--log-format", "json", "--log-requests") as server:
        began = time.monotonic()
        answer = server.post("/v1/score", pairs_of(("a secret", "b"), ("a secret", "word " * 800)), x_request_id="mine")
        took = 1000 * (time.monotonic() - began)
        server.post("/v1/score", {"a secret": 1})
        assert server.stop() == 0
        lines = [json.loads(line) for line in server.lines]
    asked = [line for line in lines if line["message"] == "request"]
    assert [(line["status"], line["route"]) for line in asked] == [(200, "/v1/score"), (422, "/v1/score")]
    assert (asked[0]["request_id"], asked[0]["pairs"], asked[0]["level"]) == ("mine", 2, "info")
    assert (asked[0]["tokens"], asked[0]["truncated"]) == (answer.json()["tokens"], 1)
    assert float(answer.headers["x-cappy-total-ms"]) <= asked[0]["ms"] <= took
    told = datetime.datetime.fromisoformat(asked[0]["time"])
    assert abs(told - datetime.datetime.now(datetime.UTC)) < datetime.timedelta(minutes=5)
    assert "secret" not in server.log
    assert "server process" not in server.log  # as uvicorn writes, if it may


def test_what_ends_a_server_is_json_too(tmp_path: Path) -> None:
    """The line that tells why there is no server is for a collector of JSON, too."""
    with started(["--bundle", str(tmp_path), "--log-format", "json"]) as server:
        assert server.wait() == 1
        last = json.loads(server.lines[-1])
        assert (last["level"], "is not a bundle: it has no manifest.json" in last["message"]) == ("error", True)
        assert [json.loads(line)["message"] for line in server.lines].count(last["message"]) == 1
    with started(["--log-format", "json"], command=faulty("open-bug", tmp_path)) as server:
        assert server.wait() == 1
        last = json.loads(server.lines[-1])
        assert "ZeroDivisionError" in last["traceback"]


@pytest.fixture(params=["a full disk", "a pipe that nobody reads"])
def lost(request: pytest.FixtureRequest) -> Iterator[int]:
    """Give a descriptor for a log that cannot be written: to a disk that is full, or to a pipe that is."""
    if request.param == "a full disk":
        with Path("/dev/full").open("w") as full:
            yield full.fileno()
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    yield writer
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("is_cut_off", [False, True])
def test_a_log_that_cannot_be_written_does_not_stop_the_server(bundle: Path, lost: int, is_cut_off: bool) -> None:
    """It does not keep it from its end either, also where that is an error, which would be told."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [*COMMAND, "serve", "--bundle", str(bundle), "--port", str(port), "--log-requests"]
    with subprocess.Popen([*words, "--drain-seconds", "0.5"], stderr=lost) as process, contextlib.ExitStack() as stack:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=httpx.HTTPTransport(retries=8)) as client:
                while client.get("/ready").status_code == 503:
                    time.sleep(0.05)
                assert [client.post("/v1/score", json=ONE).status_code for _ in range(5)] == [200] * 5
            if is_cut_off:
                client_of_half = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                client_of_half.sendall(b"POST /v1/score HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n{")
                time.sleep(0.2)
            process.terminate()
            assert process.wait(SECONDS) == int(is_cut_off)
        finally:
            process.kill()
