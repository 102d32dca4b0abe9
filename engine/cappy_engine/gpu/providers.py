"""Write the options of ONNX Runtime's providers for NVIDIA GPUs.

Pure: names and numbers in, dictionaries of strings out; knows nothing of sessions, and does not look for a GPU.

fp32 under TensorRT: its builder allows TF32 (10 bits), and ONNX Runtime has no option against it (its issue 26029),
only the environment variable NVIDIA_TF32_OVERRIDE=0, which must be set before the first session.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

OPTIMIZATION_LEVEL = 3
"""TensorRT's own default, of 0 to 5."""
WORKSPACE_BYTES = 4 * 2**30


def cuda_options(*, gpu: int = 0) -> dict[str, str]:
    """List the options of CUDAExecutionProvider on a GPU."""
    return {
        "device_id": str(gpu),
        "use_tf32": "0",  # on by default, which makes fp32 a format of 10 bits
        "arena_extend_strategy": "kSameAsRequested",  # the default doubles, and an arena never shrinks
        # SkipLayerNormalization in fp16 added up in fp16, and overflowed (ONNX Runtime's issue 29034), unless this is
        # on; since its pull requests 28682 and 29388 it always adds up in fp32, and ignores this.
        "enable_skip_layer_norm_strict_mode": "1",
    }


def tensorrt_options(*, gpu: int = 0, max_rows: int, length: int, inputs: Sequence[str], cache: Path) -> dict[str, str]:
    """List the options of TensorrtExecutionProvider for one engine.

    The engine takes 1 to `max_rows` rows of `length` tokens. `inputs` are the model's. `cache` must be a folder for
    this model, precision, shape and machine alone: engines are found by the names in the graph, not by its weights.
    """
    return {
        "device_id": str(gpu),
        # The graph alone decides on precision, also for fp16 and int8: with these flags off, ONNX Runtime makes a
        # strongly typed network of it (CreateNodeComputeInfoFromGraph: unless fp16, int8 or bf16 is enabled), which
        # TensorRT obeys, and wants for explicit quantization. With one on, TensorRT may run in fp16 what the exporter
        # kept in fp32; trt_layer_norm_fp32_fallback, which is read with fp16 only, is there to mend some of that.
        "trt_fp16_enable": "False",
        "trt_int8_enable": "False",
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(cache),
        "trt_builder_optimization_level": str(OPTIMIZATION_LEVEL),
        "trt_max_workspace_size": str(WORKSPACE_BYTES),
        "trt_cuda_graph_enable": "False",
        **_profile_shapes(inputs, max_rows, length),
    }


def _profile_shapes(inputs: Sequence[str], max_rows: int, length: int) -> dict[str, str]:
    """List the options that name the shapes of every input, such as `input_ids:1x64,attention_mask:1x64`.

    TensorRT tunes for the largest batch: that is where the time goes. Without these options ONNX Runtime builds the
    engine again for each new shape; with one input missing it refuses the model, and so it does where TensorRT takes
    but parts of it, whose inputs have no names here.
    """
    rows = {"min": 1, "opt": max_rows, "max": max_rows}
    return {
        f"trt_profile_{end}_shapes": ",".join(f"{name}:{count}x{length}" for name in inputs)
        for end, count in rows.items()
    }
