"""ONNX Runtime at the seam: what is asked for runs, or an error says why not; nothing falls back in silence."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest

from cappy_engine.bundle import MODEL_FILES
from cappy_engine.cpu.kernels import find_kernels
from cappy_engine.errors import BundleError, DeviceUnavailable, InstallationError, ScoringError
from cappy_engine.gpu.operator_providers import check_operator_providers
from cappy_engine.inputs import position_ids
from cappy_engine.native.library import NativeLibrary
from cappy_engine.session import (
    INPUTS,
    PROVIDERS,
    OrtSession,
    census,
    check_device,
    check_providers,
    check_signature,
    load_runtime,
    open_session,
)
from tests.support.installations import PretendsToHaveGpus, needs_cpu_package
from tests.support.onnx_files import write_product_model, write_sum_model
from tests.support.places import TINY


@pytest.fixture
def model(bundle: Path) -> Path:
    return bundle / MODEL_FILES["fp32"]


def inputs_of(ids: list[list[int]]) -> dict[str, npt.NDArray[np.int64]]:
    input_ids = np.array(ids, dtype=np.int64)
    return {
        "input_ids": input_ids,
        "attention_mask": np.ones_like(input_ids),
        "token_type_ids": np.zeros_like(input_ids),
        "position_ids": position_ids(input_ids, pad_token_id=1),
    }


# Runs


def test_a_session_gives_one_float32_score_for_each_row(model: Path) -> None:
    session = open_session(model, device="cpu")
    scores = session.run(inputs_of([[0, 10, 2, 2, 11, 2], [0, 12, 2, 2, 13, 2]]))
    assert session.device == "cpu"
    assert scores.shape == (2,)
    assert scores.dtype == np.float32
    assert np.isfinite(scores).all()


def test_a_native_library_is_given_to_the_session() -> None:
    chosen = find_kernels().chosen
    if chosen is None:
        pytest.skip(f"needs the native library: {find_kernels().why_not}")
    before = NativeLibrary(chosen.path).registrations
    open_session(TINY / "onnx" / "model.onnx", kernels=chosen)
    open_session(TINY / "onnx" / "model.onnx")
    assert NativeLibrary(chosen.path).registrations == before + 1


def test_a_model_is_given_only_the_inputs_that_it_takes(tmp_path: Path) -> None:
    ids = inputs_of([[1, 2], [3, 4]])  # at the positions [[1, 2], [2, 3]], since 1 is padding's
    for names, expected in ((["input_ids"], [3, 7]), (["input_ids", "attention_mask"], [5, 9]), (INPUTS, [8, 14])):
        session = open_session(write_sum_model(tmp_path / "model.onnx", inputs=list(names), output="logits"))
        assert session.run(ids).tolist() == expected


@pytest.mark.parametrize("token_id", [10**6, -(10**6)])
def test_a_token_id_beyond_the_vocabulary_fails_and_names_batch_and_device(model: Path, token_id: int) -> None:
    session = open_session(model)
    with pytest.raises(ScoringError, match=r"ONNX Runtime failed on a batch of shape \(1, 4\) on cpu"):
        session.run(inputs_of([[0, token_id, 10, 2]]))
    assert np.isfinite(session.run(inputs_of([[0, 10, 10, 2]]))).all()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux to count threads")
def test_threads_are_as_many_as_asked_for(model: Path) -> None:
    # In a process of its own: here, threads that another test left behind may end between two counts.
    code = """
import pathlib, sys
from cappy_engine.session import open_session
tasks = pathlib.Path("/proc/self/task")
for threads in (1, 1, 2, 4):
    before = len(list(tasks.iterdir()))
    session = open_session(pathlib.Path(sys.argv[1]), threads=threads)
    print(len(list(tasks.iterdir())) - before)
    del session
"""
    started = subprocess.run([sys.executable, "-c", code, str(model)], check=True, capture_output=True, text=True)
    first, *others = started.stdout.split()
    assert first in ("0", "1")  # ONNX Runtime itself may start one, with its first session
    assert others == ["0", "1", "3"]  # the caller's thread works too


# Devices


OWN = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


@needs_cpu_package
@pytest.mark.parametrize("device", OWN)
def test_a_gpu_on_a_cpu_installation_is_refused_with_the_reason(model: Path, device: str) -> None:
    with pytest.raises(DeviceUnavailable, match=f"'{device}' needs {OWN[device]}.*has only .*CPUExecutionProvider"):
        open_session(model, device=device)


@needs_cpu_package
@pytest.mark.parametrize("device", OWN)
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_gpu_that_is_listed_but_does_not_open_is_refused(
    model: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cappy_engine.session.load_runtime", PretendsToHaveGpus)
    for providers in (None, [(OWN[device], {"device_id": "0"})]):
        with pytest.raises(DeviceUnavailable, match="came up with CPUExecutionProvider"):
            open_session(model, device=device, providers=providers)


@pytest.mark.parametrize("device", ["gpu", "CPU", "", "auto"])
def test_an_unknown_device_is_a_wrong_argument(model: Path, device: str) -> None:
    with pytest.raises(ValueError, match=f"unknown device {device!r}; choose from auto, cpu, cuda, tensorrt"):
        open_session(model, device=device)


def test_a_device_without_its_provider_is_refused_with_what_to_install() -> None:
    with pytest.raises(DeviceUnavailable, match=r"ONNX Runtime 9\.9 has only A, B; use device='cpu', or .*'\.\[gpu\]'"):
        check_device("cuda", ["A", "B"], "9.9")
    for device, provider in OWN.items():
        assert check_device(device, [provider, "B"], "9.9") == provider


def test_a_session_that_came_up_on_another_device_is_refused() -> None:
    with pytest.raises(DeviceUnavailable, match=r"'cuda' was asked for, but ONNX Runtime came up with CPUExec.*driver"):
        check_providers("cuda", ["CPUExecutionProvider"])
    with pytest.raises(DeviceUnavailable, match="'tensorrt' was asked for, but ONNX Runtime came up with CUDAExec"):
        check_providers("tensorrt", ["CUDAExecutionProvider", "CPUExecutionProvider"])
    check_providers("cuda", ["CUDAExecutionProvider", "CPUExecutionProvider"])
    check_providers("cpu", ["CPUExecutionProvider"])


# Models


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x08\x12\x07"])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"ONNX Runtime .* cannot load .*model\.onnx"):
        open_session(tmp_path / "model.onnx")


def test_a_model_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"cannot load .*absent\.onnx"):
        open_session(tmp_path / "absent.onnx")


@pytest.mark.parametrize(
    ("inputs", "output"),
    [
        (["input_ids", "pixel_values"], "logits"),
        (["attention_mask"], "logits"),
        (["ids"], "logits"),
        (["input_ids", "attention_mask"], "scores"),
    ],
)
def test_a_model_with_other_inputs_or_without_logits_is_refused(tmp_path: Path, inputs: list[str], output: str) -> None:
    path = write_sum_model(tmp_path / "model.onnx", inputs=inputs, output=output)
    with pytest.raises(BundleError, match=r"model\.onnx takes .* and gives .*; a bundle's model takes") as caught:
        open_session(path)
    assert str(inputs) in str(caught.value)
    assert str([output]) in str(caught.value)


def test_a_signature_with_further_outputs_is_accepted() -> None:
    floats = "tensor(float)"
    check_signature(Path("model.onnx"), {"input_ids": "tensor(int64)"}, {"hidden": floats, "logits": floats})


@pytest.mark.parametrize("logits", ["tensor(double)", "tensor(int64)", "tensor(string)", "seq(tensor(float))"])
def test_logits_of_an_odd_type_are_refused(logits: str) -> None:
    with pytest.raises(BundleError, match=rf"gives logits as {re.escape(logits)}; .*tensor\(float\)"):
        check_signature(Path("model.onnx"), {"input_ids": "tensor(int64)"}, {"logits": logits})


@pytest.mark.parametrize("ids", ["tensor(int32)", "tensor(float)", "tensor(string)"])
def test_token_ids_of_an_odd_type_are_refused(ids: str) -> None:
    with pytest.raises(BundleError, match="a bundle's model takes"):
        check_signature(Path("model.onnx"), {"input_ids": ids}, {"logits": "tensor(float)"})


# Installations


def test_two_packages_of_onnx_runtime_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A real second package as far as importlib.metadata can see; it works the same where onnxruntime-gpu is installed.
    second = "onnxruntime-directml"
    folder = tmp_path / f"{second.replace('-', '_')}-9.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {second}\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InstallationError, match=rf"^onnxruntime.* and {second} are both installed") as caught:
        load_runtime()
    assert re.search(rf"pip uninstall -y onnxruntime[\w-]* {second}'", str(caught.value))


def test_onnx_runtime_that_cannot_be_imported_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InstallationError, match=r"cannot be imported .*; in a clone .*'\.\[cpu\]'"):
        load_runtime()


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (3,)])
def test_logits_of_another_shape_are_no_scores(shape: tuple[int, ...]) -> None:
    """One row for three pairs would be broadcast, and a second column dropped."""

    class Wrong:
        def get_inputs(self) -> list[object]:
            return []

        def run(self, outputs: object, inputs: object) -> list[npt.NDArray[np.float32]]:
            return [np.zeros(shape, dtype=np.float32)]

    with pytest.raises(ScoringError, match="logits of shape"):
        OrtSession(Wrong(), device="cpu").run({"input_ids": np.zeros((3, 4), dtype=np.int64)})


# Where nodes run


@dataclass(frozen=True)
class FakeNode:
    op_type: str


@dataclass(frozen=True)
class FakeSubgraph:
    ep_name: str
    op_types: tuple[str, ...]

    def get_nodes(self) -> list[FakeNode]:
        return [FakeNode(name) for name in self.op_types]


def test_operators_are_counted_by_provider_over_all_parts() -> None:
    parts = [
        FakeSubgraph("CUDA", ("MatMul", "Add", "MatMul")),
        FakeSubgraph("CPU", ("Shape",)),
        FakeSubgraph("CUDA", ("MatMul",)),
    ]
    assert census(parts) == {"CUDA": Counter({"MatMul": 3, "Add": 1}), "CPU": Counter({"Shape": 1})}
    assert census([]) == {}


def test_what_onnx_runtime_tells_is_counted(tmp_path: Path) -> None:
    model = write_product_model(tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(str(model), options, providers=[PROVIDERS["cpu"]])
    placed = census(session.get_provider_graph_assignment_info())
    assert placed == {PROVIDERS["cpu"]: Counter({"MatMul": 1, "Softmax": 1, "Shape": 1})}
    with pytest.raises(DeviceUnavailable, match="CPUExecutionProvider runs 1 MatMul, 1 Softmax"):
        check_operator_providers("cuda", placed)
