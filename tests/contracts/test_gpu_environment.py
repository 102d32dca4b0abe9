"""What onnxruntime-gpu does on a machine without a GPU: nothing runs on the CPU that was meant for the GPU.

It has an environment of its own, since onnxruntime and onnxruntime-gpu exclude each other. CUDA's libraries are not
installed there, and need not be. The options for the providers are compared with what is written in its libraries,
since ONNX Runtime refuses an unknown one only where these can be loaded.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from onnx import helper

from cappy_bench.gpu.packed_attention import with_packed_attention
from cappy_engine.errors import DeviceUnavailable, InstallationError
from cappy_engine.gpu.providers import cuda_options, tensorrt_options
from cappy_export.graphs.cuda import packed_model
from cappy_export.graphs.writer import MICROSOFT
from tests.support.gpu_runtime import CUDA_13, SCHEMAS, misfits, simulate
from tests.support.places import ROOT
from tests.support.small_models import random_model

pytestmark = pytest.mark.slow

PACKAGES = (
    "onnxruntime-gpu>=1.31",
    "click",
    "filelock",
    "flatbuffers",
    "numpy",
    "packaging",
    "protobuf",
    "tokenizers",
    "tqdm",
)
"""All that is imported; with their dependencies, tokenizers would bring a client for the hub."""
UNREACHABLE = ("Could not find a version", "No matching distribution", "Connection", "Read timed out", "ProxyError")
"""What pip writes where it has no index, or an index without these packages."""
LIBRARIES = (
    "libonnxruntime_providers_tensorrt.so",
    "onnxruntime_pybind11_state*.so",
    "libonnxruntime.so*",
    "libonnxruntime_providers_cuda.so",
)
"""The smallest first: the last one has 284 MB."""
SCORE = """
import sys
from cappy_engine import Scorer
with Scorer.open(device=sys.argv[1]) as scorer:
    print(*scorer.score([("Is the sky blue?", "Yes"), ("Is the sky blue?", "No")]))
    print(scorer.info.device)
    print(scorer.info.device_reason)
"""


def run(
    *command: str | Path, folder: Path, path: Path | None = None, libraries: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run in `folder`, as if no environment were active; the kernels are for the CPU, and are not compiled.

    `path` is where Python looks for packages first, `libraries` where the loader looks for libraries.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment["CAPPY_BUILD"] = "none"
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    if libraries is not None:
        environment["LD_LIBRARY_PATH"] = str(libraries)
    return subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment with onnxruntime-gpu and this project; skips where pip has no index."""
    folder = tmp_path_factory.mktemp("gpu") / "venv"
    made = run(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder.parent)
    assert made.returncode == 0, made.stderr
    install = ("install", "--quiet", "--no-compile", "--no-deps", "-c", ROOT / "constraints.txt")
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", *install)
    fetched = run(*pip, "--retries", "2", *PACKAGES, folder=folder.parent)
    if fetched.returncode and any(message in fetched.stderr for message in UNREACHABLE):
        pytest.skip(f"pip cannot fetch onnxruntime-gpu: {fetched.stderr[-300:]}")
    assert fetched.returncode == 0, fetched.stderr
    installed = run(*pip, ROOT, folder=folder.parent)
    assert installed.returncode == 0, installed.stderr
    return folder


@pytest.fixture
def python(environment: Path) -> Path:
    """The interpreter of the environment; skips where there is a driver, since then other things are missing."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return environment / "bin" / "python"
    pytest.skip("needs a machine without a CUDA driver")


@pytest.fixture(scope="session")
def capi(environment: Path) -> Path:
    """The folder of ONNX Runtime's libraries."""
    (folder,) = environment.glob("lib/python*/site-packages/onnxruntime/capi")
    return folder


# Devices


def test_onnx_runtime_itself_claims_to_have_cuda_and_tensorrt(python: Path, tmp_path: Path) -> None:
    """If this fails, its lists are worth something, and much of preflight can go."""
    listed = run(python, "-c", "import onnxruntime; print(onnxruntime.get_available_providers())", folder=tmp_path)
    assert {"TensorrtExecutionProvider", "CUDAExecutionProvider"} <= set(re.findall(r"\w+", listed.stdout))


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_gpu_that_is_not_there_is_refused_with_its_cause_and_nothing_is_scored(
    python: Path, tmp_path: Path, device: str
) -> None:
    done = run(python, "-c", SCORE, device, folder=tmp_path)
    assert done.returncode != 0
    assert done.stdout == ""
    assert f"{DeviceUnavailable.__name__}: device '{device}' cannot be used" in done.stderr
    assert "driver: libcuda.so.1" in done.stderr
    assert "fix: install the NVIDIA driver" in done.stderr


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_the_command_line_refuses_it_too(python: Path, tmp_path: Path, device: str) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"instruction": "Is the sky blue?", "response": "Yes"}\n', encoding="utf-8")
    done = run(python.parent / "cappy", "score", "pairs.jsonl", "--device", device, folder=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "driver: libcuda.so.1" in done.stderr


def test_auto_takes_the_cpu_scores_and_says_why(python: Path, tmp_path: Path) -> None:
    done = run(python, "-c", SCORE, "auto", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    scores, device, reason = done.stdout.splitlines()
    assert len([float(score) for score in scores.split()]) == 2
    assert device == "cpu"
    assert reason.startswith("auto: ")
    assert "libcuda.so.1" in reason


def test_the_doctor_reports_what_is_missing_and_how_to_mend_it(python: Path, tmp_path: Path) -> None:
    done = run(python.parent / "cappy", "doctor", folder=tmp_path)
    assert done.returncode == 0, done.stderr  # a report, whatever it says
    assert re.search(r"MISSING +driver +libcuda\.so\.1", done.stdout)
    assert re.search(r"MISSING +CUDA +the loader cannot find .*libcublas\.so", done.stdout)
    assert re.search(r"MISSING +TensorRT +the loader cannot find libnvinfer\.so\.10", done.stdout)
    assert re.search(r"fix: pip install 'tensorrt-cu\d+<11'", done.stdout)
    assert "auto takes cpu: " in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("cuda", "names", "told", "last"),
    [
        (
            13, [*CUDA_13, "libnvinfer.so.11"],
            r"MISSING +TensorRT +the loader cannot find libnvinfer\.so\.10, .*; it finds libnvinfer\.so\.11, but this "
            r"ONNX Runtime works with TensorRT 10 only\n +fix: pip install 'tensorrt-cu13<11'\n",
            "auto takes cuda: ",
        ),
        (
            13, ["libcudart.so.12", "libcublas.so.12"],
            r"MISSING +CUDA +the loader cannot find .*libcublas\.so\.13.*; it finds libcublas\.so\.12.*, but this ONNX "
            r"Runtime is built for CUDA 13 only\n +fix: .*\[gpu\]",
            "auto takes cpu: ",
        ),
        (
            12, CUDA_13,
            r"MISSING +driver +the driver supports CUDA 12\.0, and this ONNX Runtime needs CUDA 13\n"
            r" +fix: install the NVIDIA driver 580 or newer\n",
            "auto takes cpu: ",
        ),
    ],
    ids=["tensorrt-11-only", "cuda-12-only", "driver-of-cuda-12"],
)  # fmt: skip
def test_the_doctor_tells_what_to_do_where_other_versions_are_there(
    python: Path, tmp_path: Path, cuda: int, names: Sequence[str], told: str, last: str
) -> None:
    libraries = simulate(tmp_path, cuda=cuda, names=names)
    done = run(python.parent / "cappy", "doctor", folder=tmp_path, libraries=libraries)
    assert done.returncode == 0, done.stderr
    assert re.search(told, done.stdout), done.stdout
    assert done.stdout.splitlines()[-1].startswith(last)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "tensorrt"])
def test_both_packages_at_once_are_refused(python: Path, tmp_path: Path, device: str) -> None:
    # A second package as far as importlib.metadata can see.
    (tmp_path / "onnxruntime-9.9.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: onnxruntime\nVersion: 9.9\n"
    (tmp_path / "onnxruntime-9.9.dist-info" / "METADATA").write_text(metadata, encoding="utf-8")
    done = run(python, "-c", SCORE, device, folder=tmp_path, path=tmp_path)
    assert done.returncode != 0
    assert done.stdout == ""
    assert f"{InstallationError.__name__}: onnxruntime and onnxruntime-gpu are both installed" in done.stderr
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in done.stderr


# Operators


@pytest.fixture(scope="session")
def schemas(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What onnxruntime-gpu says of its own operators; no GPU is needed for that."""
    done = run(environment / "bin" / "python", "-c", SCHEMAS, folder=tmp_path_factory.mktemp("schemas"))
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("kind", ["roberta", "bert"])
@pytest.mark.parametrize("is_joined", [False, True])
def test_cudas_operators_take_what_the_graph_gives_them(schemas: dict[str, Any], kind: str, is_joined: bool) -> None:
    model = random_model(kind)
    graph = packed_model(model.config, {name: value.numpy() for name, value in model.state_dict().items()})
    nodes = [node for node in (with_packed_attention(graph) if is_joined else graph).graph.node if node.domain]
    attention = "PackedAttention" if is_joined else "PackedMultiHeadAttention"
    assert {attention, "RemovePadding", "SkipLayerNormalization", "BiasGelu"} == {node.op_type for node in nodes}
    assert {node.domain for node in nodes} == {MICROSOFT}
    assert {node.name: found for node in nodes if (found := misfits(node, schemas[node.op_type]))} == {}


def test_a_node_that_does_not_fit_is_told(schemas: dict[str, Any]) -> None:
    node = helper.make_node("PackedMultiHeadAttention", ["q", "k", "v", "", "", "bounds"], ["y"], heads=2)
    found = misfits(node, schemas["PackedMultiHeadAttention"])
    assert found == ["attribute heads: INT", "no num_heads", "no input token_offset"]


# Options


def is_written_in(folder: Path, key: str) -> bool:
    """Whether one of ONNX Runtime's libraries holds `key` at the end of a string, and not within a longer word."""
    for path in (path for pattern in LIBRARIES for path in sorted(folder.glob(pattern))):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
            place = image.find(key.encode() + b"\0")
            while place > 0:
                if not re.match(rb"\w", image[place - 1 : place]):
                    return True
                place = image.find(key.encode() + b"\0", place + 1)
    return False


def options_of(provider: str) -> dict[str, str]:
    if provider == "cuda":
        return dict(cuda_options())
    inputs = ["input_ids", "attention_mask"]
    return dict(tensorrt_options(gpu=0, max_rows=32, length=128, inputs=inputs, cache=Path("/cache")))


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_every_option_is_one_that_onnx_runtime_knows(capi: Path, provider: str) -> None:
    options = options_of(provider)
    assert options
    assert [key for key in options if not is_written_in(capi, key)] == []


@pytest.mark.parametrize("key", ["trt_fp17_enable", "rt_fp16_enable", "use_tf33"])
def test_a_made_up_option_is_found_in_no_library(capi: Path, key: str) -> None:
    assert not is_written_in(capi, key)


def test_booleans_of_tensorrt_are_the_words_true_and_false() -> None:
    options = options_of("tensorrt").items()
    booleans = {key: value for key, value in options if key.endswith("_enable") or value.lower() in ("true", "false")}
    assert booleans
    assert {key: value for key, value in booleans.items() if value not in ("True", "False")} == {}
