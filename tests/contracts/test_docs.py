"""The pages: what they tell a newcomer to run runs, what they show is of that form, and their links lead somewhere.

The commands of a page run in order in a folder with the clone's files, without a network: the hub's cache holds small
random models under the names of the large ones, and one in place of cappy-mini's checkpoint. What they print is not
compared.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import SentencePieceUnigramTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import T5Config, T5ForConditionalGeneration, T5TokenizerFast

from cappy_engine import errors
from cappy_engine.cli import main as cli
from cappy_export.proof.pairs import default_pairs
from tests.support.places import ROOT

PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md")))]
PAGES += ["export/cappy_mini/checkpoint/README.md", "CONTRIBUTING.md"]
QUICK = {"docs/benchmarks.md", "docs/troubleshooting.md", "export/cappy_mini/checkpoint/README.md", "CONTRIBUTING.md"}
LANGUAGES = {"console", "python", "json", "jsonl", "text"}

NOT_RUN = {
    "git clone": "the clone is there already",
    "make ": "makes environments of its own, and measures for minutes to an hour",
    "pip install": "the environment of the tests stays as it is",
    "cappy adapt export/cappy_mini/checkpoint docs/examples/train.jsonl my-cappy --resume": "goes on with a training that was stopped",
    "cappy score docs/examples/pairs.jsonl --device": "needs a GPU",
    "cappy sample docs/examples/prompts.jsonl --endpoint": "needs a server",
    "cappy render ": "needs PromptSource and a network",
    "cappy evaluate promptsource tasks.jsonl": "reads what cappy render writes",
    "cappy evaluate promptsource promptsource_test.jsonl.gz": "reads data that is not ours to publish",
    "bash docs/examples/loop/run.sh": "has a test of its own",
    "TRAIN=": "needs flan-t5-xxl and a GPU",
    "python -m benchmarks": "measures for minutes",
    ".venv-test/bin/python": "needs the environment and the results of make bench",
    "cappy export export/cappy_mini/checkpoint cappy-mini-bundle": "takes half a minute, and other pages export it",
    "cappy export large ": "a model of cappy-large's size: minutes, and 9 GB",
}
"""Commands that no test runs, by how they begin, and why."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, *languages: str) -> list[Block]:
    found = [Block(*match) for match in re.findall(r"^```(\w*)\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)]
    return [block for block in found if not languages or block.language in languages]


def commands(page: str) -> list[str]:
    """What stands behind each `$ `, with the lines that it goes on over."""
    return [command for block in blocks(page, "console") for command in split_commands(block.text)]


def split_commands(text: str) -> Iterator[str]:
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("$ "):
            command = line.removeprefix("$ ")
            while not is_complete(command):
                command += "\n" + next(lines)
            yield command


def is_complete(command: str) -> bool:
    try:
        shlex.split(command, comments=True)
    except ValueError:  # an open quote, or a backslash at the end
        return False
    return True


def is_run(command: str) -> bool:
    return not command.startswith(tuple(NOT_RUN))


@pytest.fixture(scope="module")
def hub_home(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the hub, as a download leaves it, with small models under the names of large ones."""
    home = tmp_path_factory.mktemp("huggingface")
    shutil.copytree(checkpoint, snapshot(home, "btan2/cappy-large"))
    make_t5(snapshot(home, "google/flan-t5-xxl"))
    return home


def snapshot(home: Path, name: str) -> Path:
    """The folder of a repository's files in a hub cache at `home`; its parents are made."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    for part in ("refs", "snapshots"):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return repository / "snapshots" / commit


def make_t5(folder: Path) -> None:
    """A T5 of one layer with random weights and a small vocabulary."""
    unigram = SentencePieceUnigramTokenizer()
    texts = [text for pair in default_pairs() for text in pair]
    special = ["<pad>", "</s>", "<unk>"]
    unigram.train_from_iterator(texts, vocab_size=1000, special_tokens=special, unk_token="<unk>", show_progress=False)
    unigram.post_processor = TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    tokenizer = T5TokenizerFast(tokenizer_object=unigram._tokenizer, extra_ids=0)
    tokenizer.save_pretrained(folder)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path, checkpoint: Path) -> Path:
    """What a clone holds, without what was made in it, and with a smaller model in place of cappy-mini's checkpoint."""
    made = {".git", ".gitignore", ".venv-demo", ".venv-test", "bench", "demo"}
    for entry in ROOT.iterdir():
        if entry.name not in {*made, "models"}:
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "cappy-mini").symlink_to(checkpoint)
    return tmp_path


@pytest.mark.parametrize(
    "page", [page if page in QUICK else pytest.param(page, marks=pytest.mark.slow) for page in PAGES]
)
def test_the_commands_of_a_page_run_in_order_and_then_its_python(page: str, folder: Path, hub_home: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HOME": str(hub_home),
        "HF_HUB_OFFLINE": "1",
    }
    steps = [["bash", "-o", "pipefail", "-c", command] for command in commands(page) if is_run(command)]
    steps += [[sys.executable, "-c", block.text] for block in blocks(page, "python")]
    for step in steps:
        done = subprocess.run(step, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{step[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


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


def test_no_command_is_left_out_without_need() -> None:
    every = [command for page in PAGES for command in commands(page)]
    assert [prefix for prefix in NOT_RUN if not any(command.startswith(prefix) for command in every)] == []


def test_commands_are_read_with_the_lines_that_they_go_on_over() -> None:
    text = '$ one # it\'s\nits output\n$ two \\\n    --option\n$ three "a\nb"\n'
    assert list(split_commands(text)) == ["one # it's", "two \\\n    --option", 'three "a\nb"']


# Links


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(str(page.relative_to(ROOT))), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        assert slug not in found, f"{page.name} has two headings {slug}"
        found.add(slug)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_and_headings_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.resolve()), link


# What must be on a page


def test_every_command_of_cappy_is_on_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    names = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)
    shown = {command.split()[1] for page in PAGES for command in commands(page) if command.startswith("cappy ")}
    assert "score" in names
    assert set(names) <= shown


def test_every_error_has_a_heading_in_troubleshooting() -> None:
    names = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert "ParityError" in names
    assert {name.lower() for name in names} <= anchors(ROOT / "docs" / "troubleshooting.md")


PREFIXES = r"^(cappy \w+: |WARNING: |skipped |(\S+, )?(line|pair) \d+: (response (?=has a lone))?)*"
"""What is put before a message where it is passed on."""
LEAST_MESSAGE = 10
"""Fewer characters of fixed text would fit to anything."""


def message_patterns() -> Iterator[re.Pattern[str]]:
    """Every text in the source as what it can become: anything stands where a value is put in."""
    for path in ROOT.glob("*/cappy_*/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            known = [text for text in texts if isinstance(text, str)]
            if sum(map(len, known)) >= LEAST_MESSAGE:
                pattern = "".join(re.escape(text) if isinstance(text, str) else ".*" for text in texts)
                yield re.compile(re.sub(r"%\\?[.\d]*[sdrgf]", ".*", pattern), re.DOTALL)


def test_the_messages_in_troubleshooting_are_those_of_the_code() -> None:
    patterns = list(message_patterns())
    shown = [line for block in blocks("docs/troubleshooting.md", "text") for line in block.text.splitlines()]
    plain = [re.sub(PREFIXES, "", line) for line in shown]
    assert plain
    assert [line for line in plain if not any(pattern.fullmatch(line) for pattern in patterns)] == []
