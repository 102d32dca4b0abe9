"""API keys: which ones may ask, how they are sent, and which paths need one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cappy_engine.errors import ServingError
from cappy_engine.serving.keys import read_keys
from tests.support.servers import Server, pairs_of, serving

ONE = pairs_of(("Is the sky blue?", "Yes"))
FIRST = "the-first-key-of-two"


@pytest.fixture(scope="module")
def keyed(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Give a server with two keys, the second with spaces around it in the file."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"# the team's, a long comment\n{FIRST}\n\n  the-second-key-of-two \t\n")
    with serving("--bundle", str(bundle), "--api-key-file", str(keys)) as server:
        yield server
        assert "of-two" not in server.log


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {FIRST}"},
        {"authorization": f"bearer  {FIRST}"},
        {"authorization": "BEARER the-second-key-of-two"},
        {"x_api_key": "the-second-key-of-two"},
        {"authorization": "Basic of-a-proxy", "x_api_key": FIRST},
    ],
)
def test_a_key_is_taken_in_either_header(keyed: Server, headers: dict[str, str]) -> None:
    assert keyed.post("/v1/score", ONE, **headers).status_code == 200
    assert keyed.get("/metrics", **headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer the-first-key"},
        {"authorization": f"Bearer {FIRST}-and-more"},
        {"authorization": f"Basic {FIRST}"},
        {"authorization": f"Bearer {FIRST.upper()}"},
        {"authorization": "Bearer"},
        {"authorization": FIRST},
        {"x_api_key": "# the team's, a long comment"},
        {"authorization": "Bearer wrong", "x_api_key": FIRST},
    ],
)
def test_any_other_key_is_refused(keyed: Server, headers: dict[str, str]) -> None:
    refused = keyed.post("/v1/score", ONE, **headers)
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert refused.json()["error_type"] == "unauthorized"


@pytest.mark.parametrize(
    "path", ["/metrics", "/info", "/openapi.json", "/v2", "/v2/models/tiny-bundle", "/v2/models/tiny-bundle/ready"]
)
def test_what_tells_of_the_server_needs_a_key(keyed: Server, path: str) -> None:
    assert keyed.get(path).status_code == 401
    assert keyed.get(path, x_api_key=FIRST).status_code == 200


def test_the_description_says_that_a_key_is_needed(keyed: Server, server: Server) -> None:
    described = (keyed.get("/openapi.json", x_api_key=FIRST), server.get("/openapi.json"))
    needed, none = (found.json()["paths"]["/v1/score"]["post"]["security"] for found in described)
    assert (needed, none) == ([{"bearer": []}, {"key": []}], [])


@pytest.mark.parametrize("path", ["/health", "/ready", "/", "/v2/health/live", "/v2/health/ready"])
def test_health_and_the_page_need_no_key(keyed: Server, path: str) -> None:
    assert keyed.get(path).status_code == 200


def test_who_has_no_key_is_refused_before_the_body_is_read(keyed: Server) -> None:
    with keyed.connect() as connection:
        connection.sendall(b"POST /v1/score HTTP/1.1\r\nhost: here\r\ncontent-length: 1000\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")


@pytest.mark.slow
def test_a_byte_order_mark_is_no_part_of_the_first_key(bundle: Path, tmp_path: Path) -> None:
    """Editors on Windows write one."""
    (tmp_path / "keys").write_text(f"{FIRST}\r\nthe-second-key-of-two\r\n", encoding="utf-8-sig")
    with serving("--bundle", str(bundle), "--api-key-file", str(tmp_path / "keys")) as server:
        assert server.get("/info", x_api_key=FIRST).status_code == 200
        assert server.get("/info", x_api_key="the-second-key-of-two").status_code == 200


def test_a_key_of_16_characters_is_long_enough(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sixteen-letters-\n")
    assert read_keys(tmp_path / "keys").accepts("sixteen-letters-")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "has no API key; write one on a line of its own"),
        ("# none\n\n", "has no API key; write one on a line of its own"),
        (f"# two\n\n{FIRST}\n fifteen-letters \n", "the API key in line 4 of .* has fewer than 16 characters"),
        ("a-key-that-is-not-ascii-é\n", "must be ASCII, .* byte 0xc3 at offset 24 is not"),
        ("\ufeffa-key-that-is-not-ascii-\ufeff\n", "byte 0xef at offset 27 is not"),
        (f"{FIRST}\n" * 2**16, "cannot be read .*more than 1048576 bytes"),
    ],
)
def test_a_file_without_good_keys_is_an_error(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ServingError, match=problem):
        read_keys(tmp_path / "keys")
