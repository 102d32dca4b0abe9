"""Simulate a driver and libraries for onnxruntime-gpu, and compare nodes with the schemas of its operators."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest

DRIVER = """
int cuDriverGetVersion(int *version) { *version = CUDA * 1000; return 0; }
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int length, int device) { name[0] = 'G'; name[1] = 0; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 9 : 0; return 0; }
int cuDeviceTotalMem_v2(unsigned long *bytes, int device) { *bytes = 80UL << 30; return 0; }
int cuGetErrorName(int error, const char **name) { *name = "?"; return 0; }
"""
"""A driver with one GPU of compute capability 9.0."""
CUDA_13 = ("libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10", "libcudart.so.13", "libcudnn.so.9")


def simulate(folder: Path, *, cuda: int, names: Sequence[str]) -> Path:
    """Make a driver for that CUDA, and empty libraries; skips where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    for name, source in (("libcuda.so.1", DRIVER), ("empty", "int nothing;")):
        command = [compiler, "-shared", "-fPIC", "-w", f"-DCUDA={cuda}", "-x", "c", "-o", str(folder / name), "-"]
        subprocess.run(command, input=source, text=True, check=True)
    for name in names:
        shutil.copyfile(folder / "empty", folder / name)
    return folder


SCHEMAS = """
import json
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema
def word(option): return str(option).rpartition(".")[2]
print(json.dumps({schema.name: {
    "attributes": {name: [word(one.type), one.required] for name, one in schema.attributes.items()},
    "inputs": [[one.name, word(one.option), one.typeStr] for one in schema.inputs],
    "outputs": len(schema.outputs),
    "types": {one.type_param_str: one.allowed_type_strs for one in schema.type_constraints},
} for schema in get_all_operator_schema() if schema.domain == "com.microsoft"}))
"""


def misfits(node: onnx.NodeProto, schema: dict[str, Any]) -> list[str]:
    """What is wrong with a node, by the schema of its operator."""
    given = {entry.name: onnx.AttributeProto.AttributeType.Name(entry.type) for entry in node.attribute}
    known = {name: kind for name, (kind, _) in schema["attributes"].items()}
    wrong = [f"attribute {name}: {kind}" for name, kind in given.items() if known.get(name) != kind]
    wrong += [f"no {name}" for name, (_, is_needed) in schema["attributes"].items() if is_needed and name not in given]
    present = [*map(bool, node.input), *[False] * len(schema["inputs"])]
    if len(node.input) > len(schema["inputs"]) or len(node.output) > schema["outputs"]:
        wrong.append(f"{len(node.input)} inputs, {len(node.output)} outputs")
    for is_there, (name, option, kind) in zip(present, schema["inputs"], strict=False):
        if option == "Single" and not is_there:
            wrong.append(f"no input {name}")
        if kind == "T" and not {"tensor(float)", "tensor(float16)"} <= set(schema["types"]["T"]):
            wrong.append(f"{name} is never fp16")
    return wrong
