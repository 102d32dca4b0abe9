"""The options of the server, beside those of its scorer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from cappy_engine.options import Asked, check_asked

LogFormat = Literal["text", "json"]
LOG_FORMATS: tuple[LogFormat, ...] = get_args(LogFormat)
MOST_SECONDS = 86400.0
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServerOptions:
    """The options of `cappy serve`: where it listens, who may ask, and how much.

    >>> ServerOptions(port=9000, max_pairs=100)

    Raises ValueError, with the name and the value, for an option that no server has, and for a host that others reach
    without an API key.
    """

    host: Annotated[str, Asked("address to listen on; any but the loopback needs an API key")] = "127.0.0.1"
    port: Annotated[int, Asked("0: any that is free", least=0, most=65535)] = 8000
    unix_socket: Annotated[Path | None, Asked("listen on this socket instead of a port", metavar="PATH")] = None
    model_names: Annotated[
        tuple[str, ...],
        Asked("a name by which requests may call the model; repeat for more", flag="--model-name", metavar="NAME"),
    ] = ()
    api_key_file: Annotated[Path | None, Asked("requests need one of this file's keys, one a line", metavar="FILE")] = (
        None
    )
    no_key: Annotated[bool, Asked("let anybody who reaches the host ask")] = False
    max_queue_pairs: Annotated[int, Asked("pairs that may wait", least=1)] = 8192
    max_queue_tokens: Annotated[int | None, Asked("tokens that may wait (default: those of 4 steps)", least=1)] = None
    step_tokens: Annotated[
        int | None,
        Asked(
            "tokens that the model gets at once (default: four batches for each worker; one where there is one)",
            least=1,
        ),
    ] = None
    max_pairs: Annotated[int, Asked("pairs of a request", least=1)] = 1024
    max_body_bytes: Annotated[int, Asked("bytes of a request's body", least=1)] = 4 * 2**20
    max_connections: Annotated[int, Asked("connections that may be open", least=1)] = 4096
    body_seconds: Annotated[float, Asked("seconds in which a request's headers and body must arrive", least=0.001)] = 20
    request_seconds: Annotated[float, Asked("seconds in which a request is answered, or given up", least=0.001)] = 60
    idle_seconds: Annotated[
        float, Asked("seconds after which a connection without requests is closed", least=0.001)
    ] = 75
    drain_seconds: Annotated[float, Asked("seconds to answer what was accepted, at the end", least=0)] = 30
    log_format: Annotated[LogFormat, Asked("lines on stderr", choices=LOG_FORMATS)] = "text"
    log_requests: Annotated[bool, Asked("write a line for every request, without its texts")] = False
    tracing: Annotated[bool, Asked("send OpenTelemetry spans where OTEL_EXPORTER_OTLP_ENDPOINT says")] = False

    def __post_init__(self) -> None:
        check_asked(self)
        for name in ("body_seconds", "request_seconds", "idle_seconds", "drain_seconds"):
            if getattr(self, name) > MOST_SECONDS:
                raise ValueError(f"{name} must be at most {MOST_SECONDS:.0f}, a day, got {getattr(self, name):g}")
        if not all(name and name.isprintable() for name in self.model_names):
            raise ValueError(f"a model name must have printable characters only, got {self.model_names!r}")
        if self.no_key and self.api_key_file is not None:
            raise ValueError("no_key and api_key_file exclude each other; give one of them")
        for name, default in (("host", ServerOptions.host), ("port", ServerOptions.port)):
            if self.unix_socket is not None and getattr(self, name) != default:
                raise ValueError(f"unix_socket and {name} exclude each other; give one of them")
        if self.host not in LOOPBACK and not (self.no_key or self.api_key_file):
            raise ValueError(
                f"host {self.host!r} can be reached by others; give --api-key-file with the keys that may ask, or "
                "--no-key to let anybody ask"
            )

    @property
    def needs_key(self) -> bool:
        """Tell if a request must carry an API key."""
        return self.api_key_file is not None
