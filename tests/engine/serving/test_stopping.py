"""How a server ends: what it accepted is answered, and nothing keeps it longer than it may take."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.support.servers import Server, faulty, pairs_of, serving, started

pytestmark = pytest.mark.slow

SKY = "Is the sky blue?"
ONE = pairs_of((SKY, "Yes"))


def test_a_server_that_stops_answers_what_it_accepted(bundle: Path, tmp_path: Path) -> None:
    trigger = tmp_path / "trigger"
    trigger.touch()
    options = "--step-tokens 16 --max-queue-tokens 1000".split()
    with serving("--bundle", str(bundle), *options, command=faulty("slow", trigger)) as server:
        with ThreadPoolExecutor(6) as threads:
            waiting = [
                threads.submit(server.post, "/v1/score", pairs_of((SKY, str(number)), (SKY, "No")))
                for number in range(6)
            ]
            server.wait_until(lambda: server.metric("cappy_queue_pairs") > 5)
            assert server.stop(signal.SIGTERM) == 0
            assert [future.result().status_code for future in waiting] == [200] * 6
        assert "all requests are answered" in server.log
        with pytest.raises(httpx.ConnectError):
            server.get("/health")


def test_a_server_that_stops_says_so_to_all_who_ask_meanwhile(bundle: Path) -> None:
    code = "import cappy_engine.serving.http.running as r; r.LINGER_SECONDS = 60"
    code += "; from cappy_engine.cli.main import main; raise SystemExit(main())"
    with serving("--bundle", str(bundle), command=(sys.executable, "-c", code)) as server:
        assert server.metric("cappy_ready") == 1
        server.process.send_signal(signal.SIGTERM)
        server.wait_until(lambda: server.get("/ready").status_code == 503)
        ready = server.get("/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
        assert server.metric("cappy_ready") == 0
        scored = server.post("/v1/score", ONE)  # by who did not hear it yet
        assert scored.status_code == 200
        assert ready.headers["connection"] == scored.headers["connection"] == "close"
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_line("the server stops, and the bundle is not opened again")
        time.sleep(0.6)
        assert server.get("/ready").status_code == 503  # new connections are still taken
        assert server.stop(signal.SIGTERM) == 1


def test_a_server_that_stops_waits_no_longer_than_it_may(bundle: Path, tmp_path: Path) -> None:
    trigger = tmp_path / "trigger"
    trigger.touch()
    options = ["--bundle", str(bundle), "--step-tokens", "16", "--max-queue-tokens", "99999", "--drain-seconds", "0.3"]
    with serving(*options, command=faulty("slow", trigger)) as server, ThreadPoolExecutor(2) as threads:
        many = pairs_of(*[(SKY, str(number)) for number in range(200)])
        asked = [threads.submit(server.post, "/v1/score", many) for _ in range(2)]
        server.wait_until(lambda: server.metric("cappy_queue_pairs") > 200)
        assert server.stop(signal.SIGTERM) == 1
        assert "2 requests were not answered in drain_seconds, 0.3" in server.log
        assert [future.result().status_code for future in asked] == [503, 503]


@pytest.mark.parametrize("workers", ["", "--threads 2 --mode throughput --step-tokens 4"])
def test_a_run_that_hangs_does_not_keep_a_server_that_stops(bundle: Path, tmp_path: Path, workers: str) -> None:
    trigger = tmp_path / "trigger"
    options = ["--bundle", str(bundle), "--drain-seconds", "0.3"]
    with (
        serving(*options, *workers.split(), command=faulty("hangs", trigger)) as server,
        ThreadPoolExecutor(1) as threads,
    ):
        trigger.touch()
        asked = threads.submit(server.post, "/v1/score", ONE)
        server.wait_until(lambda: not trigger.exists())
        assert server.stop() == 1
        assert asked.result().status_code == 503
        assert "1 request was not answered in drain_seconds, 0.3" in server.log


def is_refused(server: Server) -> bool:
    """Tell if nobody listens any more."""
    try:
        server.connect().close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_second_signal_ends_a_server_at_once(bundle: Path, tmp_path: Path) -> None:
    trigger = tmp_path / "trigger"
    with serving("--bundle", str(bundle), command=faulty("hangs", trigger)) as server, ThreadPoolExecutor(1) as threads:
        trigger.touch()
        asked = threads.submit(server.post, "/v1/score", ONE)
        server.wait_until(lambda: not trigger.exists())
        server.process.send_signal(signal.SIGINT)
        server.wait_for_line("the server stops when what it accepted is answered")
        server.wait_until(lambda: is_refused(server))
        assert server.process.poll() is None
        assert server.stop(signal.SIGINT) == 1
        assert "a second signal ends the server at once; requests that were cut off: 1" in server.log
        assert isinstance(asked.exception(), httpx.TransportError)


def test_idle_connections_are_closed_while_the_last_requests_are_answered(bundle: Path, tmp_path: Path) -> None:
    trigger = tmp_path / "trigger"
    with (
        serving("--bundle", str(bundle), command=faulty("hangs", trigger)) as server,
        ThreadPoolExecutor(1) as threads,
        server.connect() as idle,
    ):
        idle.sendall(b"GET /health HTTP/1.1\r\nhost: here\r\n\r\n")
        while b"alive" not in idle.recv(65536):
            pass
        trigger.touch()
        asked = threads.submit(server.post, "/v1/score", ONE)
        server.wait_until(lambda: not trigger.exists())
        server.process.send_signal(signal.SIGTERM)
        assert idle.recv(65536) == b""
        assert is_refused(server)
        assert not asked.done()
        assert server.stop(signal.SIGTERM) == 1


def test_a_signal_that_comes_twice_at_once_is_one(bundle: Path, tmp_path: Path) -> None:
    """As from coreutils' timeout, which signals its command and then the group of which that is a part."""
    trigger = tmp_path / "trigger"
    trigger.touch()
    with (
        serving("--bundle", str(bundle), command=faulty("slow", trigger)) as server,
        ThreadPoolExecutor(1) as threads,
    ):
        asked = threads.submit(server.post, "/v1/score", ONE)
        server.wait_until(lambda: server.metric("cappy_encoding_chars") == 0)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_line("the server stops when what it accepted is answered")
        assert server.stop(signal.SIGTERM) == 0
        assert asked.result().status_code == 200


@pytest.mark.parametrize("is_path", [False, True])
def test_connections_that_wait_when_a_server_stops_are_answered(bundle: Path, tmp_path: Path, is_path: bool) -> None:
    """The system made them, and a server that has much to do had no time to take them."""
    code = """
import sys, time
from cappy_engine.cli.main import main
from cappy_engine.serving.http.listening import Listener

def stop_late(self, stop=Listener.stop):
    print("the time to take connections is over", file=sys.stderr, flush=True)
    time.sleep(1)
    return stop(self)

Listener.stop = stop_late
raise SystemExit(main())
"""
    place = ["--unix-socket", str(tmp_path / "socket")] if is_path else []
    command = (sys.executable, "-c", code)
    with serving("--bundle", str(bundle), *place, command=command) as server, contextlib.ExitStack() as open_ones:
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_line("the time to take connections is over")
        clients = [open_ones.enter_context(server.connect()) for _ in range(20)]
        for client in clients:
            client.sendall(b"GET /health HTTP/1.1\r\nhost: here\r\n\r\n")
        assert [client.recv(15) for client in clients] == [b"HTTP/1.1 200 OK"] * 20
        assert server.wait() == 0


def test_a_server_without_time_to_end_ends_well_where_nobody_waits(bundle: Path) -> None:
    with serving("--bundle", str(bundle), "--drain-seconds", "0") as server, server.connect() as client:
        client.sendall(b"GET /hea")
        assert server.post("/v1/score", ONE).status_code == 200  # its connection stays open
        assert server.stop(signal.SIGINT) == 0
        assert "ancel" not in server.log


SIGNALS = [signal.SIGHUP, signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_the_bundle_is_opened_is_no_other_than_later_ones(bundle: Path, number: int) -> None:
    code = f"""
import os, sys, threading, time
from cappy_engine.cli.main import main

threading.Thread(target=time.sleep, args=(60,), daemon=True).start()  # as numpy's, which may take a signal, too

class Signals:
    def find_spec(self, name, path=None, target=None):
        if name == "uvicorn":
            os.kill(os.getpid(), {int(number)})

sys.meta_path.insert(0, Signals())
raise SystemExit(main())
"""
    with started(["--bundle", str(bundle)], command=(sys.executable, "-c", code)) as server:
        if number == signal.SIGHUP:
            server.wait_until_ready()
            server.wait_for_line("its model answers from now on")
            server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert "all requests are answered; the server stops" in server.log


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_when_all_is_answered_changes_nothing(bundle: Path, number: int) -> None:
    with serving("--bundle", str(bundle)) as server:
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_line("all requests are answered; the server stops")
        assert server.stop(number) == 0
        assert server.lines[-1] == "all requests are answered; the server stops\n"


def test_a_server_that_loads_ends_at_once(bundle: Path, tmp_path: Path) -> None:
    trigger = tmp_path / "trigger"
    trigger.write_text("60")
    with started(["--bundle", str(bundle)], command=faulty("slow-open", trigger)) as server:
        server.wait_until(lambda: not trigger.exists())
        assert server.stop() == 0
        assert "serving on" not in server.log


def test_a_server_that_stops_does_not_wait_for_another_model(bundle: Path, tmp_path: Path) -> None:
    trigger = tmp_path / "trigger"
    with serving("--bundle", str(bundle), command=faulty("slow-open", trigger)) as server:
        trigger.write_text("60")
        server.process.send_signal(signal.SIGHUP)
        server.wait_until(lambda: not trigger.exists())
        assert server.stop() == 0
        assert "answers from now on" not in server.log


def test_signals_that_come_while_a_model_loads_open_the_bundle_once_more(bundle: Path, tmp_path: Path) -> None:
    trigger = tmp_path / "trigger"
    with serving("--bundle", str(bundle), command=faulty("slow-open", trigger)) as server:
        statuses: set[int] = set()
        is_over = threading.Event()

        def ask() -> None:
            while not is_over.is_set():
                statuses.add(server.post("/v1/score", ONE).status_code)

        asking = [threading.Thread(target=ask) for _ in range(3)]
        for thread in asking:
            thread.start()
        trigger.write_text("0.3")
        server.process.send_signal(signal.SIGHUP)
        server.wait_until(lambda: not trigger.exists())
        for _ in range(3):
            server.process.send_signal(signal.SIGHUP)
            server.get("/health")
        server.wait_until(lambda: server.log.count("its model answers from now on") >= 2)
        time.sleep(0.3)  # in which others would be opened
        is_over.set()
        for thread in asking:
            thread.join()
        assert statuses == {200}
        assert server.metric('cappy_swaps_total{result="done"}') == 2
        assert server.stop() == 0
