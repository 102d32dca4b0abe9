"""The pages' commands and scripts run in order, as a newcomer would run them, and print what the pages show.

They run in a folder with the clone's files, without a network. Small random models stand in the hub's cache under the
names of the large ones, and in the place of cappy-mini's checkpoint.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import SentencePieceUnigramTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import T5Config, T5ForConditionalGeneration, T5TokenizerFast

from cappy_bench.make_checkpoint import make_family
from tests.support.pages import PAGES, Step, is_shown, split_commands, steps
from tests.support.places import ROOT, parity_pairs

QUICK = {
    "docs/troubleshooting.md",
    "export/cappy_mini/checkpoint/README.md",
    "CONTRIBUTING.md",
}
NO_PAGE_TO_RUN = "export/cappy_mini/README.md"
"""It trains for hours, on data that are not ours to publish."""
NOT_RUN = {
    "make ": "makes environments of its own, and measures for minutes to an hour",
    "pip install": "the environment of the tests stays as it is",
    "nvidia-smi ": "needs a GPU",
    "python3 -m cappy_engine ": "needs a GPU",
    "podman ": "needs a container engine and a registry",
    "cappy bench run --bundle ": "measures every tool, for minutes",
    "cappy bench serve": "measures for minutes",
    "cappy bench bulk": "measures for minutes",
    "cappy serve --port 8766": "serves what the next two commands measure",
    "BODIES=": "needs wrk, and measures for a minute",
    "cappy bench compare before.json": "compares results of two days",
    "cappy score docs/examples/pairs.jsonl --device": "needs a GPU",
    "cappy sample docs/examples/prompts.jsonl --endpoint": "needs a server",
    "cappy render ": "needs PromptSource and a network",
    "cappy evaluate promptsource tasks.jsonl": "reads what cappy render writes",
    "cappy evaluate promptsource promptsource_test.jsonl.gz": "reads data that is not ours to publish",
    **{
        f"import {name}": "tests/engine/test_columns.py runs it where there is that package"
        for name in ("pandas", "polars", "pyarrow", "datasets")
    },
    "from FlagEmbedding ": "FlagEmbedding is not in the environment of the tests",
    "from fastembed.": "downloads a model; tests/contracts/test_migration.py runs it on ours",
    "cappy adapt btan2/cappy-large 'shards": "reads files that are not there",
    "cappy adapt btan2/cappy-large train.jsonl my-cappy --processes": "has tests of its own (test_processes.py)",
    "cappy adapt roberta-large": "needs roberta-large and its data",
    "torchrun ": "needs a cluster, or is what accelerate starts",
    "accelerate launch ": "has a test of its own (test_processes.py)",
    "srun ": "needs a cluster",
    "bash docs/examples/loop/run.sh": "has a test of its own",
    "TRAIN=": "needs flan-t5-xxl and a GPU",
    "python -m cappy_bench.studies.": "measures for minutes",
    "python -m cappy_bench.make_checkpoint large ": "a model of cappy-large's size: 1.4 GB",
    "cappy export export/cappy_mini/checkpoint cappy-mini-bundle": "takes half a minute, and other pages export it",
    "cappy export large ": "a model of cappy-large's size: minutes, and 9 GB",
}
"""Commands that no test runs, by how they begin, and why. That they parse is in test_commands.py."""
WITH_PYTORCH = tuple(f"cappy {name} " for name in ("adapt", "bench", "evaluate", "export", "sample", "verify"))
"""Commands of a `cappy` that finds PyTorch imported: the others, and `make demo`, run it as it is installed."""


def is_run(step: Step) -> bool:
    return not step.text.startswith(tuple(NOT_RUN))


@pytest.fixture(scope="module")
def hub_home(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a cache of the hub, as a download leaves it, with small models under the names of large ones."""
    home = tmp_path_factory.mktemp("huggingface")
    shutil.copytree(checkpoint, snapshot(home, "btan2/cappy-large"))
    make_t5(snapshot(home, "google/flan-t5-xxl"))
    make_family(snapshot(home, "cross-encoder/ms-marco-MiniLM-L6-v2"), "ms-marco-MiniLM-L6-v2", is_tiny=True)
    return home


def snapshot(home: Path, name: str) -> Path:
    """Name the folder of a repository's files in a hub cache at `home`, and make its parents."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    for part in ("refs", "snapshots"):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return repository / "snapshots" / commit


def make_t5(folder: Path) -> None:
    """Write a T5 of one layer with random weights and a small vocabulary."""
    unigram = SentencePieceUnigramTokenizer()
    texts = [text for pair in parity_pairs() for text in pair]
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
    """Make what a clone holds, without what was made in it, and with a smaller model in place of cappy-mini's."""
    link_all(ROOT, tmp_path, {".git", ".gitignore", ".venv-demo", ".venv-test", "bench", "demo", "export"})
    link_all(ROOT / "export", tmp_path / "export", {"cappy_mini"})
    link_all(ROOT / "export" / "cappy_mini", tmp_path / "export" / "cappy_mini", {"checkpoint"})
    (tmp_path / "export" / "cappy_mini" / "checkpoint").symlink_to(checkpoint)
    return tmp_path


def link_all(source: Path, target: Path, but: set[str]) -> None:
    """Link what is in one folder from another."""
    target.mkdir(exist_ok=True)
    for entry in source.iterdir():
        if entry.name not in but:
            (target / entry.name).symlink_to(entry)


@pytest.mark.parametrize(
    "page",
    [page if page in QUICK else pytest.param(page, marks=pytest.mark.slow) for page in PAGES if page != NO_PAGE_TO_RUN],
)
def test_what_a_page_says_runs_in_order_and_prints_what_it_shows(
    page: str, folder: Path, hub_home: Path, preloaded: Path
) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for step in filter(is_run, steps(page)):
        environment = {
            **os.environ,
            "PATH": f"{preloaded}{os.pathsep}{path}" if step.text.startswith(WITH_PYTORCH) else path,
            "HF_HOME": str(hub_home),
            "HF_HUB_OFFLINE": "1",
        }
        command = ["bash", "-o", "pipefail", "-c"] if step.kind == "console" else [sys.executable, "-c"]
        done = subprocess.run(
            [*command, step.text], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{step.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        assert not step.shown or is_shown(step.shown, done.stdout), (
            f"{step.text}\n--- {page} shows\n{step.shown}\n--- it printed\n{done.stdout}"
        )


def test_no_command_is_left_out_without_need() -> None:
    every = [step.text for page in PAGES if page != NO_PAGE_TO_RUN for step in steps(page)]
    assert [prefix for prefix in NOT_RUN if not any(text.startswith(prefix) for text in every)] == []


# How pages are read


def test_commands_are_read_with_the_lines_that_they_go_on_over_and_with_their_output() -> None:
    text = '$ one # it\'s\nits output\n\nmore\n$ two \\\n    --option\n$ three "a\nb"\n'
    assert list(split_commands(text)) == [
        Step("console", "one # it's", "its output\n\nmore"),
        Step("console", "two \\\n    --option"),
        Step("console", 'three "a\nb"'),
    ]


@pytest.mark.parametrize(
    ("shown", "printed", "is_same"),
    [
        ("0.93  Yes", "0.93  Yes\n", True),
        ("0.93  Yes", "0.9314987  Yes", True),
        ("0.93  Yes", "0.94  Yes", False),
        ("0.93  Yes", "0.93  No", False),
        ("[0.02 0.98]", "[0.02 0.98]", True),
        ('{"score": 0.02224022150039673}', '{"score": 0.02290022150039673}', True),
        ('{"score": 0.02224022150039673}', '{"score": 0.03224022150039673}', False),
        ("-0.5 a", "-0.5 a", True),
        ("-0.5 a", "0.5 a", False),
        ("3 pairs", "4 pairs", False),
        ("first\n...\nlast 0.5", "first\nanything 0.7\nlast 0.5", True),
        ("first\n...\nlast 0.5", "first\nlast 0.6", False),
        ("took ... s", "took 0.25 s", True),
        ("a\nb", "a", False),
    ],
)
def test_output_is_compared_to_the_precision_that_is_shown(shown: str, printed: str, is_same: bool) -> None:
    assert is_shown(shown, printed) == is_same
