"""Read the static files of the page, each with its type and headers. Knows no web framework."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/docs": ("docs.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/docs.js": ("docs.js", "text/javascript; charset=utf-8"),
    "/elements.js": ("elements.js", "text/javascript; charset=utf-8"),
    "/server.js": ("server.js", "text/javascript; charset=utf-8"),
}
"""The paths that are served, the files that they are, and the types of these."""

SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "form-action 'none'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # no text becomes HTML, not even by a mistake in the scripts
    )
)


@dataclass(frozen=True)
class Asset:
    """A static file: its bytes, and the headers that it is answered with."""

    body: bytes
    headers: Mapping[str, str]


def read_assets() -> dict[str, Asset]:
    """Read the files of the page, each by the path that it is served at. None of them needs a key.

    >>> sorted(read_assets())
    ['/', '/docs', '/docs.js', '/elements.js', '/page.css', '/page.js', '/server.js']
    """
    folder = resources.files("cappy_engine.serving") / "page"
    return {path: _asset((folder / name).read_bytes(), kind) for path, (name, kind) in FILES.items()}


def _asset(body: bytes, kind: str) -> Asset:
    """Browsers ask again each time (`no-cache`) and send the `etag`; where it is the same, 304 is the answer."""
    headers = {
        "content-type": kind,
        "content-security-policy": SECURITY_POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
        "etag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
    }
    return Asset(body, headers)
