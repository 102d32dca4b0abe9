"""The server's end of a connection, without a network: the test hands over what comes."""

from __future__ import annotations

import asyncio
from typing import Any


class Wire(asyncio.Transport):
    """The server's end of a connection: what was written to it, if it is read, and how it ended."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_read = True
        self.eofs = 0
        self.end = ""

    def write(self, data: Any) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self.is_read = False

    def resume_reading(self) -> None:
        self.is_read = True

    def write_eof(self) -> None:
        self.eofs += 1

    def close(self) -> None:
        self.end = self.end or "closed"

    def abort(self) -> None:
        self.end = self.end or "aborted"

    def is_closing(self) -> bool:
        return bool(self.end)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default
