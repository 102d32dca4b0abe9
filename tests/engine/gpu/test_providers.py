"""Options of the GPU providers: what is written is what ONNX Runtime reads, and what cannot work is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cappy_engine.gpu.providers import Profile, cuda_options, profile_shapes, tensorrt_options

INPUTS = ("input_ids", "attention_mask")
CACHE = Path("/somewhere/engines")

names = st.text(min_size=1).filter(lambda name: "," not in name)
lists_of_names = st.lists(names, min_size=1, max_size=5, unique=True)
profiles = st.builds(Profile, st.integers(1, 10_000), st.integers(1, 10_000))


# CUDA


def test_cuda_computes_in_fp32_unless_told_otherwise() -> None:
    assert cuda_options()["use_tf32"] == "0"
    assert cuda_options(tf32=True)["use_tf32"] == "1"


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
    options = tensorrt_options(gpu=2, profile=Profile(128, max_rows=32), inputs=INPUTS, cache=CACHE)
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


# Shapes


@given(inputs=lists_of_names, profile=profiles)
def test_every_input_has_the_shapes_of_the_profile(inputs: list[str], profile: Profile) -> None:
    assert {name: text.split(",") for name, text in profile_shapes(inputs, profile).items()} == {
        "trt_profile_min_shapes": [f"{name}:1x{profile.length}" for name in inputs],
        "trt_profile_opt_shapes": [f"{name}:{profile.max_rows}x{profile.length}" for name in inputs],
        "trt_profile_max_shapes": [f"{name}:{profile.max_rows}x{profile.length}" for name in inputs],
    }


@pytest.mark.parametrize("inputs", [[], [""], ["a", "a"], ["a,b"]])
def test_inputs_that_could_not_be_told_apart_are_refused(inputs: list[str]) -> None:
    with pytest.raises(ValueError, match="different names without commas"):
        profile_shapes(inputs, Profile(64, max_rows=1))


@pytest.mark.parametrize(("length", "max_rows"), [(0, 1), (1, 0)])
def test_a_profile_that_takes_nothing_is_refused(length: int, max_rows: int) -> None:
    with pytest.raises(ValueError, match="takes nothing"):
        Profile(length, max_rows=max_rows)
