"""Run the server in this process: listen, load, answer, swap at SIGHUP, and end at SIGTERM with nothing lost.

The end has one deadline, made at the first signal. What still runs then, such as native code that hangs, is left
behind: Python would wait for its threads for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

import uvicorn
import uvloop

from cappy_engine import __version__
from cappy_engine.errors import CappyError, ServingError
from cappy_engine.options import ScorerOptions
from cappy_engine.serving.http.app import make_app
from cappy_engine.serving.http.connections import connection_class
from cappy_engine.serving.http.endpoint import Gate
from cappy_engine.serving.http.listening import BACKLOG, Listener, with_room
from cappy_engine.serving.http.web_server import GRACE_SECONDS, WebServer, wait_for
from cappy_engine.serving.metrics import Metrics
from cappy_engine.serving.server_options import ServerOptions
from cappy_engine.serving.service import Service

LINGER_SECONDS = 0.25
"""How long a server that stops still takes connections, whose answers say that they are closed."""
TWICE_SECONDS = 0.2
"""A signal that comes again so soon is the same one: some programs pass on what the system sent to us as well."""
WATCH_SECONDS = 1.0
SWITCH_SECONDS = 0.002
"""How long a thread may keep the interpreter while others want it: the event loop may wait for several in turn."""

log = logging.getLogger("cappy.server")


def run_server(
    bundle: str | Path, options: ScorerOptions, server: ServerOptions, held: list[int] | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, and answer what was accepted.

    It listens at once, and is ready when the model is loaded and scored its canary. SIGHUP opens the bundle again.

        >>> run_server("cappy-bundle", ScorerOptions(precision="int8"), ServerOptions(port=9000))

    Raises ServingError where it cannot begin (the options' keys, the bundle, the address) or requests were cut off,
    ModelBroken if the model gives no right scores any more, and what `Scorer.open` raises. Otherwise it ends the
    process: with status 0 when all is answered, with 1 at a second signal or where something still runs when the time
    to end is over. A signal in the last moment changes nothing. Signals that came before, `held`, are taken out of the
    list as soon as it listens to others.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    server = with_room(server)
    gate = Gate.of(Service(bundle, options, server, metrics=Metrics()), server)
    with Listener.open(server) as listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_Server(gate, listener).run([] if held is None else held))


class _Server:
    """The server's life: what signals and threads do to it happens in the event loop."""

    def __init__(self, gate: Gate, listener: Listener) -> None:
        self._gate = gate
        self._service = gate.service
        self._listener = listener
        self._problem: BaseException | None = None
        self._loading: threading.Thread | None = None
        self._is_asked_again = False
        self._signalled_at: float | None = None
        self._web = WebServer(
            uvicorn.Config(
                make_app(gate),
                http=connection_class(gate.options, gate.service.metrics),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=gate.options.idle_seconds,  # type: ignore[arg-type]  # any number of seconds
            ),
            listener,
        )
        limit, connections = gate.options.max_connections, self._web.server_state.connections
        gate.service.metrics.watch("connections", "connections that are open", lambda: len(connections))
        gate.service.metrics.watch("connections_limit", "connections that may be open", lambda: limit)

    async def run(self, held: list[int]) -> None:
        """Serve until `_stop`, and take over the signals `held`; raises what made it stop."""
        self._loop = loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._service.on_broken = partial(self._tell, self._stop)
        does = {signal.SIGTERM: self._signalled, signal.SIGINT: self._signalled, signal.SIGHUP: self._swap}
        for number, do in does.items():
            loop.add_signal_handler(number, do)
        for came in held:
            loop.call_soon(does[signal.Signals(came)])
        held.clear()
        self._begin(self._load_first)
        watching = asyncio.ensure_future(self._watch())
        serving = asyncio.ensure_future(self._web.serve(sockets=[self._listener.socket]))
        await asyncio.wait(
            {serving, waiting := asyncio.ensure_future(self._stopped.wait())}, return_when=asyncio.FIRST_COMPLETED
        )
        waiting.cancel()
        watching.cancel()
        self._web.deadline = time.monotonic() + self._gate.options.drain_seconds
        self._gate.is_closing = True
        self._service.drain()
        await asyncio.sleep(LINGER_SECONDS)
        self._web.should_exit = True
        await serving
        is_quiet = await self._close()
        error = self._problem or self._cut_off()
        if error is None:
            log.info("all requests are answered; the server stops")
            self._leave(0)
        if not is_quiet:
            log.error("%s", error)
            self._leave(1)
        raise error

    async def _watch(self) -> None:
        """Stop where a run of the model hangs: only another process helps then."""
        awake_since = time.monotonic()
        while not (error := self._service.find_hanging(time.monotonic() - awake_since)):
            asked = time.monotonic()
            await asyncio.sleep(WATCH_SECONDS)
            if time.monotonic() - asked > 3 * WATCH_SECONDS:  # the process was stopped, and so was its model
                awake_since = time.monotonic()
        log.error("%s", error)
        self._stop(error)

    async def _close(self) -> bool:
        """Free what there is, until the deadline; tells if no thread of ours is left. A load is not waited for."""
        ends = max(self._web.deadline, time.monotonic() + GRACE_SECONDS)

        def close() -> None:
            self._service.close(max(0.0, self._web.deadline - time.monotonic()))
            if self._gate.tracer is not None:
                self._gate.tracer.close()

        closing = threading.Thread(target=close, name="cappy-close", daemon=True)
        closing.start()
        await wait_for(
            lambda: not closing.is_alive() and (self._loading is not None or not _has_threads()),
            ends,
        )
        return not _has_threads()

    def _cut_off(self) -> ServingError | None:
        """Say how many requests were not answered, if any."""
        if not self._web.cut_off:
            return None
        count = "1 request was" if self._web.cut_off == 1 else f"{self._web.cut_off} requests were"
        return ServingError(
            f"{count} not answered in drain_seconds, {self._gate.options.drain_seconds:g}; give the server more time "
            "to end"
        )

    def _leave(self, status: int) -> NoReturn:
        """End the process without a wait for its threads."""
        self._listener.close()
        logging.shutdown()
        os._exit(status)

    def _signalled(self) -> None:
        """Stop at the first signal, and end at once at the second."""
        now = time.monotonic()
        if self._signalled_at is not None:
            if now - self._signalled_at < TWICE_SECONDS:
                return
            log.error(
                "a second signal ends the server at once; requests that were cut off: %d", self._web.count_requests()
            )
            self._leave(1)
        self._signalled_at = now
        log.info(
            "the server stops when what it accepted is answered, at the latest in %g seconds",
            self._gate.options.drain_seconds,
        )
        self._stop()

    def _stop(self, problem: BaseException | None = None) -> None:
        self._problem = self._problem or problem
        self._stopped.set()

    def _tell(self, do: Callable[..., None], *arguments: object) -> None:
        """Do something in the event loop, as a thread asks for; nothing where the loop has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(do, *arguments)

    def _begin(self, load: Callable[[], None]) -> None:
        """Load a model in a thread that nobody waits for at the end; then once more, if that was asked meanwhile."""

        def work() -> None:
            load()
            self._tell(self._loaded)

        thread = threading.Thread(target=work, name="cappy-load", daemon=True)
        thread.start()  # it may fail; then nothing is being loaded
        self._loading = thread

    def _loaded(self) -> None:
        self._loading = None
        if self._is_asked_again:
            self._is_asked_again = False
            self._swap()

    def _swap(self) -> None:
        """Open the bundle again, unless the server stops; while a model is being loaded, once when it is there."""
        if self._stopped.is_set():
            log.info("the server stops, and the bundle is not opened again")
        elif self._loading is not None:
            self._is_asked_again = True
        else:
            self._begin(self._load_again)

    def _load_first(self) -> None:
        """Load the first model; without one there is nothing to serve."""
        log.info("cappy %s opens %s", __version__, self._service.bundle)
        try:
            is_used = self._service.load()
        except BaseException as error:
            self._tell(self._stop, error)
            return
        if is_used:
            log.info("serving on %s", self._listener.address)
            log.info("model %s", self._service.model)

    def _load_again(self) -> None:
        """Load the bundle again; where that fails, the old model goes on."""
        log.info("cappy %s opens %s again", __version__, self._service.bundle)
        try:
            is_used = self._service.load()
        except Exception as error:
            self._service.metrics.swapped("failed")
            trace = None if isinstance(error, CappyError) else error  # where nobody expected it
            log.error("the bundle was not opened again, and the old model goes on: %s", error, exc_info=trace)  # noqa: TRY400
            return
        if is_used:
            self._service.metrics.swapped("done")
            log.info("the bundle was opened again; its model answers from now on: %s", self._service.model)


def _has_threads() -> bool:
    """Tell if a thread of ours runs; the names of all of them begin with cappy."""
    return any(thread.name.startswith("cappy") for thread in threading.enumerate())
