"""What a tool converted is used again only where it would be converted to the same."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from cappy_bench.peers import conversions
from cappy_bench.peers.conversions import convert_once
from cappy_bench.peers.peer import Model
from cappy_bench.peers.process import start_worker
from cappy_bench.peers.specs import SPECS
from cappy_engine.bundle import EMBEDDED
from tests.support.places import MINI


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "code.py"
    path.write_text("convert = 1")
    return path


def times_made(target: Path, source: Path) -> int:
    """Convert, and say how often that was done so far."""

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "model").touch()
        (target.parent / f"{target.name}-{len(list(target.parent.iterdir()))}.count").touch()

    convert_once(target, make, sources=[source])
    assert (target / "model").exists()
    return len(list(target.parent.glob("*.count")))


@pytest.mark.parametrize("changed", ["code", "package", "processor", "mark", "no mark", "gone"])
def test_a_conversion_is_made_again_when_what_it_depends_on_is_another(
    changed: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "folder" / "fp32"
    target.parent.mkdir()
    mark = target.with_name("fp32.made-with.json")
    assert [times_made(target, source) for _ in range(3)] == [1, 1, 1]
    if changed == "code":
        source.write_text("convert = 2")
    elif changed == "package":
        monkeypatch.setattr(metadata, "distributions", lambda: [SimpleNamespace(name="torch", version="9.9")])
    elif changed == "processor":
        monkeypatch.setattr(conversions, "cpu_flags", lambda: frozenset({"avx2"}))
    elif changed == "mark":
        mark.write_text("{")
    elif changed == "no mark":  # as of an earlier version
        mark.unlink()
    else:
        (target / "model").unlink()
        target.rmdir()
    assert [times_made(target, source) for _ in range(2)] == [2, 2]


def test_a_conversion_that_was_stopped_is_made_again(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"

    def stop(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    convert_once(target, lambda path: path.write_bytes(b"whole"), sources=[source])
    source.write_text("convert = 2")
    with pytest.raises(KeyboardInterrupt):
        convert_once(target, stop, sources=[source])
    assert not target.exists()
    convert_once(target, lambda path: path.write_bytes(b"new"), sources=[source])
    assert target.read_bytes() == b"new"


@pytest.mark.slow
def test_a_runner_takes_what_it_converted_and_no_older_conversion(tmp_path: Path) -> None:
    """CTranslate2's, which is the quickest."""
    spec = next(one for one in SPECS if one.name == "ctranslate2")
    model = Model(EMBEDDED, tmp_path, threads=1, checkpoint=MINI)
    (tmp_path / "fp32").mkdir()
    (tmp_path / "fp32" / "model.bin").write_bytes(b"of an older version")
    seen = []
    for _ in range(2):
        worker = start_worker(spec, model, tools=tmp_path)
        try:
            worker.ask({"do": "prepare"})
            worker.ask({"do": "open"})
        finally:
            worker.close()
        seen.append((tmp_path / "fp32" / "model.bin").stat().st_mtime_ns)
    assert seen[0] == seen[1]
