"""Provokes faults on a GPU: each must end in its error, or be mended.

Each works on a copy of the bundle whose one change is the fault; the manifest is sealed again, so that only the check
that is drilled can find it. For TensorRT the copy has one bucket: one engine is enough, and builds faster.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cappy_bench.gpu.plan import Check, CheckFailed, Step
from cappy_bench.gpu.results import Figures
from cappy_bench.gpu.steps import kept_engines
from cappy_bench.peers.process import in_short
from cappy_engine.bundle import MANIFEST, open_bundle, seal
from cappy_engine.errors import BundleError, DeviceUnavailable, ScoringError
from cappy_engine.gpu.engines import engine_folder
from cappy_engine.inputs import full_batch
from cappy_engine.storage import sha256_of, write_json

PRECISION = "fp16"
"""The precision of the drills: on a GPU most will use it."""
FAR = 0.5
"""How far a wrong score is off; a hundred times what fp16 may be."""


def drill_steps() -> list[Step]:
    """List the drills, in the order in which they run.

    >>> drill_steps()[0].name
    'drill/model-byte'
    """
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
    with _copied_bundle(check, names) as folder:
        _flip_byte(max((folder / name for name in names), key=lambda path: path.stat().st_size))
        return expect(BundleError, "is not the file that was exported", lambda: _open(check, folder, "cuda"))


def change_canary(check: Check) -> Figures:
    """Scores that differ from the canary's are refused: here the canary is wrong."""

    def spoil(document: dict[str, Any]) -> None:
        document["canary"]["pairs"][0]["score"] += FAR

    with _copied_bundle(check) as folder:
        _reseal(folder, spoil)
        return expect(DeviceUnavailable, "gives wrong scores", lambda: _open(check, folder, "cuda"))


def hide_gpu(check: Check) -> Figures:
    """Nothing falls back where the driver shows no GPU: the process has an empty CUDA_VISIBLE_DEVICES."""
    return expect(DeviceUnavailable, "cannot be used here", lambda: _open(check, check.bundle, "cuda"))


def leave_tf32_on(check: Check) -> Figures:
    """fp32 that TensorRT would compute in TF32 is refused."""
    return expect(
        DeviceUnavailable, "TF32", lambda: check.machine.open_scorer(check.bundle, "tensorrt", "fp32").close()
    )


def run_unknown_shapes(check: Check) -> Figures:
    """A length or a number of rows without an engine is refused.

    ONNX Runtime would build one for minutes.
    """
    with _one_bucket(check) as folder:
        session, model = check.machine.open_session(folder, "tensorrt", PRECISION)
        length = model.grouping.buckets[-1]
        found: Figures = {}
        for rows, tokens in ((1, length - 1), (model.max_rows(length) + 1, length)):
            batch = full_batch(rows, tokens, pad_token_id=model.pad_token_id)
            found = expect(ScoringError, "no engine takes", partial(session.run, batch))
        return found


def swap_weights(check: Check) -> Figures:
    """Other weights in a file of the same name get an engine of their own.

    With the old engine nothing would be wrong.
    """
    names = open_bundle(check.bundle).model_files(PRECISION, "tensorrt")
    with _one_bucket(check, names) as folder:
        _open(check, folder, "tensorrt")
        _shift_bias(folder / names[0])
        _reseal(folder, lambda document: None, changed=names)
        found = expect(DeviceUnavailable, "gives wrong scores", lambda: _open(check, folder, "tensorrt"))
        if not kept_engines(folder, PRECISION):
            raise CheckFailed("the scores changed, but no engine of these weights was kept", found)
    return found


def change_engine_byte(check: Check) -> Figures:
    """An engine with one other byte is not used, but built again."""
    with _one_bucket(check) as folder:
        _open(check, folder, "tensorrt")
        engine = next(iter(kept_engines(folder, PRECISION)), None)
        if engine is None:
            raise CheckFailed(f"no engine of this model is kept in {engine_folder()}")
        changed = max(engine.iterdir(), key=lambda path: path.stat().st_size)
        _flip_byte(changed)
        spoilt = sha256_of(changed)
        _open(check, folder, "tensorrt")
        if not engine.exists():
            raise CheckFailed("the changed engine is gone, and no other was kept")
        if spoilt in map(sha256_of, engine.iterdir()):
            raise CheckFailed(f"{changed.name} was changed, and opened all the same")
    return {"outcome": f"{changed.name} was built again"}


def expect(error: type[Exception], fragment: str, act: Callable[[], object]) -> Figures:
    """Do it, and return its error as figures. Raises CheckFailed unless it is an `error` whose message has `fragment`.

    >>> expect(ValueError, "invalid literal", lambda: int("x"))["error"]
    'ValueError'
    """
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
def _copied_bundle(check: Check, copied: Collection[str] = ()) -> Iterator[Path]:
    """Copy the bundle for a while; files but the manifest and `copied` are links."""
    with tempfile.TemporaryDirectory(dir=check.work) as temporary:
        folder = Path(temporary, "bundle")
        for name in (*open_bundle(check.bundle).manifest.files, MANIFEST):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name in copied or name == MANIFEST or not _link(check.bundle / name, folder / name):
                shutil.copyfile(check.bundle / name, folder / name)
        yield folder


def _reseal(folder: Path, change: Callable[[dict[str, Any]], None], changed: Collection[str] = ()) -> None:
    """Change the manifest, with the digests of `changed` files, and seal it again."""
    document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    change(document)
    for name in changed:
        document["files"][name] = {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size}
    write_json(folder / MANIFEST, seal(document))


def _flip_byte(path: Path) -> None:
    """Change one byte in the middle of the file."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        content[len(content) // 2] ^= 0xFF


def _shift_bias(model: Path) -> None:
    """Add FAR to the model's last bias, and so to every score; no name changes."""
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

    with _copied_bundle(check, copied) as folder:
        _reseal(folder, keep_last)
        yield folder


def _open(check: Check, folder: Path, device: str) -> None:
    check.machine.open_scorer(folder, device, PRECISION).close()


def _link(source: Path, target: Path) -> bool:
    """Make `target` another name of the file `source`; True if that was possible."""
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        return False
    return True
