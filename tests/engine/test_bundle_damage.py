"""A bundle is used only as it was exported: every kind of damage is an error that names the file and what to do."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cappy_engine import Scorer
from cappy_engine.bundle import MANIFEST, MODEL_FILES, TARGETS, open_bundle
from cappy_engine.errors import BundleError, ScoringError
from cappy_engine.options import Precision
from tests.support.bundles import MODELS, SMALL_FILES, flip_byte
from tests.support.places import TINY_PRECISIONS

# Damaged files


@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("name", SMALL_FILES)
def test_a_flipped_byte_in_a_small_file_is_found_on_opening(copy: Path, name: str, where: str) -> None:
    size = (copy / name).stat().st_size
    flip_byte(copy / name, {"first": 0, "middle": size // 2, "last": size - 1}[where])
    with pytest.raises(BundleError, match=rf"{name} .*is not the file that was exported.*export it again"):
        open_bundle(copy)


@pytest.mark.parametrize("precision", TINY_PRECISIONS)
def test_a_flipped_byte_in_a_model_is_found_when_that_precision_is_opened(copy: Path, precision: Precision) -> None:
    name = MODEL_FILES[precision]
    flip_byte(copy / name, (copy / name).stat().st_size // 2)
    open_bundle(copy)  # reading gigabytes is left to whoever uses the model
    with pytest.raises(BundleError, match=rf"{name} .*is not the file that was exported.*export it again"):
        Scorer.open(copy, precision=precision)
    other: Precision = "fp16" if precision == "fp32" else "fp32"
    with Scorer.open(copy, precision=other) as scorer:
        assert scorer.info.precision == other


def test_a_model_that_cannot_be_loaded_is_named_as_changed(copy: Path) -> None:
    model = copy / MODEL_FILES["fp32"]
    model.write_bytes(bytes(model.stat().st_size))
    with pytest.raises(BundleError, match=rf"{MODEL_FILES['fp32']} .*is not the file that was exported"):
        Scorer.open(copy, precision="fp32")


def exchange(path: Path) -> None:
    """Put the same bytes there: by now the loader may have read others."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("change", [lambda path: os.utime(path, ns=(1, 1)), Path.unlink, exchange])
def test_a_model_that_changes_while_it_is_loaded_is_not_used(copy: Path, change: Callable[[Path], object]) -> None:
    """Though the bytes that are checked are right: others may have been loaded."""

    def load() -> None:
        with open_bundle(copy).checked("int8"):
            change(copy / MODEL_FILES["int8"])

    with pytest.raises(BundleError, match=rf"{MODEL_FILES['int8']} .*was changed while it was opened"):
        load()


def test_a_model_of_another_size_is_noticed_while_it_runs_whatever_its_time(copy: Path) -> None:
    """A copy in place may keep the time, as rsync's does."""
    path, files = copy / MODEL_FILES["int8"], open_bundle(copy).open_model("int8")
    files.check_in_place()
    before = path.stat()
    path.write_bytes(path.read_bytes() + b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ScoringError, match="was written over while it was in use"):
        files.check_in_place()


def test_a_damaged_model_does_not_make_auto_take_another_precision(copy: Path) -> None:
    flip_byte(copy / MODEL_FILES["fp32"], 1000)
    with pytest.raises(BundleError, match=MODEL_FILES["fp32"]):
        Scorer.open(copy)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_a_changed_byte_in_the_manifest_is_found_unless_it_says_the_same(
    copy: Path, bundle: Path, place: float, mask: int
) -> None:
    content = bytearray((bundle / MANIFEST).read_bytes())
    content[int(place * len(content))] ^= mask
    (copy / MANIFEST).write_bytes(content)
    with contextlib.suppress(BundleError):
        assert open_bundle(copy).manifest == open_bundle(bundle).manifest


def use(folder: Path, name: str) -> None:
    """Open the bundle, and check the model if `name` is one of its files."""
    opened = open_bundle(folder)
    for target, files in TARGETS.items():
        for precision, model in files.items():
            if model == name:
                opened.check_model(precision, target)


@pytest.mark.parametrize("name", [*SMALL_FILES, *MODELS])
def test_a_missing_file_is_named_when_it_is_used(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(BundleError, match=rf"lacks {name} \(No such file.*export it again"):
        use(copy, name)


@pytest.mark.parametrize("name", [*SMALL_FILES, *MODELS])
@pytest.mark.parametrize("kept", [0, 10])
def test_a_truncated_file_is_named_with_its_size(copy: Path, name: str, kept: int) -> None:
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[:kept])
    with pytest.raises(BundleError, match=rf"{name} .*has {kept} bytes instead of {len(whole)}; export it again"):
        use(copy, name)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["left out", "empty"])
def test_a_model_that_is_not_used_may_be_left_out(copy: Path, bundle: Path, damage: Callable[[Path], object]) -> None:
    damage(copy / MODEL_FILES["fp32"])
    assert list(open_bundle(copy).missing) == [MODEL_FILES["fp32"]]
    with Scorer.open(copy, precision="int8") as scorer, Scorer.open(bundle, precision="int8") as whole:
        assert scorer.score([("a", "b")]) == whole.score([("a", "b")])
        with pytest.raises(BundleError, match=MODEL_FILES["fp32"]):
            scorer.rank("a", ["b", "c"], exact_winner=True)
    with pytest.raises(BundleError, match=MODEL_FILES["fp32"]):  # auto does not turn to another precision
        Scorer.open(copy)


@pytest.mark.parametrize("name", ["onnx/model.onnx.data", "onnx/weights/layer.bin", "onnx/.hidden"])
def test_a_file_beside_the_models_that_the_manifest_does_not_name_is_refused(copy: Path, name: str) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b"weights")
    with pytest.raises(BundleError, match=rf"holds {name}, which its manifest does not name; remove it"):
        open_bundle(copy)


def test_a_dangling_link_beside_the_models_is_refused(copy: Path) -> None:
    (copy / "onnx" / "link").symlink_to(copy / "nowhere")
    with pytest.raises(BundleError, match=r"holds onnx/link"):
        open_bundle(copy)


def test_a_linked_folder_beside_the_models_is_refused(copy: Path, tmp_path: Path) -> None:
    """A model could read external data through it that no digest covers."""
    (tmp_path / "outside").mkdir()
    (copy / "onnx" / "sub").symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match="onnx/sub, which its manifest does not name"):
        open_bundle(copy)


def test_a_model_folder_that_links_to_a_whole_file_system_ends_at_its_first_file(copy: Path) -> None:
    shutil.rmtree(copy / "cuda")
    (copy / "cuda").symlink_to("/")
    with pytest.raises(BundleError, match=r"holds cuda/.*, which its manifest does not name"):
        open_bundle(copy)


def test_a_link_to_a_file_of_the_right_content_is_fine(copy: Path, tmp_path: Path) -> None:
    """The hub's cache is made of such links."""
    model = copy / MODEL_FILES["fp32"]
    model.rename(tmp_path / "blob")
    model.symlink_to(tmp_path / "blob")
    with Scorer.open(copy, precision="fp32"):
        pass
