"""The pages: their links lead somewhere, what they show as JSON is JSON, and the messages are those of the code."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator

import pytest

import cappy_engine
from cappy_engine import errors
from tests.support.pages import PAGES, anchors, blocks, prose, read
from tests.support.places import ROOT
from tests.support.sources import every_source

LANGUAGES = {"console", "python", "json", "jsonl", "text"}


@pytest.mark.parametrize("page", PAGES)
def test_json_on_a_page_is_json(page: str) -> None:
    for block in blocks(page, "json", "jsonl"):
        for text in [block.text] if block.language == "json" else block.text.splitlines():
            json.loads(text)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_is_of_a_kind_that_is_looked_at(page: str) -> None:
    found = blocks(page)
    assert {block.language for block in found} <= LANGUAGES
    assert 2 * len(found) == read(page).count("```"), "a fence is indented, or not closed"
    assert all(block.text.startswith("$ ") for block in found if block.language == "console")


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_and_headings_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), f"{page} links to {link}, which does not exist"
        assert not anchor or anchor in anchors(target.resolve()), f"{page} links to {link}, which has no such heading"


def test_no_example_splits_lines_of_json_within_a_text() -> None:
    examples = {page: "".join(block.text for block in blocks(page, "python", "console")) for page in PAGES}
    examples |= {str(path): path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "examples").rglob("*.py")}
    assert [name for name, text in examples.items() if "splitlines" in text] == []  # it splits at U+2028, too


def test_every_error_has_a_heading_in_troubleshooting() -> None:
    names = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert "ParityError" in names
    assert {name.lower() for name in names} <= anchors(ROOT / "docs" / "troubleshooting.md")


PREFIXES = (
    r"^(cappy \w+: |WARNING: |skipped |\S+ \(\w+ weights\): |"
    r"(\S+, )?(line|pair|row|GPU) \d+: (response (?=has a lone))?)*"
)
"""What is put before a message where it is passed on."""
LEAST_MESSAGE, LEAST_SHARE = 10, 0.1
"""Fewer characters of fixed text, and a smaller part of a message, would fit to anything."""


def message_patterns() -> Iterator[tuple[re.Pattern[str], int]]:
    """Make a pattern of every text in the source, and count its fixed characters: anything stands where a value is."""
    for source in every_source():
        for node in ast.walk(source.tree):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            known = [text for text in texts if isinstance(text, str)]
            if sum(map(len, known)) >= LEAST_MESSAGE:
                pattern = "".join(re.escape(text) if isinstance(text, str) else ".*" for text in texts)
                yield re.compile(re.sub(r"%\\?[.\d]*[sdrgf]", ".*", pattern), re.DOTALL), sum(map(len, known))


@pytest.mark.slow
def test_the_messages_in_troubleshooting_are_those_of_the_code() -> None:
    patterns = list(message_patterns())
    shown = [line for block in blocks("docs/troubleshooting.md", "text") for line in block.text.splitlines()]
    plain = [re.sub(PREFIXES, "", line) for line in shown]
    assert plain

    def is_of_the_code(line: str) -> bool:
        return any(fixed >= LEAST_SHARE * len(line) and pattern.fullmatch(line) for pattern, fixed in patterns)

    assert [line for line in plain if not is_of_the_code(line)] == []


def test_every_error_can_be_imported_from_the_package() -> None:
    found = {name for name, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, errors.CappyError)}
    assert found <= set(cappy_engine.__all__)
    assert all(getattr(cappy_engine, name) is getattr(errors, name) for name in found)
