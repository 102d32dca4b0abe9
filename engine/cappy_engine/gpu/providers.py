"""Options of ONNX Runtime's providers for NVIDIA GPUs, and the shapes that one TensorRT engine takes.

Pure: names and numbers in, dictionaries of strings out; knows nothing of sessions, and does not look for a GPU.

fp32 under TensorRT: its builder allows TF32 (10 bits), and ONNX Runtime has no option against it (its issue 26029),
only the environment variable NVIDIA_TF32_OVERRIDE=0, which must be set before the first session.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PRECISIONS = ("fp32", "fp16", "int8")
"""What a graph for TensorRT may be written in; int8 as explicit QuantizeLinear and DequantizeLinear."""
KNOWN_BOOLEANS = frozenset(
    (
        "trt_cuda_graph_enable",
        "trt_engine_cache_enable",
        "trt_fp16_enable",
        "trt_int8_enable",
        "trt_timing_cache_enable",
    )
)
"""TensorRT's options here that are the string "True" or "False"; ONNX Runtime refuses other spellings of them."""
_DIMENSIONS = re.compile(r"[1-9][0-9]*(x[1-9][0-9]*)*")


@dataclass(frozen=True)
class Profile:
    """Shapes that one TensorRT engine takes: `length` tokens, and `min_rows` to `max_rows` rows."""

    length: int
    max_rows: int
    min_rows: int = 1

    def __post_init__(self) -> None:
        if self.length < 1 or not 1 <= self.min_rows <= self.max_rows:
            raise ValueError(f"{self} takes nothing: length and rows must be at least 1, and min_rows <= max_rows")

    @property
    def is_fixed(self) -> bool:
        """Whether the engine takes but one shape."""
        return self.min_rows == self.max_rows


def cuda_options(*, gpu: int = 0, tf32: bool = False) -> dict[str, str]:
    """Options of CUDAExecutionProvider on the GPU of that number; `tf32` would make fp32 a format of 10 bits."""
    return {
        "device_id": str(gpu),
        "use_tf32": "1" if tf32 else "0",  # on by default
        "arena_extend_strategy": "kSameAsRequested",  # the default doubles, and an arena never shrinks
        # SkipLayerNormalization in fp16 added up in fp16, and overflowed (ONNX Runtime's issue 29034), unless this is
        # on; since its pull requests 28682 and 29388 it always adds up in fp32, and ignores this.
        "enable_skip_layer_norm_strict_mode": "1",
    }


def tensorrt_options(
    *,
    gpu: int = 0,
    profile: Profile,
    inputs: Sequence[str],
    cache: Path,
    precision: str,
    cuda_graph: bool = False,
    optimization_level: int = 3,
    workspace_bytes: int = 4 * 2**30,
) -> dict[str, str]:
    """Options of TensorrtExecutionProvider for an engine of `profile`, kept in `cache`, of a model with `inputs`.

    `cache` must be a folder for this model, precision, profile and machine alone: engines are found by the names in
    the graph, not by its weights. `optimization_level` is TensorRT's, 0 to 5. Raises ValueError for an unknown
    precision or level, and for `cuda_graph` with a profile of several shapes.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose from {', '.join(PRECISIONS)}")
    if not 0 <= optimization_level <= 5:
        raise ValueError(f"optimization_level must be from 0 to 5, got {optimization_level}")
    if cuda_graph and not profile.is_fixed:
        raise ValueError(f"a CUDA graph takes but one shape, and {profile} has several; its shapes must be fixed")
    return {
        "device_id": str(gpu),
        # The graph alone decides on precision, also for fp16 and int8: with these flags off, ONNX Runtime makes a
        # strongly typed network of it (CreateNodeComputeInfoFromGraph: unless fp16, int8 or bf16 is enabled), which
        # TensorRT obeys, and wants for explicit quantization. With one on, TensorRT may run in fp16 what the exporter
        # kept in fp32; trt_layer_norm_fp32_fallback, which is read with fp16 only, is there to mend some of that.
        "trt_fp16_enable": _boolean(False),
        "trt_int8_enable": _boolean(False),
        "trt_engine_cache_enable": _boolean(True),
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": _boolean(True),
        "trt_timing_cache_path": str(cache),
        "trt_builder_optimization_level": str(optimization_level),
        "trt_max_workspace_size": str(workspace_bytes),
        "trt_cuda_graph_enable": _boolean(cuda_graph),
        **profile_shapes(inputs, profile),
    }


def session_entries(device: str) -> dict[str, str]:
    """Entries of the session's configuration: off the CPU, ONNX Runtime is to tell which node runs where."""
    return {} if device == "cpu" else {"session.record_ep_graph_assignment_info": "1"}


def profile_shapes(inputs: Sequence[str], profile: Profile) -> dict[str, str]:
    """The options that name the shapes of every input, such as `input_ids:1x64,attention_mask:1x64`.

    TensorRT tunes for the largest batch: that is where the time goes. Without these options ONNX Runtime builds the
    engine again for each new shape; with one input missing it refuses the model, and so it does where TensorRT takes
    but parts of it, whose inputs have no names here. Raises ValueError for names that could not be told apart.
    """
    rows = {"min": profile.min_rows, "opt": profile.max_rows, "max": profile.max_rows}
    return {f"trt_profile_{end}_shapes": _format_shapes(inputs, (count, profile.length)) for end, count in rows.items()}


def parse_shapes(text: str) -> dict[str, tuple[int, ...]]:
    """The shapes that such an option names, by input; raises ValueError, with the text, where it is malformed."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part in text.split(","):
        name, _, dimensions = part.rpartition(":")
        if not name or name in shapes or not _DIMENSIONS.fullmatch(dimensions):
            raise ValueError(f"{text!r} is no list of shapes such as input_ids:1x64,attention_mask:1x64: see {part!r}")
        shapes[name] = tuple(int(number) for number in dimensions.split("x"))
    return shapes


def _format_shapes(inputs: Sequence[str], shape: tuple[int, ...]) -> str:
    if not inputs or len(set(inputs)) < len(inputs) or any(not name or "," in name for name in inputs):
        raise ValueError(f"inputs must be different names without commas, got {list(inputs)}")
    dimensions = "x".join(str(number) for number in shape)
    return ",".join(f"{name}:{dimensions}" for name in inputs)


def _boolean(value: bool) -> str:
    return "True" if value else "False"
