"""Read the pages: their blocks, the commands in these with what they print, their headings and their prose."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.places import ROOT

PAGES = [
    "README.md",
    *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md"))),
    "export/cappy_mini/README.md",
    "export/cappy_mini/checkpoint/README.md",
    "CONTRIBUTING.md",
]
OPERATORS = {"|", "||", "&", "&&", ";", ">", ">>", "<"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str


@dataclass(frozen=True)
class Step:
    """Something that a page tells the reader to run, and the output that it shows, if any.

    `kind` is "console" for a command of the shell, "python" for a script.
    """

    kind: str
    text: str
    shown: str = ""


def read(page: str) -> str:
    """Read a page by its path in the clone."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, *languages: str) -> list[Block]:
    """List the fenced blocks of a page, all or those in some languages."""
    return [block for block, _ in _blocks_with_text_before(page) if not languages or block.language in languages]


def steps(page: str) -> list[Step]:
    """List what a page tells the reader to run, in order.

    A command's output stands below it in its block. A script's output is a block `text` that follows it at once.
    """
    found: list[Step] = []
    for block, before in _blocks_with_text_before(page):
        if block.language == "console":
            found += split_commands(block.text)
        elif block.language == "python":
            found.append(Step("python", block.text))
        elif block.language == "text" and found and found[-1].kind == "python" and not before.strip():
            found[-1] = Step("python", found[-1].text, block.text)
    return found


def commands(page: str) -> list[str]:
    """List the commands of a page, as they are typed."""
    return [step.text for step in steps(page) if step.kind == "console"]


def split_commands(text: str) -> Iterator[Step]:
    """Split a console block: a command stands behind `$ `, with the lines that it goes on over; the rest is output."""
    lines = iter(text.splitlines())
    command, shown = "", list[str]()
    for line in lines:
        if not line.startswith("$ "):
            shown.append(line)
            continue
        if command:
            yield Step("console", command, "\n".join(shown))
        command, shown = line.removeprefix("$ "), []
        while not is_complete(command):
            command += "\n" + next(lines)
    if command:
        yield Step("console", command, "\n".join(shown))


def is_complete(command: str) -> bool:
    """True unless a command goes on in the next line: with an open quote, or a backslash at the end."""
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return False
    return True


def calls_of_cappy(command: str) -> list[list[str]]:
    """List the words behind each `cappy` in a shell command, which may be a pipe."""
    lexer = shlex.shlex(command.replace("\\\n", " "), posix=True, punctuation_chars=True)
    lexer.commenters, lexer.whitespace_split = "#", True
    calls: list[list[str]] = [[]]
    for word in lexer:
        if word in OPERATORS:
            calls.append([])
        else:
            calls[-1].append(word)
    return [call[1:] for call in calls if call[:1] == ["cappy"]]


def prose(page: str) -> str:
    """Read a page without its blocks."""
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Make the anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(str(page.relative_to(ROOT))), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        assert slug not in found, f"{page.name} has two headings {slug}"
        found.add(slug)
    return found


def _blocks_with_text_before(page: str) -> Iterator[tuple[Block, str]]:
    end, text = 0, read(page)
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(*match.groups()), text[end : match.start()]
        end = match.end()


# What a page shows, and what was printed

NUMBER = re.compile(r"(?<![\w.])-?\d+\.(\d+)")
SLACK = 2e-3
"""How far int8's scores may be from those on the page, since float32's rounding differs between CPUs."""


def is_shown(shown: str, printed: str) -> bool:
    """True if `printed` is what a page shows.

    Numbers with a point are compared to the precision that is shown, and to SLACK. `...` stands for anything.
    """
    pattern = re.compile(_pattern(shown.strip()), re.DOTALL)
    match = pattern.fullmatch("\n".join(line.rstrip() for line in printed.strip().splitlines()))
    if match is None:
        return False
    numbers = [(float(number[0]), len(number[1])) for number in NUMBER.finditer(shown.strip())]
    return all(
        abs(value - float(found)) <= 0.5 * 10**-digits + SLACK
        for (value, digits), found in zip(numbers, match.groups(), strict=True)
    )


def _pattern(shown: str) -> str:
    parts, end = [], 0
    for number in NUMBER.finditer(shown):
        parts += [re.escape(shown[end : number.start()]), r"(-?\d+(?:\.\d+)?(?:e-?\d+)?)"]
        end = number.end()
    parts.append(re.escape(shown[end:]))
    return "".join(parts).replace(re.escape("..."), ".*?")
