"""Check the API key of a request. The time that this takes tells nothing of the accepted keys."""

from __future__ import annotations

import codecs
import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from cappy_engine.errors import ServingError, reason_of
from cappy_engine.storage import read_regular

LEAST_KEY_CHARS = 16
MAX_FILE_BYTES = 2**20


class ApiKeys:
    """The keys that may ask, as digests.

    >>> ApiKeys(["a-key-of-some-length"]).accepts("a-key-of-some-length")
    True
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def accepts(self, key: str) -> bool:
        """Tell if `key` is one of them; all are compared, in constant time."""
        found = False
        digest = _digest(key)
        for each in self._digests:
            found |= hmac.compare_digest(digest, each)
        return found


def read_keys(path: Path) -> ApiKeys:
    """Read the keys of a file, one a line; empty lines and lines that begin with # are left out, and a BOM.

    Raises ServingError if the file has none, or one of less than 16 characters, or cannot be read.

        >>> read_keys(Path("keys.txt")).accepts("wrong")
        False
    """
    try:
        written = read_regular(path, limit=MAX_FILE_BYTES)
        lines = written.removeprefix(codecs.BOM_UTF8).decode("ascii").splitlines()
    except OSError as error:
        raise ServingError(f"the API keys of {path} cannot be read ({reason_of(error)})") from error
    except UnicodeDecodeError as error:
        place = len(written) - len(error.object) + error.start
        raise ServingError(
            f"the API keys of {path} must be ASCII, as HTTP's headers are, also in comments: byte "
            f"0x{written[place]:02x} at offset {place} is not"
        ) from error
    found = {number: line.strip() for number, line in enumerate(lines, start=1)}
    keys = {number: key for number, key in found.items() if key and not key.startswith("#")}
    short = [number for number, key in keys.items() if len(key) < LEAST_KEY_CHARS]
    if short:
        raise ServingError(
            f"the API key in line {short[0]} of {path} has fewer than {LEAST_KEY_CHARS} characters; make a longer one"
        )
    if not keys:
        raise ServingError(f"{path} has no API key; write one on a line of its own")
    return ApiKeys(keys.values())


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
