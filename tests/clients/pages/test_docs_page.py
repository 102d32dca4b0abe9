"""The page at `/docs` shows all that openapi.json says, and its lines for curl can be run."""

from __future__ import annotations

import json
import shlex
import urllib.request
from collections.abc import Callable

from playwright.sync_api import Page, expect

from tests.clients.conftest import KEY
from tests.clients.pages.chromium import asked

Open = Callable[..., Page]

HREFS = "found => found.map(each => each.getAttribute('href'))"


def test_every_operation_and_every_schema_is_shown(open_page: Open, site: str) -> None:
    with urllib.request.urlopen(f"{site}openapi.json") as answer:
        api = json.load(answer)
    page = open_page(site, "docs")
    expect(page.locator("article").first).to_be_visible()
    methods = {"get", "post", "put", "delete", "head", "options", "patch"}
    operations = {f"{method.upper()} {path}" for path, item in api["paths"].items() for method in item.keys() & methods}
    schemas = set(api.get("components", {}).get("schemas", {}))
    assert set(page.locator("article h3").all_inner_texts()) == operations | schemas
    links = set(page.locator("#contents a").evaluate_all(HREFS))
    assert links == set(page.locator("article").evaluate_all("found => found.map(each => `#${each.id}`)"))
    assert "" not in page.locator("#api dd").all_inner_texts()  # an answer that is described elsewhere
    assert set(page.locator("#api a").evaluate_all(HREFS)) <= links


def test_lines_for_curl_are_what_a_shell_takes(open_page: Open, site: str) -> None:
    page = open_page(site, "docs")
    expect(page.locator("article").first).to_be_visible()
    lines = [text for text in page.locator("pre").all_text_contents() if text.startswith("curl ")]
    assert lines
    for line in lines:
        words = shlex.split(line.replace("\\\n", " "))
        assert words[1].startswith(site)
        assert not set("{}") & set(words[1])
        if "-d" in words:
            json.loads(words[words.index("-d") + 1])


def test_the_ranking_shown_as_an_example_works(open_page: Open, site: str) -> None:
    page = open_page(site, "docs")
    article = page.locator("article#post-v1-rank")
    expect(article).to_be_visible()
    line = next(text for text in article.locator("pre").all_text_contents() if text.startswith("curl "))
    words = shlex.split(line.replace("\\\n", " "))
    assert asked(site, json.loads(words[words.index("-d") + 1]))["results"]


def test_what_keeps_the_schema_away_is_told(open_page: Open, site: str) -> None:
    page = open_page(site, "docs", before=lambda page: page.route("**/openapi.json", lambda route: route.abort()))
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")


def test_the_key_that_the_other_page_was_given_is_used(open_page: Open, site_with_key: str) -> None:
    page = open_page(site_with_key, "docs")
    expect(page.get_by_role("alert")).to_contain_text("Give the key on the page that ranks candidates")
    page.get_by_role("link", name="Rank candidates").click()
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.get_by_label("API key")).to_be_hidden()
    page.get_by_role("link", name="API").click()
    expect(page.locator("article").first).to_be_visible()
