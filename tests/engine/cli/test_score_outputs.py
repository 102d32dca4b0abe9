"""`cappy score -o`: what it writes to, and what it never writes over."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from cappy_engine.cli.main import main
from tests.support.bundles import copy_bundle
from tests.support.command_line import CAPPY, expected_rows, in_shell, rows_in, write_bad_pairs

ONE_LINE = '{"instruction": "q", "response": "a"}\n'


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    ["-o /dev/stdout", "-o /dev/fd/3 3>&1 >&2", "-o >(gzip | cat) | gunzip", "-o - | cat", "-o /dev/stdout >f; cat f"],
)
def test_results_go_where_the_shell_says(command: str, bundle: Path, pairs_file: Path) -> None:
    done = in_shell(f"{CAPPY} score pairs.jsonl --bundle {bundle} {command}", pairs_file.parent)
    assert done.returncode == 0, done.stderr
    assert rows_in(done.stdout) == expected_rows(bundle, pairs_file)
    assert not list(pairs_file.parent.glob("*.partial"))


def test_a_packed_output_is_unpacked_as_an_input(
    bundle: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "scored.jsonl.GZ"
    assert main(["score", str(pairs_file), "--bundle", str(bundle), "-o", str(packed)]) == 0
    assert rows_in(gzip.decompress(packed.read_bytes())) == expected_rows(bundle, pairs_file)
    again = ["score", str(packed), "--bundle", str(bundle), "--score-field", "again", "-o", str(tmp_path / "again")]
    assert main(again) == 0
    assert len(rows_in((tmp_path / "again").read_bytes())) == 5


@pytest.mark.parametrize(
    "content",
    [b"", gzip.compress(b"{}")[:3], gzip.compress(b"") + b"x", b"\x1f"],
    ids=["empty", "cut", "more behind it", "one byte"],  # a packed text holds the time
)
def test_an_input_that_is_not_a_whole_gzip_file_is_an_error(
    content: bytes, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pairs.gz").write_bytes(content)
    assert main(["score", str(tmp_path / "pairs.gz"), "--bundle", str(bundle)]) == 1
    assert "pairs.gz is not a complete gzip file" in capsys.readouterr().err


def test_packed_files_in_one_are_read_one_after_another(
    bundle: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = pairs_file.read_bytes()
    (tmp_path / "two.gz").write_bytes(gzip.compress(content[:50]) + gzip.compress(b"") + gzip.compress(content[50:]))
    assert main(["score", str(tmp_path / "two.gz"), "--bundle", str(bundle)]) == 0
    assert len(rows_in(capsys.readouterr().out)) == 5


@pytest.mark.slow
def test_the_input_is_kept_whatever_is_asked(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_bad_pairs(tmp_path / "bad.jsonl")
    before = source.read_bytes()
    (tmp_path / "link").symlink_to(source)
    for output in ("bad.jsonl", "link"):
        arguments = ["score", str(source), "--bundle", str(bundle), "-o", str(tmp_path / output), "--on-error", "skip"]
        assert main([*arguments, "--force"]) == 1
        assert "is the output too; choose another name" in capsys.readouterr().err
    for command in ("score bad.jsonl --on-error skip >> bad.jsonl", "score - --force -o bad.jsonl < bad.jsonl"):
        done = in_shell(f"{CAPPY} {command}", tmp_path)
        assert done.returncode == 1
        assert b"the input" in done.stderr
    assert source.read_bytes() == before


@pytest.mark.parametrize("options", [["-o"], ["-o", "scored.jsonl", "--rejects"]], ids=str)
@pytest.mark.parametrize("file", ["manifest.json", "onnx/model.onnx"])
def test_a_file_of_the_bundle_is_not_an_output(
    file: str, options: list[str], bundle: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = copy_bundle(tmp_path / "bundle", source=bundle) / file
    before = output.read_bytes()
    assert main(["score", str(pairs_file), "--bundle", "bundle", "--force", *options, str(output)]) == 1
    assert output.read_bytes() == before


def test_a_line_beyond_the_limit_is_a_bad_line(
    bundle: Path, pairs_file: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    with pairs_file.open("ab") as file:
        file.write(b'{"instruction": "q", "response": "%s"}\n' % (b"x" * 2000))
    arguments = ["score", str(pairs_file), "--bundle", str(bundle), "--max-line-bytes", "1000"]
    assert main(arguments) == 1
    assert b"cappy score: line 7: is longer than 1000 bytes (max_line_bytes)" in capfdbinary.readouterr().err
    assert main([*arguments, "--on-error", "skip"]) == 3
    assert len(rows_in(capfdbinary.readouterr().out)) == 5


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv"])
def test_the_limit_of_a_line_may_be_as_large_as_options_are(
    name: str, bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("instruction,response\nq,a\n" if name.endswith("csv") else ONE_LINE)
    arguments = ["score", str(tmp_path / name), "--bundle", str(bundle), "--max-line-bytes"]
    assert main([*arguments, str(2**62)]) == 0
    assert "q" in capfd.readouterr().out
    assert main([*arguments, str(2**62 + 1)]) == 2
    assert "max_line_bytes must be at most 4611686018427387904, got 4611686018427387905" in capfd.readouterr().err


@pytest.mark.parametrize("output", ["", "-o out.jsonl", "-o -"])
def test_rejects_are_not_written_to_stdout(output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_bad_pairs(tmp_path / "bad.jsonl")
    assert main(["score", str(source), *output.split(), "--rejects", "-"]) == 2
    captured = capsys.readouterr()
    assert "--rejects needs a file" in captured.err
    assert captured.out == ""


@pytest.mark.slow
@pytest.mark.parametrize("source", ["bad.jsonl", "- < bad.jsonl"])
@pytest.mark.parametrize(
    "outputs",
    [
        "--rejects /dev/stdout | cat",
        "-o /dev/stdout --rejects /dev/fd/1 | cat",
        "-o /dev/fd/3 --rejects /dev/stdout 3>&1 | cat",
        "--rejects out > out --force",
        "-o p.jsonl --rejects p.jsonl.partial --force",
        "-o p.jsonl --rejects p.jsonl.settings.json",
        "-o r.jsonl.partial --rejects r.jsonl",
    ],
)
def test_rejects_are_written_apart_from_results(source: str, outputs: str, bundle: Path, tmp_path: Path) -> None:
    write_bad_pairs(tmp_path / "bad.jsonl")
    done = in_shell(f"set -o pipefail; {CAPPY} score {source} --bundle {bundle} {outputs}", tmp_path)
    assert done.returncode == 1
    assert b"choose another name" in done.stderr
    assert (done.stdout, done.stderr.count(b"\n")) == (b"", 1)
    assert {path.name for path in tmp_path.iterdir()} <= {"bad.jsonl", "out"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "outputs", ["-o /dev/stdout --rejects r.gz", "-o out --rejects r.gz; cat out", "--rejects r.gz"]
)
@pytest.mark.parametrize("source", ["bad.jsonl", "- < bad.jsonl"])
def test_rejects_are_packed_wherever_rows_come_from_and_go(
    source: str, outputs: str, bundle: Path, tmp_path: Path
) -> None:
    write_bad_pairs(tmp_path / "bad.jsonl")
    done = in_shell(
        f"{CAPPY} score --bundle {bundle} {outputs.replace('--rejects', f'{source} --rejects', 1)}", tmp_path
    )
    assert len(rows_in(done.stdout)) == 6, done.stderr
    assert [row["line"] for row in rows_in(gzip.decompress((tmp_path / "r.gz").read_bytes()))] == [7]


@pytest.mark.slow
def test_rejects_go_to_another_stream(bundle: Path, tmp_path: Path) -> None:
    write_bad_pairs(tmp_path / "bad.jsonl")
    command = f"{CAPPY} score bad.jsonl --bundle {bundle} --quiet --rejects"
    done = in_shell(f"{command} /dev/stderr; {command} /dev/null > /dev/null", tmp_path)
    assert len(rows_in(done.stdout)) == 6
    assert [row["line"] for row in rows_in(done.stderr)] == [7]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("name", ["/dev/full", "full.gz"])
@pytest.mark.parametrize("option", ["-o", "--rejects"])
def test_a_device_without_room_is_named(option: str, name: str, bundle: Path, tmp_path: Path) -> None:
    write_bad_pairs(tmp_path / "bad.jsonl")
    (tmp_path / "full.gz").symlink_to("/dev/full")
    done = in_shell(f"{CAPPY} score --bundle {bundle} --quiet bad.jsonl {option} {name}", tmp_path)
    assert (done.returncode, done.stderr) == (1, f"cappy score: {name}: No space left on device\n".encode())


@pytest.mark.slow
def test_a_file_without_room_for_a_stream_is_named(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "many.jsonl").write_text(ONE_LINE.replace("}", f', "note": "{"x" * 2000}"}}') * 300)
    done = in_shell(f"ulimit -f 64; {CAPPY} score - --bundle {bundle} --quiet -o out.jsonl < many.jsonl", tmp_path)
    problem = f"cappy score: {tmp_path.resolve()}/out.jsonl.partial: File too large"
    assert (done.returncode, done.stderr.decode().splitlines()[-1]) == (1, problem)


@pytest.mark.parametrize("command", ["score", "rank"])
def test_replacing_what_has_no_name_is_wrong_usage(
    command: str, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(pairs_file), "--force"]) == 2
    assert "--force replaces OUT; name it with -o" in capsys.readouterr().err
