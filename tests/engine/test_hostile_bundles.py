"""A bundle from a stranger, sealed well: what is odd in it is an error of ours, nothing hangs, nothing is believed."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cappy_engine import Scorer
from cappy_engine.bundle import MANIFEST, MAX_MANIFEST_BYTES, MODEL_FILES, open_bundle
from cappy_engine.bundle_files import MAX_SMALL_BYTES
from cappy_engine.canary import read_canary
from cappy_engine.cli.main import main
from cappy_engine.cli.streams import complain
from cappy_engine.cpu.tuned import forget_tuned, read_tuned
from cappy_engine.errors import BundleError
from cappy_engine.slim import slim
from cappy_engine.storage import open_regular, read_regular, sha256_of
from cappy_engine.tokenizer import PairTokenizer
from tests.support.bundles import add_file, change_manifest, read_manifest, with_value, without
from tests.support.places import TINY

# Files that are none


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(path.parent)  # a socket's name is short
        made.bind(path.name)


SPECIAL: list[Callable[[Path], object]] = [
    os.mkfifo,
    make_socket,
    Path.mkdir,
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to(path.name),
]
special = pytest.mark.parametrize("make", SPECIAL, ids=["fifo", "socket", "folder", "device", "circle"])


@special
@pytest.mark.parametrize("name", [MANIFEST, "tokenizer.json", "config.json", MODEL_FILES["int8"]])
def test_only_regular_files_of_a_bundle_are_opened(
    copy: Path, make: Callable[[Path], object], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy)
    (copy / name).unlink()
    make(copy / name)
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        Scorer.open(copy, precision="int8", device="cpu")


@special
def test_only_a_regular_file_is_an_answer_of_tune(
    tmp_path: Path, make: Callable[[Path], object], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / ("a" * 32 + ".json"))
    with caplog.at_level(logging.WARNING):
        assert read_tuned(tmp_path, "a" * 32) is None
    assert "json cannot be read (" in caplog.text
    if (tmp_path / ("a" * 32 + ".json")).is_dir():
        (tmp_path / ("c" * 32 + ".json")).write_text("{")
        assert forget_tuned(tmp_path, {"b" * 64}) == 1  # a folder is nobody's answer
        (tmp_path / ("c" * 32 + ".json")).write_text("{")
        with pytest.raises(OSError, match=r"a\.json"):
            forget_tuned(tmp_path)
        assert not (tmp_path / ("c" * 32 + ".json")).exists()
    else:
        assert forget_tuned(tmp_path, {"b" * 64}) == 1
        assert not list(tmp_path.iterdir())


@special
def test_only_a_regular_file_is_a_tokenizer(
    tmp_path: Path, make: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "tokenizer.json")
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read"):
        PairTokenizer.from_file(tmp_path / "tokenizer.json", max_length=512)
    with pytest.raises(OSError, match=r"tokenizer\.json"):
        sha256_of(tmp_path / "tokenizer.json")


def test_a_pipe_that_takes_a_files_place_at_the_last_moment_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    before = path.stat()
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(Path, "stat", lambda self: before)
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(path)


# Sizes


def test_a_file_larger_than_its_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file", limit=5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_regular(tmp_path / "file", limit=4)


@pytest.mark.parametrize(
    ("name", "size"), [(MANIFEST, MAX_MANIFEST_BYTES + 1), ("tokenizer.json", MAX_SMALL_BYTES + 1), ("x", 2**40)]
)
def test_small_files_of_a_great_size_are_refused_before_they_are_read(copy: Path, name: str, size: int) -> None:
    if name != MANIFEST:
        entry = {"sha256": "0" * 64, "bytes": size}
        change_manifest(copy, lambda document: document["files"].update({name: entry}))
    with (copy / name).open("ab") as file:
        file.truncate(size)
    with pytest.raises(BundleError, match=rf"{name}.*(more than|at most)"):
        open_bundle(copy)


def nested(levels: int) -> Any:
    found: Any = 1
    for _ in range(levels):
        found = [found]
    return found


@pytest.mark.parametrize("levels", [600, 900, 990, 100_000])
def test_lists_in_lists_are_no_manifest_and_no_answer(
    copy: Path, levels: int, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = b"[" * levels + b"]" * levels
    (copy / MANIFEST).write_bytes(b'{"schema_version": 1, "x": ' + deep + b"}")
    with pytest.raises(BundleError, match=r"manifest\.json"):
        open_bundle(copy)
    (copy / "key.json").write_bytes(b'{"mode": ' + deep + b"}")
    assert read_tuned(copy, "key") is None
    assert "key.json cannot be read (" in caplog.text


def test_lists_in_lists_in_a_sealed_manifest_do_not_hurt(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_manifest(copy, lambda document: document["graphs"]["fp32"].update(x=nested(300)))
    assert main(["inspect", str(copy)]) == 0
    change_manifest(copy, lambda document: document.update(graphs=nested(300)))
    with pytest.raises(BundleError):
        open_bundle(copy)


# Numbers


@pytest.mark.parametrize(
    ("value", "keys"),
    [
        (2**63, ("model", "pad_token_id")),
        (2**31, ("model", "pad_token_id")),
        (True, ("model", "pad_token_id")),
        (1.5, ("model", "pad_token_id")),
        ("1", ("model", "pad_token_id")),
        (10**12, ("model", "max_length")),
        (2**63, ("model", "max_length")),
        (10**400, ("model", "max_length")),
        (512.0, ("model", "max_length")),
        ("512", ("files", "config.json", "bytes")),
        (True, ("schema_version",)),
        (1.0, ("schema_version",)),
        ([1], ("precisions",)),
        ("int8", ("precisions",)),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_numbers_that_cannot_be_are_refused(copy: Path, value: object, keys: tuple[str, ...]) -> None:
    change_manifest(copy, with_value(value, *keys))
    with pytest.raises(BundleError, match=r"manifest\.json"):
        open_bundle(copy)


ODD_SIZES = ["nan", "NaN", "inf", "0.1", -0.1, -1, True, False, None, [], 10**400]


@pytest.mark.parametrize("value", ODD_SIZES, ids=lambda value: repr(value)[:40])
def test_an_exact_winner_needs_an_error_that_can_be(copy: Path, value: object) -> None:
    change_manifest(copy, with_value(value, "parity", "precisions", "int8", "max_error"))
    with Scorer.open(copy, precision="int8", device="cpu", threads=1) as scorer:
        with pytest.raises(BundleError, match="says nothing of int8's errors on cpu"):
            scorer.rank("Is it?", ["Yes", "No"], exact_winner=True)
        assert len(scorer.rank("Is it?", ["Yes", "No"])) == 2


@pytest.mark.parametrize("value", ODD_SIZES, ids=lambda value: repr(value)[:40])
def test_a_canary_needs_a_tolerance_that_can_be(value: object) -> None:
    document = read_manifest(TINY)
    document["canary"] = {
        "pairs": [{"input_ids": [0, 5, 2], "token_type_ids": [0, 0, 0], "score": 0.5}],
        "tolerance": {"cuda": {"fp32": 0.001}},
    }
    assert read_canary(document, "cuda", "fp32").tolerance == 0.001
    document["canary"]["tolerance"]["cuda"]["fp32"] = value
    with pytest.raises(BundleError, match="canary"):
        read_canary(document, "cuda", "fp32")


@pytest.mark.parametrize("ids", [[2**63], [0, -1, 2], [[0, 5, 2]], ["a"], [0, 5], 5, [0, [5], 2]], ids=repr)
def test_a_canary_needs_tokens(ids: object) -> None:
    pair = {"input_ids": ids, "token_type_ids": [0, 0, 0], "score": 0.5}
    canary = {"pairs": [pair], "tolerance": {"cuda": {"fp32": 0.001}}}
    with pytest.raises(BundleError, match="canary"):
        read_canary({**read_manifest(TINY), "canary": canary}, "cuda", "fp32")


# Names


@pytest.mark.parametrize("name", ["\x1b[2Jx", "x\ny", "x\u202ey", "x\x07", "x\u2028y"])
def test_escape_codes_do_not_reach_the_terminal(copy: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for change in (
        lambda document: add_file(copy, document, name, b""),
        with_value([name], "precisions"),
        with_value({name: {"precisions": ["fp32"]}}, "targets"),
        with_value({"fp32": name}, "graphs"),
    ):
        document = read_manifest(copy)
        change_manifest(copy, change)
        assert main(["inspect", str(copy)]) == 1
        assert name not in capsys.readouterr().err
        change_manifest(copy, lambda found, document=document: (found.clear(), found.update(document)))  # type: ignore[misc]


def test_an_error_keeps_its_lines_and_letters(capsys: pytest.CaptureFixture[str]) -> None:
    complain("zwei Zeilen:\nÄhre \x1b[31mrot\u202e\r")
    assert capsys.readouterr().err == "zwei Zeilen:\nÄhre ·[31mrot··\n"


@pytest.mark.parametrize(
    "change",
    [
        without("machine"),
        without("source"),
        with_value(5, "parity"),
        with_value("x", "versions"),
        with_value(10**400, "model", "parameters"),
    ],
)
def test_a_manifest_without_what_is_shown_is_an_error(
    copy: Path, change: Callable[[Any], object], capsys: pytest.CaptureFixture[str]
) -> None:
    change_manifest(copy, change)
    assert main(["inspect", str(copy)]) == 1
    assert "lacks what is shown here" in capsys.readouterr().err
    assert main(["inspect", str(copy), "--json"]) == 0


# Models that were left out


def test_inspect_and_slim_tell_what_was_left_out(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / MODEL_FILES["fp32"]).unlink()
    assert main(["inspect", str(copy)]) == 0
    assert f"lacks {MODEL_FILES['fp32']} (No such file" in capsys.readouterr().err
    with pytest.raises(BundleError, match=f"lacks {MODEL_FILES['fp32']}"):
        slim(copy, precisions=["fp32"])
    assert main(["slim", str(copy), "--keep", "int8", "--target", "cpu"]) == 0
    assert f"lacks {MODEL_FILES['fp32']} (No such file" in capsys.readouterr().err
    assert open_bundle(copy).missing == {}


def test_a_manifest_with_half_a_character_is_shown_and_copied(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of a checkpoint whose folder's name is not UTF-8; JSON has an escape for it."""
    change_manifest(copy, with_value("caf\udce9", "source", "name"))
    assert main(["inspect", str(copy)]) == 0
    assert main(["inspect", str(copy), "--json"]) == 0
    assert r'"name": "caf\udce9"' in capsys.readouterr().out
    assert slim(copy, precisions=["int8"], out=copy.parent / "small")["source"]["name"] == "caf\udce9"
    assert open_bundle(copy.parent / "small").manifest.document["source"]["name"] == "caf\udce9"
