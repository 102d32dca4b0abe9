"""Failure drills: what must be refused on a GPU is provoked, and must end in its error, or be mended.

Each works on a copy of the bundle whose one change is the fault; the manifest is sealed again, so that only the check
that is drilled can find it. For TensorRT the copy has one bucket: one engine is enough, and builds faster.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cappy_bench.gpu.results import Figures
from cappy_bench.gpu.steps import Check, CheckFailed, Step, engines
from cappy_bench.peers.process import in_short
from cappy_engine.bundle import MANIFEST, open_bundle, seal, sha256_of
from cappy_engine.errors import BundleError, DeviceUnavailable, ScoringError
from cappy_engine.gpu.engines import engine_folder
from cappy_engine.gpu.plan import full_batch

PRECISION = "fp16"
"""What the drills run in: on a GPU it is what most will use."""
FAR = 0.5
"""How far a wrong score is off; a hundred times what fp16 may be."""


def drill_steps() -> list[Step]:
    """All drills, in the order in which they run."""
    return [
        Step("drill/model-byte", "cuda", change_model_byte),
        Step("drill/wrong-canary", "cuda", change_canary),
        Step("drill/hidden-gpu", "cuda", hide_gpu, {"CUDA_VISIBLE_DEVICES": ""}),
        Step("drill/tf32-not-switched-off", "tensorrt", leave_tf32_on),
        Step("drill/unknown-shape", "tensorrt", run_unknown_shapes),
        Step("drill/swapped-weights", "tensorrt", swap_weights),
        Step("drill/engine-byte", "tensorrt", change_engine_byte),
    ]


def change_model_byte(check: Check) -> Figures:
    """A model file with one other byte is not opened."""
    names = open_bundle(check.bundle).model_files(PRECISION, "cuda")
    with copied_bundle(check, names) as folder:
        flip_byte(max((folder / name for name in names), key=lambda path: path.stat().st_size))
        return expect(BundleError, "is not the file that was exported", lambda: _open(check, folder, "cuda"))


def change_canary(check: Check) -> Figures:
    """Scores that differ from the canary's are refused: here it is the canary that is wrong."""

    def spoil(document: dict[str, Any]) -> None:
        document["canary"]["pairs"][0]["score"] += FAR

    with copied_bundle(check) as folder:
        reseal(folder, spoil)
        return expect(DeviceUnavailable, "gives wrong scores", lambda: _open(check, folder, "cuda"))


def hide_gpu(check: Check) -> Figures:
    """Without a GPU that the driver shows (the process has an empty CUDA_VISIBLE_DEVICES) nothing falls back."""
    return expect(DeviceUnavailable, "cannot be used here", lambda: _open(check, check.bundle, "cuda"))


def leave_tf32_on(check: Check) -> Figures:
    """fp32 that TensorRT would compute in TF32 is refused."""
    return expect(
        DeviceUnavailable, "TF32", lambda: check.machine.open_scorer(check.bundle, "tensorrt", "fp32").close()
    )


def run_unknown_shapes(check: Check) -> Figures:
    """A length or a number of rows without an engine is refused, where ONNX Runtime would build one for minutes."""
    with _one_bucket(check) as folder:
        session, plan = check.machine.open_session(folder, "tensorrt", PRECISION, False)
        length, pad_token_id = plan.grouping.buckets[-1], open_bundle(folder).manifest.pad_token_id
        found: Figures = {}
        for rows, tokens in ((1, length - 1), (plan.max_rows(length) + 1, length)):
            batch = full_batch(rows, tokens, pad_token_id=pad_token_id)
            found = expect(ScoringError, "no engine takes", partial(session.run, batch))
        return found


def swap_weights(check: Check) -> Figures:
    """Other weights in a file of the same name get an engine of their own: with the old one nothing would be wrong."""
    names = open_bundle(check.bundle).model_files(PRECISION, "tensorrt")
    with _one_bucket(check, names) as folder:
        _open(check, folder, "tensorrt")
        shift_bias(folder / names[0])
        reseal(folder, lambda document: None, changed=names)
        before = engines()
        found = expect(DeviceUnavailable, "gives wrong scores", lambda: _open(check, folder, "tensorrt"))
        if not engines() - before:
            raise CheckFailed("the scores changed, but no engine of another key was kept", found)
    return found


def change_engine_byte(check: Check) -> Figures:
    """An engine with one other byte is not used, but built again."""
    with _one_bucket(check) as folder:
        _open(check, folder, "tensorrt")
        changed = max(_engine_files(folder), key=lambda path: path.stat().st_size, default=None)
        if changed is None:
            raise CheckFailed(f"no engine of this model is kept in {engine_folder()}")
        flip_byte(changed)
        spoilt = sha256_of(changed)
        _open(check, folder, "tensorrt")
        if spoilt in {sha256_of(path) for path in _engine_files(folder)}:
            raise CheckFailed(f"{changed.name} was changed, and opened all the same")
        if not _engine_files(folder):
            raise CheckFailed("the changed engine is gone, and no other was kept")
    return {"outcome": f"{changed.name} was built again"}


def expect(error: type[Exception], fragment: str, act: Callable[[], object]) -> Figures:
    """Do it, and return its error as figures; CheckFailed unless that is an `error` whose message holds `fragment`."""
    wanted = f"{error.__name__} with {fragment!r} was expected"
    try:
        act()
    except Exception as raised:
        kind, message = type(raised).__name__, in_short(str(raised))
        if isinstance(raised, error) and fragment in str(raised):
            return {"error": kind, "message": message, "outcome": f"{kind}, as it must"}
        raise CheckFailed(f"{wanted}, and {kind} came: {message}") from raised
    raise CheckFailed(f"{wanted}, and nothing was raised")


@contextlib.contextmanager
def copied_bundle(check: Check, copied: Collection[str] = ()) -> Iterator[Path]:
    """The bundle in a folder of its own for a while: files to change are `copied`, as the manifest, others linked."""
    with tempfile.TemporaryDirectory(dir=check.work) as temporary:
        folder = Path(temporary, "bundle")
        for name in (*open_bundle(check.bundle).manifest.files, MANIFEST):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name in copied or name == MANIFEST or not _link(check.bundle / name, folder / name):
                shutil.copyfile(check.bundle / name, folder / name)
        yield folder


def reseal(folder: Path, change: Callable[[dict[str, Any]], None], changed: Collection[str] = ()) -> None:
    """Change the manifest, with the digests of the files that were changed, and seal it as an export does."""
    document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    change(document)
    for name in changed:
        document["files"][name] = {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size}
    (folder / MANIFEST).write_text(json.dumps(seal(document)), encoding="utf-8")


def flip_byte(path: Path) -> None:
    """Change one byte in the middle of the file."""
    with path.open("r+b") as file:
        place = path.stat().st_size // 2
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 0xFF]))


def shift_bias(model: Path) -> None:
    """Add FAR to the model's last bias, and so to every score; nothing else changes, and no name."""
    import onnx
    from onnx import numpy_helper

    loaded = onnx.load(str(model), load_external_data=False)
    found = [
        tensor
        for tensor in loaded.graph.initializer
        if tensor.name.endswith("bias") and np.prod(tensor.dims) == 1 and tensor.data_type != onnx.TensorProto.INT64
    ]
    if len(found) != 1:
        raise CheckFailed(f"{model.name} has {len(found)} biases of one number, and the drill needs one")
    value = numpy_helper.to_array(found[0])
    found[0].CopyFrom(numpy_helper.from_array((value + FAR).astype(value.dtype), found[0].name))
    onnx.save(loaded, str(model))


@contextlib.contextmanager
def _one_bucket(check: Check, copied: Collection[str] = ()) -> Iterator[Path]:
    """A copy whose one bucket is the longest."""

    def keep_last(document: dict[str, Any]) -> None:
        document["targets"]["tensorrt"]["buckets"] = [document["model"]["max_length"]]

    with copied_bundle(check, copied) as folder:
        reseal(folder, keep_last)
        yield folder


def _engine_files(folder: Path) -> list[Path]:
    """The files of the kept engines that were built for the bundle in `folder`, and its longest bucket."""
    bundle = open_bundle(folder)
    digests = [bundle.manifest.files[name].sha256 for name in bundle.model_files(PRECISION, "tensorrt")]
    found = []
    for manifest in engine_folder().glob(f"*/{MANIFEST}"):
        facts = json.loads(manifest.read_text(encoding="utf-8"))["facts"]
        is_ours = facts["model_sha256"] == digests and facts["precision"] == PRECISION
        if is_ours and facts["profile"].endswith(f"x {bundle.manifest.max_length}"):
            found += [path for path in manifest.parent.iterdir() if path.name != MANIFEST]
    return found


def _open(check: Check, folder: Path, device: str) -> None:
    check.machine.open_scorer(folder, device, PRECISION).close()


def _link(source: Path, target: Path) -> bool:
    """Whether `target` could be made another name of the file `source`."""
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        return False
    return True
