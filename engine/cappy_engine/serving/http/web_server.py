"""Run uvicorn's server, and end it by our signals and at our deadline.

Until the deadline, every connection that was made is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import cast

import uvicorn

from cappy_engine.serving.http.connections import BoundedConnection
from cappy_engine.serving.http.listening import Listener

GRACE_SECONDS = 0.4
"""How long, when the time to end is over, the last answers (that requests were cut off) and threads may take."""
TICK_SECONDS = 0.05


class WebServer(uvicorn.Server):
    """uvicorn's server, which ends by our signals and our deadline.

    `cut_off` counts the requests that were not answered before it.
    """

    def __init__(self, config: uvicorn.Config, listener: Listener) -> None:
        super().__init__(config)
        self.deadline = 0.0
        self.cut_off = 0
        self._listener = listener

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield

    def count_requests(self) -> int:
        """Count the requests that are being answered."""
        return len(self.server_state.tasks)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, and answer what came on the others. At the deadline they are cut off."""
        waiting = self._listener.stop()
        for server in self.servers:
            server.close()
        for connected in waiting:
            await asyncio.get_running_loop().connect_accepted_socket(self._connection, connected)
        connections = self.server_state.connections
        while True:
            here = set(connections)
            await asyncio.sleep(TICK_SECONDS)  # what is on its way is read
            for connection in here & connections:
                connection.shutdown()
            await asyncio.sleep(TICK_SECONDS)
            if not connections or time.monotonic() >= self.deadline:
                break
        self.cut_off = sum(not connection.transport.is_closing() for connection in connections)
        for task in self.server_state.tasks:
            task.cancel()
        await wait_for(lambda: not connections, time.monotonic() + GRACE_SECONDS)
        for connection in list(connections):
            connection.transport.abort()

    def _connection(self) -> BoundedConnection:
        """Make a connection of the class that uvicorn makes."""
        kind = cast("type[BoundedConnection]", self.config.http_protocol_class)
        return kind(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)


async def wait_for(is_so: Callable[[], bool], ends: float) -> bool:
    """Wait until something is so, at the latest until `ends` by the monotonic clock; tells if it is."""
    while not is_so():
        if time.monotonic() >= ends:
            return False
        await asyncio.sleep(TICK_SECONDS / 5)
    return True
