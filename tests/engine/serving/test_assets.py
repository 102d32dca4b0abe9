"""The static files of the pages: all are there, none loads or holds what the security policy forbids."""

from __future__ import annotations

import re

import pytest

from cappy_engine.serving.assets import FILES, read_assets
from tests.support.servers import Server

ASSETS = read_assets()
PAGES = [path for path, (name, _) in FILES.items() if name.endswith(".html")]
SCRIPTS = [path for path in ASSETS if path.endswith(".js")]


def text_of(path: str) -> str:
    return ASSETS[path].body.decode("utf-8")


def policy_of(path: str) -> dict[str, str]:
    parts = ASSETS[path].headers["content-security-policy"].split("; ")
    return {name: sources for name, _, sources in (part.partition(" ") for part in parts)}


@pytest.mark.parametrize("path", list(ASSETS))
def test_nothing_comes_from_elsewhere_and_no_text_becomes_a_script(path: str) -> None:
    policy = policy_of(path)
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert ASSETS[path].headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", list(ASSETS))
def test_a_browser_asks_again_and_is_told_if_nothing_changed(path: str) -> None:
    assert ASSETS[path].headers["cache-control"] == "no-cache"
    assert re.fullmatch(r'"[0-9a-f]{32}"', ASSETS[path].headers["etag"])
    assert len({asset.headers["etag"] for asset in ASSETS.values()}) == len(ASSETS)


def test_what_a_browser_has_is_not_sent_again(server: Server) -> None:
    tag = server.get("/").headers["etag"]
    again = server.get("/", if_none_match=tag)
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert server.get("/docs", if_none_match=tag).status_code == 200


@pytest.mark.parametrize("path", PAGES)
def test_a_page_has_no_script_and_no_style_within_it(path: str) -> None:
    text = text_of(path)
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", text)
    assert all(re.search(r'\ssrc="', tag) for tag in re.findall(r"<script[^>]*>", text))
    assert all("</script>" in part[:10] for part in re.split(r"<script[^>]*>", text)[1:])


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS, "/page.css"])
def test_all_that_is_loaded_is_served(path: str) -> None:
    """Addresses are relative, so that a proxy may serve the pages below a path of its own."""
    text = text_of(path)
    loaded = re.findall(r'(?:\ssrc|<link rel="stylesheet" href|\bfrom)[= ]"([^"]+)"', text)
    assert len(loaded) == 2 or path not in PAGES
    assert {f"/{name.removeprefix('./')}" for name in loaded} <= ASSETS.keys()
    assert not re.search(r"""["'(=]\s*(https?:)?//(?!www\.w3\.org/2000/svg)""", text)


@pytest.mark.parametrize("path", SCRIPTS)
def test_scripts_put_texts_in_as_text(path: str) -> None:
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text_of(path))
