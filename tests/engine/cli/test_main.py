"""The command line as a whole: help, wrong usage, hints, and commands that packages bring."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from cappy_engine import __version__
from cappy_engine.cli.arguments import command, group
from cappy_engine.cli.main import main
from cappy_engine.errors import install_hint
from tests.support.absent import EXPORTER, run_without
from tests.support.bundles import copy_bundle
from tests.support.command_line import cappy

COMMANDS = sorted(
    entry.name for entry in metadata.entry_points(group="cappy.commands") if entry.module.startswith("cappy_engine.")
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"\n\nexamples:\n  cappy {command}" in out


def test_the_lines_below_the_examples_stand_as_they_were_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 'a line of PAIRS: {"instruction": "Is the sky blue?", "response": "Yes"}' in lines
    assert lines[-1] == (
        "exit status: 0 all rows scored, 1 stopped by an error, 2 wrong usage, 3 some rows were skipped"
    )


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_every_command_with_its_first_sentence(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {command} " in out for command in COMMANDS)
    assert "Rank the candidates of one instruction, best first." in out


def test_help_of_a_group_lists_its_commands_with_whole_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    @group("examples:\n  cappy pets bark")
    def pets() -> None:
        """Keep pets."""

    sentence = "Bark at pairs for as long as there are pairs that nobody has barked at, and at some others, too."

    @command("examples:\n  cappy pets bark", of=pets)
    def bark() -> None:
        pass

    bark.help = f"{sentence}\n\nAnd more."
    pets.main(["--help"], "cappy pets", standalone_mode=False)
    assert sentence in " ".join(capsys.readouterr().out.split())


def test_python_m_is_cappy() -> None:
    done = cappy("--version")
    assert (done.returncode, done.stdout) == (0, f"cappy {__version__}\n".encode())


@pytest.mark.parametrize(
    "arguments",
    [
        "train",
        "--verbose",
        "score",
        "score pairs.jsonl --bundle b --precision tf32",
        "score pairs.jsonl --bundle b --device gpu",
        "score pairs.jsonl --bundle b --threads 0",
        "score pairs.jsonl --bundle b --threads two",
        "score pairs.jsonl --bundle b --max-batch-tokens -1",
        "score pairs.jsonl --bundle b --on-error ignore",
        "score pairs.jsonl --bundle b --batch-size 8",
        "score pairs.jsonl --bundle b --score-field=",
        "score pairs.jsonl --bundle b --score-field response",
        "score pairs.jsonl --resume",
        "score pairs.jsonl -o out.jsonl --rejects out.jsonl",
        "score pairs.jsonl -o out.jsonl --rejects bad.jsonl --on-error stop",
        "score - -o out.jsonl --resume",
        "score - pairs.jsonl",
        "rank pairs.jsonl --instruction q",
        "rank --instruction q --candidate a --rejects bad.jsonl",
        "score pairs.jsonl --gpu 0",
        "rank --bundle b --instruction q",
        "tune --seconds 0",
        "tune --seconds inf",
        "tune --seconds nan",
        "tune --clear --seconds 3",
        "doctor --device gpu",
    ],
)
def test_wrong_usage_ends_with_2_and_says_what_is_wrong(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    first, last = captured.err.splitlines()
    command = f"cappy {arguments.split()[0]}" if arguments.split()[0] in COMMANDS else "cappy"
    assert first.startswith(f"{command}: ")
    assert last == f"Try '{command} --help'."


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("score p.jsonl --precision fp32,int8", "'fp32,int8' is not one of the words; choose one: fp32 or int8"),
        ("slim b --keep fp32,int8", "repeat the option: --keep fp32 --keep int8"),
        (
            "slim b --keep fp32 int8",
            "unexpected argument 'int8'; repeat the option for each value: --keep ... --keep int8",
        ),
        (
            "slim b --keep=fp32 int8",
            "unexpected argument 'int8'; repeat the option for each value: --keep ... --keep int8",
        ),
        ("tune b c", "unexpected argument 'c'\n"),
    ],
)
def test_several_values_for_one_option_get_a_hint(
    arguments: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.split()) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "BUNDLE"],
        ["slim", "BUNDLE", "--keep", "int8"],
        ["tune", "BUNDLE"],
        ["score", "/dev/null", "--bundle", "BUNDLE"],
        ["rank", "--bundle", "BUNDLE", "--instruction", "q", "--candidate", "a"],
    ],
)
def test_a_bundle_that_is_not_there_is_an_error_that_names_it(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "nowhere")
    assert main([missing if argument == "BUNDLE" else argument for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    hint = "it does not exist; name the folder of one, or make it with 'cappy export'"
    assert captured.err == f"cappy {arguments[0]}: no bundle at {missing}: {hint}\n"


def test_a_command_is_verbose_for_itself_only(
    bundle: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    rank = ["rank", "--bundle", str(bundle), "--instruction", "q", "--candidate", "a"]
    for arguments, is_long in ((rank, False), ([*rank, "--verbose"], True), (rank, False)):
        assert main(arguments) == 0
        assert ("batches of up to" in capsys.readouterr().err) is is_long


ONLY_IN_EXTRAS = (*EXPORTER, "rouge_score", "openai", "matplotlib", "onnxruntime")


@pytest.mark.slow
def test_every_command_is_listed_whatever_is_installed(tmp_path: Path) -> None:
    done = run_without(ONLY_IN_EXTRAS, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = metadata.entry_points(group="cappy.commands").names
    assert {"score", "export", "sample", "bench"} <= names
    assert [name for name in names if f"\n  {name} " not in done.stdout] == []
    assert "cannot be loaded" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "package", "extras"),
    [
        ("export checkpoint out", "transformers", "cpu,export"),
        ("verify bundle --checkpoint checkpoint", "transformers", "cpu,export"),
        ("evaluate bigbench samples", "rouge_score", "cpu,llm"),
    ],
)
def test_a_command_whose_packages_are_missing_says_how_to_install_them(
    arguments: str, package: str, extras: str, tmp_path: Path
) -> None:
    done = run_without(ONLY_IN_EXTRAS, *arguments.split(), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"cappy {arguments.split()[0]}: this command needs the package {package!r}; {install_hint(extras)}\n"
    )


# Commands of packages


def install(folder: Path, name: str, module: str, *, code: str) -> dict[str, str]:
    """A package with one command, as an environment to run `cappy` in."""
    (folder / f"{name}-1.0.dist-info").mkdir()
    (folder / f"{name}-1.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (folder / f"{name}-1.0.dist-info" / "entry_points.txt").write_text(f"[cappy.commands]\n{name} = {module}:{name}\n")
    (folder / f"{module}.py").write_text(code)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.slow
def test_another_package_brings_a_command(tmp_path: Path) -> None:
    code = "import click\n@click.command()\ndef bark():\n    '''Bark at pairs.'''\n    print('wow')\n"
    environment = install(tmp_path, "bark", "dog", code=code)
    assert cappy("bark", env=environment).stdout == b"wow\n"
    assert re.search(rb"\n  bark +Bark at pairs\.\n", cappy("--help", env=environment).stdout)


@pytest.mark.slow
def test_a_command_that_cannot_be_loaded_leaves_the_others_alone(tmp_path: Path) -> None:
    environment = install(tmp_path, "bark", "dog", code="import no_such_package\n")
    done = cappy("bark", "--loud", "x", env=environment)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"cappy bark: the command 'bark' cannot be loaded: No module named 'no_such_package'\n"
    listed = cappy("--help", env=environment)
    assert listed.returncode == 0
    assert b"  score " in listed.stdout
    assert b"No module named 'no_such_package'" in b" ".join(listed.stdout.split())


@pytest.mark.slow
def test_only_the_module_of_the_command_that_is_called_is_imported(bundle: Path) -> None:
    code = (
        "import sys; from cappy_engine.cli.main import main; status = main(sys.argv[1:]);"
        "print(*sys.modules, file=sys.stderr); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "rank", "--bundle", str(bundle), "--instruction", "q", "--candidate", "a"]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    modules = set(done.stderr.decode().splitlines()[-1].split())
    assert "cappy_engine.cli.scoring" in modules
    assert not {"tqdm", "argparse", "cappy_export", "cappy_bench", "cappy_engine.cli.machine"} & modules


@pytest.mark.parametrize(
    "words",
    [
        "score pairs.jsonl --bundle",
        "score -o ../out",
        "rank -o ../out a.jsonl",
        "inspect",
        "tune",
        "tune --clear",
        "slim --keep int8",
    ],
)
def test_an_empty_path_is_wrong_usage_and_not_the_folder_one_is_in(
    words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(copy_bundle(tmp_path / "copy"))
    monkeypatch.setenv("CAPPY_CACHE", str(tmp_path / "cache"))
    assert main([*words.split(), ""]) == 2
    assert "an empty path; is a variable not set?" in capsys.readouterr().err
