"""Say why a connection takes no more: what is wrong before there is a request that an endpoint could answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from cappy_engine.serving.http.endpoint import failure_reply
from cappy_engine.serving.statuses import Failure

MAX_HEADER_BYTES = 64 * 2**10
FIELD_BYTES = 176
"""What each header is counted for beside its text: two strings, a tuple and its place take 169 bytes at most."""

NOT_HTTP = Failure(400, "what was sent is not valid HTTP/1.1; the server speaks neither HTTP/2 nor TLS")
LONG_HEAD = Failure(
    400,
    f"the path and the headers have more than {MAX_HEADER_BYTES} bytes, with {FIELD_BYTES} more for each header; send "
    "fewer, or shorter ones",
)
SPARE_CONNECTIONS = 64
"""The connections above the limit on which probes are answered; any more are closed without a word."""
SPARE_SECONDS = 1.0
"""How long such a connection may take to ask."""
HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=:%\[\]-]*")
"""What RFC 3986 has in a host and its port."""


class TooMany(Exception):
    """A request comes behind too many others."""


class Refused(Exception):
    """What a client sends is not taken, because of `failure`."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure


def check_head(version: str, headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Raise Refused for a request that an HTTP/1.1 server must refuse. See RFC 9112, 2.3, 3.2 and 6.1.

    >>> check_head("1.1", [(b"host", b"localhost:8000")])
    """
    if not version.startswith("1."):
        problem = f"the request is of HTTP/{version}, and the server speaks HTTP/1.1; send it so"
        raise Refused(Failure(505, problem))
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1:
        raise Refused(Failure(400, f"the request has {len(hosts)} headers Host; send one"))
    if not hosts and version != "1.0":
        raise Refused(Failure(400, "the request has no Host; send one, which HTTP/1.1 needs"))
    if hosts and not HOST.fullmatch(hosts[0].strip(b" \t")):
        host = ascii(hosts[0][:80].decode("latin-1"))
        raise Refused(Failure(400, f"the Host {host} is not a name of a host; send the one that was called"))
    codings = ", ".join(value.decode("latin-1") for name, value in headers if name == b"transfer-encoding")
    if any(coding.strip().lower() not in ("", "chunked") for coding in codings.split(",")):
        problem = f"the Transfer-Encoding is {codings[:80]!a}, and only chunked is taken; send it so"
        raise Refused(Failure(501, problem))


def too_many_connections(limit: int) -> Failure:
    """Make the failure of a connection that is one too many.

    >>> too_many_connections(4096).status
    503
    """
    problem = f"{limit} connections are open, and no more may be (max_connections); close some, or come again later"
    return Failure(503, problem, headers={"retry-after": "1"})


def bytes_of(failure: Failure) -> bytes:
    """Write the answer of HTTP/1.1 that tells a failure, the last one of its connection.

    >>> bytes_of(NOT_HTTP)[:12]
    b'HTTP/1.1 400'
    """
    body, headers = failure_reply(failure)
    headers.update({"content-length": str(len(body)), "connection": "close"})
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return STATUS_LINE[failure.status] + lines.encode() + b"\r\n" + body
