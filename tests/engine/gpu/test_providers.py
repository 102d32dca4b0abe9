"""Options of the GPU providers: what is written is what ONNX Runtime reads."""

from __future__ import annotations

from pathlib import Path

from cappy_engine.gpu.providers import cuda_options, tensorrt_options

INPUTS = ("input_ids", "attention_mask")
CACHE = Path("/somewhere/engines")

# CUDA


def test_cuda_runs_on_the_gpu_of_that_number() -> None:
    assert cuda_options()["device_id"] == "0"
    assert cuda_options(gpu=3)["device_id"] == "3"


def test_options_of_cuda_are_these_and_no_others() -> None:
    assert cuda_options() == {
        "device_id": "0",
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "enable_skip_layer_norm_strict_mode": "1",
    }


# TensorRT


def test_options_of_tensorrt_are_these_and_no_others() -> None:
    """Its booleans are the words True and False; with fp16 and int8 off, the graph alone decides on precision."""
    options = tensorrt_options(gpu=2, max_rows=32, length=128, inputs=INPUTS, cache=CACHE)
    assert options == {
        "device_id": "2",
        "trt_fp16_enable": "False",
        "trt_int8_enable": "False",
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(CACHE),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(CACHE),
        "trt_builder_optimization_level": "3",
        "trt_max_workspace_size": "4294967296",
        "trt_cuda_graph_enable": "False",
        "trt_profile_min_shapes": "input_ids:1x128,attention_mask:1x128",
        "trt_profile_opt_shapes": "input_ids:32x128,attention_mask:32x128",
        "trt_profile_max_shapes": "input_ids:32x128,attention_mask:32x128",
    }
