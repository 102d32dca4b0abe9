"""An engine is native code: it is used only if not a byte of it was changed, from a folder that is ours alone."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cappy_engine.errors import DeviceUnavailable
from cappy_engine.gpu.engines import EngineCache
from tests.support.bundles import flip_byte
from tests.support.engines import ENGINE, FACTS, KEY, Runtime, kept


def replace_by_link(path: Path) -> None:
    """The same bytes, but elsewhere, where others may change them."""
    elsewhere = path.parent.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("engine")


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / "manifest.json").read_bytes())
    change(document)
    (folder / "manifest.json").write_text(json.dumps(document))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a byte of the engine": lambda folder: flip_byte(folder / ENGINE, 3),
    "an engine cut short": lambda folder: truncate(folder / ENGINE),
    "an added file": lambda folder: (folder / "plugin.so").write_bytes(b"native code"),
    "an added folder": lambda folder: (folder / "more").mkdir(),
    "a removed file": lambda folder: (folder / ENGINE).unlink(),
    "a renamed file": lambda folder: (folder / ENGINE).rename(folder / "other.engine"),
    "a link for an engine": lambda folder: replace_by_link(folder / ENGINE),
    "a link for a manifest": lambda folder: replace_by_link(folder / "manifest.json"),
    "a link for a folder": replace_by_link,
    "a file for a folder": replace_by_file,
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "a manifest cut short": lambda folder: truncate(folder / "manifest.json"),
    "a manifest of bytes": lambda folder: (folder / "manifest.json").write_bytes(b"\xff"),
    "a manifest that is none": lambda folder: (folder / "manifest.json").write_text("[]"),
    "a manifest that is too deep": lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
    "another version": lambda folder: change_manifest(folder, lambda manifest: manifest.update(schema_version=2)),
    "an edited manifest": lambda folder: change_manifest(folder, lambda manifest: manifest["facts"].clear()),
    "other facts": lambda folder: change_manifest(folder, lambda manifest: manifest["facts"].update(precision="fp32")),
    "more than is written": lambda folder: change_manifest(folder, lambda manifest: manifest.update(more=1)),
    "a list of no files": lambda folder: change_manifest(folder, lambda manifest: manifest.pop("files")),
    "an edited list of files": lambda folder: change_manifest(folder, lambda manifest: manifest["files"].clear()),
    "a folder its group can write": lambda folder: folder.chmod(0o770),
    "a folder others can read": lambda folder: folder.chmod(0o705),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_an_engine_that_is_not_as_it_was_kept_is_built_again(
    root: Path, folder: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    damage(folder)
    runtime = Runtime("new")
    with caplog.at_level(logging.WARNING):
        assert EngineCache(root).open(FACTS, runtime.session) == "engine of new"
    assert runtime.found == [[]]
    assert f"the engine in {folder} is not used but built again: " in caplog.text
    assert EngineCache(root).open(FACTS, runtime.session) == "engine of new"
    assert len(runtime.found[1]) == 3
    assert kept(root) == {KEY}


def test_a_link_is_removed_and_not_what_it_leads_to(root: Path, folder: Path, tmp_path: Path) -> None:
    replace_by_link(folder)
    (elsewhere,) = tmp_path.rglob("elsewhere")
    EngineCache(root).open(FACTS, Runtime("new").session)
    assert not folder.is_symlink()
    assert (elsewhere / ENGINE).read_text() == "engine of weights"


def test_all_that_is_kept_is_private(root: Path) -> None:
    modes: list[int] = []

    def make(folder: Path) -> str:
        modes.append(folder.stat().st_mode & 0o777)
        return Runtime().session(folder)

    before = os.umask(0)
    try:
        EngineCache(root).open(FACTS, make)
    finally:
        os.umask(before)
    assert modes == [0o700]
    assert {path.name: path.stat().st_mode & 0o777 for path in (root, *root.iterdir())} == {
        root.name: 0o700,
        KEY: 0o700,
        f"{KEY}.lock": 0o600,
    }


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o720])
def test_a_store_that_others_can_write_is_refused(root: Path, folder: Path, mode: int) -> None:
    root.chmod(mode)
    with pytest.raises(DeviceUnavailable, match=f"mode {mode:o}.* 'chmod 700 {root}' .*CAPPY_CACHE"):
        EngineCache(root).open(FACTS, Runtime().session)
    root.chmod(0o700)
    assert EngineCache(root).open(FACTS, Runtime("new").session) == "engine of weights"


def test_a_store_of_someone_else_is_refused(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    someone = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: someone + 1)
    with pytest.raises(DeviceUnavailable, match=f"{root} belongs to user {someone}.* set CAPPY_CACHE"):
        EngineCache(root).open(FACTS, Runtime().session)


@pytest.mark.parametrize("place", [lambda path: path.touch(), lambda path: path.symlink_to(path.parent)])
def test_a_store_that_is_no_folder_is_refused(tmp_path: Path, place: Callable[[Path], object]) -> None:
    place(tmp_path / "engines")
    with pytest.raises(DeviceUnavailable, match="engines is not a folder; remove it, or set CAPPY_CACHE"):
        EngineCache(tmp_path / "engines").open(FACTS, Runtime().session)


def test_a_store_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DeviceUnavailable, match=r"engines cannot be kept in .*set CAPPY_CACHE"):
        EngineCache(tmp_path / "file" / "engines").open(FACTS, Runtime().session)
