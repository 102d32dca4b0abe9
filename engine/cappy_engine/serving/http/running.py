"""Run the server in this process: listen, load, answer, swap at SIGHUP, and end at SIGTERM with nothing lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
import uvloop

from cappy_engine.errors import ModelBroken, ServingError
from cappy_engine.options import ScorerOptions
from cappy_engine.serving.http.app import make_app
from cappy_engine.serving.http.connections import BoundedConnection
from cappy_engine.serving.http.endpoint import Gate
from cappy_engine.serving.keys import read_keys
from cappy_engine.serving.metrics import Metrics
from cappy_engine.serving.server_options import ServerOptions
from cappy_engine.serving.service import Service
from cappy_engine.serving.tracing import Tracer

BACKLOG = 2048
LINGER_SECONDS = 0.25
"""How long a server that stops still takes connections, whose answers say that they are closed."""

log = logging.getLogger("cappy.server")


def run_server(bundle: str | Path, options: ScorerOptions, server: ServerOptions) -> None:
    """Serve until SIGTERM or SIGINT, and answer what was accepted.

    It listens at once, and is ready when the model is loaded and scored its canary. SIGHUP opens the bundle again.

        >>> run_server("cappy-bundle", ScorerOptions(precision="int8"), ServerOptions(port=9000))

    Raises ServingError where it cannot begin (the options' keys, the bundle, the address), ModelBroken if the model
    gives no right scores any more, and what `Scorer.open` raises.
    """
    keys = None if server.api_key_file is None else read_keys(server.api_key_file)
    tracer = Tracer() if server.tracing else None
    with listening(server) as (listener, address), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        service = Service(bundle, options, server, metrics=Metrics())
        gate = Gate(service, server, keys, tracer)
        try:
            runner.run(_Server(gate, listener, address).run())
        finally:
            if tracer is not None:
                tracer.close()


class _Server:
    """The server's life: what signals and threads do to it happens in the event loop."""

    def __init__(self, gate: Gate, listener: socket.socket, address: str) -> None:
        self._gate = gate
        self._service = gate.service
        self._listener = listener
        self._address = address
        self._problem: BaseException | None = None
        BoundedConnection.header_seconds = gate.options.body_seconds
        self._web = _Quiet(
            uvicorn.Config(
                make_app(gate),
                http=BoundedConnection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=gate.options.idle_seconds,  # type: ignore[arg-type]  # any number of seconds
                timeout_graceful_shutdown=gate.options.drain_seconds,  # type: ignore[arg-type]
            )
        )

    async def run(self) -> None:
        """Serve until `_stop`; raises what made it stop."""
        loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()

        def stop_for(error: ModelBroken) -> None:
            loop.call_soon_threadsafe(self._stop, error)

        self._service.on_broken = stop_for
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._begin, self._swap)
        self._begin(self._load)
        serving = asyncio.ensure_future(self._web.serve(sockets=[self._listener]))
        await asyncio.wait(
            {serving, waiting := asyncio.ensure_future(self._stopped.wait())}, return_when=asyncio.FIRST_COMPLETED
        )
        waiting.cancel()
        self._gate.is_closing = True
        self._service.drain()
        await asyncio.sleep(LINGER_SECONDS)
        self._web.should_exit = True
        await serving
        is_done = await asyncio.to_thread(self._service.close)
        if self._problem is not None:
            raise self._problem
        if self._gate.unanswered or not is_done:
            raise ServingError(
                f"{self._gate.unanswered} requests were not answered in drain_seconds, "
                f"{self._gate.options.drain_seconds:g}; give the server more time to end"
            )
        log.info("all requests are answered; the server stops")

    def _stop(self, problem: BaseException | None = None) -> None:
        self._problem = self._problem or problem
        self._stopped.set()

    def _begin(self, work: Callable[[asyncio.AbstractEventLoop], None]) -> None:
        """Do work in a thread that nobody waits for at the end."""
        threading.Thread(target=work, args=(asyncio.get_running_loop(),), name="cappy-load", daemon=True).start()

    def _load(self, loop: asyncio.AbstractEventLoop) -> None:
        """Load the first model; without one there is nothing to serve."""
        try:
            self._service.load()
        except BaseException as error:
            loop.call_soon_threadsafe(self._stop, error)
        else:
            card = self._service.model.card
            log.info("serving on %s", self._address)
            log.info("model %s: %s on %s", card.name, card.precision, card.device)

    def _swap(self, loop: asyncio.AbstractEventLoop) -> None:
        """Load the bundle again; where that fails, the model that is there goes on."""
        try:
            self._service.load()
        except Exception as error:
            self._service.metrics.swapped("failed")
            log.error("the bundle was not opened again, and the model before goes on: %s", error)  # noqa: TRY400
        else:
            self._service.metrics.swapped("done")
            log.info("the bundle was opened again; its model answers from now on")


class _Quiet(uvicorn.Server):
    """uvicorn's server without its signal handlers: ours end it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


@contextlib.contextmanager
def listening(server: ServerOptions) -> Iterator[tuple[socket.socket, str]]:
    """Open the socket that the options name; yields it with its address. Raises ServingError where it cannot be had.

    >>> with listening(ServerOptions(port=0)) as (listener, address):
    ...     print(address)
    http://127.0.0.1:54321
    """
    path = server.unix_socket
    try:
        if path is not None:
            listener = _listen_on_path(path)
            address = f"unix:{path}"
        else:
            family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
            listener = socket.create_server((server.host, server.port), family=family, backlog=BACKLOG)
            host = f"[{server.host}]" if ":" in server.host else server.host
            address = f"http://{host}:{listener.getsockname()[1]}"
    except (OSError, OverflowError) as error:
        where = str(path) if path is not None else f"{server.host}, port {server.port}"
        raise ServingError(f"cannot listen on {where}: {getattr(error, 'strerror', None) or error}") from error
    try:
        yield listener, address
    finally:
        listener.close()
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink()


def _listen_on_path(path: Path) -> socket.socket:
    """Listen on a unix socket, in place of one that nobody listens on any more; only its owner may connect."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        if path.exists() and stat.S_ISSOCK(path.lstat().st_mode):
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(str(path)):
                    path.unlink()
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
