"""What was opened stays open: a scorer does not depend on its path any more, or says that the bundle has changed."""

from __future__ import annotations

import copy as copying
import gc
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from cappy_engine import Scorer, ScorerOptions
from cappy_engine.bundle import MODEL_FILES, Bundle, open_bundle
from cappy_engine.errors import BundleError, CappyError, ScoringError
from cappy_engine.opening import WatchedSession
from cappy_engine.session import give_memory_back
from cappy_engine.storage import sha256_of
from cappy_engine.testing import FakeSession, fake_scorer
from tests.support.bundles import change_manifest, copy_bundle, keep_targets, with_value
from tests.support.onnx_files import write_external_model
from tests.support.places import TINY, TINY_PRECISIONS

PAIRS = [("Is the sky blue?", f"I would say so{' indeed' * count}.") for count in range(40)]
"""Several batches, which two threads share."""
CLOSE = ["Yes", "No", "Maybe", "Never", "Always"]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Give a copy of the bundle that may be changed, in whose int8 no candidate can win for sure."""
    folder = keep_targets(copy_bundle(tmp_path / "copy"), "cpu")
    change_manifest(folder, with_value(1.0, "parity", "precisions", "int8", "max_error"))
    return folder


def opened(path: Path | str) -> Scorer:
    return Scorer.open(path, device="cpu", precision="int8", threads=2, mode="both")


# Paths


def replace_by_another(folder: Path) -> None:
    for name in (MODEL_FILES[precision] for precision in TINY_PRECISIONS):
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).unlink()
        (folder / name).write_bytes(content)


CHANGES: list[Callable[[Path], object]] = [
    shutil.rmtree,
    lambda folder: folder.rename(folder.with_name("moved")),
    replace_by_another,
]
changes = pytest.mark.parametrize("change", CHANGES, ids=["deleted", "moved", "replaced"])


def test_a_relative_path_is_good_for_all_that_comes_later(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with opened("copy") as scorer, opened(copy) as other:
        monkeypatch.chdir(tmp_path / "elsewhere")
        np.testing.assert_array_equal(scorer.score(PAIRS), other.score(PAIRS))
        expected = other.rank(PAIRS[0][0], CLOSE, exact_winner=True)
        assert scorer.rank(PAIRS[0][0], CLOSE, exact_winner=True) == expected
        assert any(candidate.is_exact for candidate in expected)
    assert not caplog.records


def test_a_link_that_leads_elsewhere_later_changes_nothing(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(copy)
    with opened(tmp_path / "current") as scorer, opened(copy) as other:
        (tmp_path / "current").unlink()
        (tmp_path / "current").symlink_to(tmp_path / "the next one")
        assert scorer.rank(PAIRS[0][0], CLOSE, exact_winner=True) == other.rank(PAIRS[0][0], CLOSE, exact_winner=True)


@changes
def test_without_the_second_session_the_first_goes_on_with_a_warning(
    copy: Path, change: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    with opened(copy) as scorer, opened(TINY) as other:
        change(copy)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                np.testing.assert_allclose(scorer.score(PAIRS), other.score(PAIRS), rtol=0, atol=1e-5)
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "several batches run on one session, which is slower"
    ]
    assert "changed since it was opened" in caplog.text


@changes
def test_the_exact_winner_of_a_changed_bundle_is_an_error_that_says_so(
    copy: Path, change: Callable[[Path], object]
) -> None:
    with opened(copy) as scorer:
        change(copy)
        with pytest.raises(BundleError, match=r"copy changed since it was opened \(.*model\.onnx.*\); open it again"):
            scorer.rank(PAIRS[0][0], CLOSE, exact_winner=True)
        assert len(scorer.rank(PAIRS[0][0], CLOSE)) == len(CLOSE)


# Mapped weights


@pytest.fixture
def mapped(copy: Path) -> Bundle:
    """Give a bundle whose fp32 model keeps its weights in a second file."""
    graph, weights = MODEL_FILES["fp32"], MODEL_FILES["fp32"] + "_data"
    write_external_model(copy / graph, "model.onnx_data")
    (copy / weights).write_bytes(b"\0\0\0\x3f")
    entries = {
        name: {"sha256": sha256_of(copy / name), "bytes": (copy / name).stat().st_size} for name in (graph, weights)
    }
    change_manifest(copy, lambda document: document["files"].update(entries))
    return open_bundle(copy)


def test_a_file_that_is_written_over_while_its_model_runs_is_noticed(mapped: Bundle) -> None:
    path = mapped.path / "onnx" / "model.onnx_data"
    with Scorer.open(mapped.path, precision="fp32", device="cpu", threads=1) as scorer:
        scorer.score(PAIRS)
        path.write_bytes(b"\0\0\0\x40")
        os.utime(path, ns=(1, 1))
        with pytest.raises(ScoringError, match=r"model\.onnx_data was written over .* open a new scorer") as caught:
            scorer.score(PAIRS)
    assert caught.value.index is None


def test_scores_that_were_computed_while_the_file_changed_are_not_given(mapped: Bundle) -> None:
    path = mapped.path / "onnx" / "model.onnx_data"
    files = mapped.open_model("fp32")

    def score(ids: Sequence[int]) -> float:
        os.utime(path, ns=(1, 1))
        return 0.5

    session = WatchedSession(FakeSession(score), files)
    with pytest.raises(ScoringError, match="written over"):
        fake_scorer(session).score(PAIRS[:1])  # in one batch: no other one follows, which would notice


def test_weights_in_a_second_file_count_in_a_models_size(mapped: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the largest models, whose weights lie there, would be held twice."""
    graph = (mapped.path / MODEL_FILES["fp32"]).stat().st_size
    for limit, mode in ((graph, "latency"), (graph + 4, "both")):
        monkeypatch.setattr("cappy_engine.cpu.execution.SMALL_MODEL_BYTES", limit)
        with Scorer.open(mapped.path, precision="fp32", device="cpu", threads=2) as scorer:
            assert scorer.info.mode == mode


def test_a_file_that_is_replaced_as_files_should_be_changes_nothing(mapped: Bundle) -> None:
    path = mapped.path / "onnx" / "model.onnx_data"
    with Scorer.open(mapped.path, precision="fp32", device="cpu", threads=1) as scorer:
        before = scorer.score(PAIRS)
        path.with_name("new").write_bytes(b"\0\0\0\x40")
        path.with_name("new").rename(path)
        np.testing.assert_array_equal(scorer.score(PAIRS), before)


@pytest.mark.parametrize("location", ["model_fp16.onnx", "../config.json", "./model.onnx_data", "/etc/hostname", ""])
def test_a_model_may_keep_weights_in_its_own_second_file_only(mapped: Bundle, location: str) -> None:
    graph = MODEL_FILES["fp32"]
    write_external_model(mapped.path / graph, location)
    entry = {"sha256": sha256_of(mapped.path / graph), "bytes": (mapped.path / graph).stat().st_size}
    change_manifest(mapped.path, lambda document: document["files"].update({graph: entry}))
    with pytest.raises(BundleError, match="which no digest covers"):
        open_bundle(mapped.path).check_model("fp32")
    with pytest.raises(BundleError):
        Scorer.open(mapped.path, precision="fp32", device="cpu")


# Copies


@pytest.mark.parametrize("again", [lambda scorer: pickle.loads(pickle.dumps(scorer)), copying.copy, copying.deepcopy])
def test_a_pickled_scorer_is_opened_again_from_anywhere(
    copy: Path, again: Callable[[Scorer], Scorer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ScorerOptions(device="cpu", precision="int8", threads=1, max_batch_tokens=99)
    with Scorer.open_with("copy", options) as scorer:
        monkeypatch.chdir("/")
        with again(scorer) as found:
            assert found is not scorer
            assert found.info == scorer.info.__class__(**{**vars(scorer.info), "bundle": str(copy)})
            np.testing.assert_array_equal(found.score(PAIRS), scorer.score(PAIRS))


def test_cappy_mini_is_pickled_without_a_path() -> None:
    with Scorer.open(threads=1, device="cpu") as scorer:
        assert b"mini" not in pickle.dumps(scorer)
        with pickle.loads(pickle.dumps(scorer)) as found:
            assert found.info == scorer.info


def test_a_scorer_that_was_made_by_hand_or_closed_is_not_pickled() -> None:
    with pytest.raises(CappyError, match=r"only a scorer from Scorer\.open can be pickled"):
        pickle.dumps(fake_scorer())
    scorer = Scorer.open(threads=1)
    scorer.close()
    with pytest.raises(ScoringError, match="was closed"):
        pickle.dumps(scorer)


# Closing


@pytest.mark.parametrize("mode", ["both", "throughput"])
def test_a_call_that_runs_at_close_ends_or_says_closed(mode: str) -> None:
    errors: list[BaseException] = []
    for _ in range(4):
        scorer = Scorer.open_with(TINY, ScorerOptions(device="cpu", precision="int8", threads=2, mode=mode))  # type: ignore[arg-type]
        begun = threading.Barrier(4)

        def score_on(scorer: Scorer = scorer, begun: threading.Barrier = begun) -> None:
            begun.wait()
            try:
                while True:
                    scorer.rank(PAIRS[0][0], CLOSE, exact_winner=True)
                    scorer.score(PAIRS[::4])
            except ScoringError as error:
                if "was closed" not in str(error):
                    errors.append(error)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=score_on) for _ in range(3)]
        for thread in threads:
            thread.start()
        begun.wait()
        scorer.close()
        for thread in threads:
            thread.join()
    assert errors == []


@pytest.mark.slow
def test_closing_frees_the_models_at_once_and_gives_the_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C library would keep it: 552 MB of 12 scorers of cappy-mini, and 142 MB now."""
    gc.collect()  # other tests' scorers
    given_back: list[bool] = []
    monkeypatch.setattr("cappy_engine.session.give_memory_back", lambda: given_back.append(True))
    scorer = opened(TINY)
    scorer.score(PAIRS)
    scorer.close()
    assert len(given_back) == 2  # one for each session
    give_memory_back()


# Strangers


@pytest.mark.slow
@pytest.mark.parametrize("set_to", [None, "0"])
def test_onnx_runtime_sends_nothing_home_unless_it_is_asked_to(tmp_path: Path, set_to: str | None) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for name in ("ORT_DISABLE_TELEMETRY", "CAPPY_CACHE"):
        environment.pop(name, None)
    if set_to is not None:
        environment["ORT_DISABLE_TELEMETRY"] = set_to
    script = "import os\nfrom cappy_engine import Scorer\nwith Scorer.open() as scorer: scorer.score([('a', 'b')])\n"
    if set_to is not None:  # asked for: it would make files, and reach for its server
        script = "import os, cappy_engine"
    script += "\nprint(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == [set_to or "1"]
    assert list(tmp_path.rglob("*")) == []
