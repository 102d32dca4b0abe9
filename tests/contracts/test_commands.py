"""Every command that a package registers has help, examples that parse, and a page that shows it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import metadata

import click
import pytest

from cappy_engine.cli.main import cappy
from tests.support.pages import PAGES, calls_of_cappy, commands
from tests.support.sources import every_source, none

Words = tuple[str, ...]


def walk(command: click.Command, words: Words = ()) -> Iterator[tuple[Words, click.Command]]:
    """List a command and the commands below it, each with the words that call it."""
    yield words, command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name="cappy")
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None, f"cappy has no command {name}"
            yield from walk(below, (*words, name))


EVERY = dict(walk(cappy))
LEAVES = {words: command for words, command in EVERY.items() if not isinstance(command, click.Group)}
each_command = pytest.mark.parametrize("words", LEAVES, ids=" ".join)
ON_PAGES = [call for page in PAGES for command in commands(page) for call in calls_of_cappy(command)]


def parse(call: list[str]) -> Words:
    """Parse the words behind `cappy`, without running anything; returns those that name the command."""
    words: Words = ()
    while (*words, *call[:1]) in EVERY and call:
        words, call = (*words, call[0]), call[1:]
    EVERY[words].make_context(" ".join(("cappy", *words)), list(call)).close()
    return words


def examples(command: click.Command) -> list[str]:
    """List the examples below a command's help: each a line, or several that end in a backslash."""
    paragraphs = (command.epilog or "").replace("\\\n", " ").split("\n\n")
    found = [paragraph.splitlines()[1:] for paragraph in paragraphs if paragraph.startswith("examples:")]
    return [line.strip() for lines in found for line in lines if calls_of_cappy(line)]


def test_the_commands_are_the_entry_points() -> None:
    entries = metadata.entry_points(group="cappy.commands")
    assert {words[0] for words in LEAVES} == set(entries.names)
    assert {entry.name for entry in entries if entry.load().name != entry.name} == set()


@pytest.mark.parametrize("words", EVERY, ids=lambda words: " ".join(words) or "cappy")
def test_every_command_has_help_that_begins_with_a_sentence(words: Words) -> None:
    text = EVERY[words].help or ""
    assert text.split("\n\n")[0].strip().endswith((".", ":")), f"cappy {' '.join(words)} has no help"
    assert "cannot be loaded" not in text


@each_command
def test_every_option_of_a_command_has_help(words: Words) -> None:
    options = [param for param in LEAVES[words].params if isinstance(param, click.Option)]
    assert [option.opts[0] for option in options if not option.help] == []


@each_command
def test_every_command_has_examples_that_parse(words: Words) -> None:
    found = examples(LEAVES[words])
    assert found, f"cappy {' '.join(words)} --help shows no example"
    called = [parse(call) for example in found for call in calls_of_cappy(example)]
    assert words in called


@each_command
def test_every_command_is_on_a_page(words: Words) -> None:
    assert any(call[: len(words)] == list(words) for call in ON_PAGES), f"no page shows cappy {' '.join(words)}"


@pytest.mark.parametrize("call", ON_PAGES, ids=lambda call: " ".join(call)[:60])
def test_every_command_on_a_page_parses(call: list[str]) -> None:
    parse(call)


@pytest.mark.slow
def test_commands_write_through_streams_which_keep_escape_codes_from_the_terminal() -> None:
    modules = [source for source in every_source() if "click" in source.roots and "streams" not in source.name]
    assert len(modules) > 8
    none(
        [
            f"{source.shown}:{node.lineno} writes by {ast.unparse(node.func)}; use show, tell, say or print_json"
            for source in modules
            for node in ast.walk(source.tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "click.echo", "sys.stdout.write")
        ]
    )
