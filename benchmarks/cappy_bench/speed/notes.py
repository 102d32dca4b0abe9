"""Keeps all measurements, so that a stopped run goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cappy_engine import storage
from cappy_engine.errors import BenchmarkError

MAX_BYTES = 2**30
Key = tuple[str, ...]


class Notes:
    """The entries of a run by their keys, each on the disk at once."""

    def __init__(self, path: Path) -> None:
        self.found: dict[Key, dict[str, Any]] = {}
        self.path = path
        if path.exists():
            content = storage.read_regular(path, limit=MAX_BYTES)
            *lines, _ = content.split(b"\n")  # a last line without its end was never finished
            for number, line in enumerate(lines, 1):
                try:
                    entry = json.loads(line)
                    self.found[tuple(entry["key"])] = entry["value"]
                except (ValueError, TypeError, KeyError) as error:
                    raise BenchmarkError(
                        f"{path}, line {number} is not a note ({error!r}); remove this file and measure again"
                    ) from error
            with storage.whole_file(path) as file:
                file.write(b"".join(line + b"\n" for line in lines))

    def is_good(self, key: Key) -> bool:
        """True if there is an entry and it did not fail: failures are tried again.

        >>> Notes(Path("notes.jsonl")).is_good(("prepared", "torch"))
        False
        """
        return key in self.found and self.found[key]["status"] not in ("failed", "skipped", "wrong")

    def add(self, key: Key, value: dict[str, Any]) -> None:
        """Keep `value` under `key`.

        >>> notes.add(("prepared", "torch"), {"status": "ok"})
        """
        self.found[key] = value
        with storage.naming(self.path), self.path.open("ab") as file:
            storage.append(file, json.dumps({"key": key, "value": value}).encode() + b"\n")
