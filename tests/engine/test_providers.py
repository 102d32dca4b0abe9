"""Options of the GPU providers: what is written is what ONNX Runtime reads, and what cannot work is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cappy_engine.gpu.providers import (
    KNOWN_BOOLEANS,
    PRECISIONS,
    Profile,
    cuda_options,
    parse_shapes,
    profile_shapes,
    session_entries,
    tensorrt_options,
)

INPUTS = ("input_ids", "attention_mask")
CACHE = Path("/somewhere/engines")

names = st.text(min_size=1).filter(lambda name: "," not in name)
lists_of_names = st.lists(names, min_size=1, max_size=5, unique=True)
profiles = st.builds(
    lambda length, rows: Profile(length, max_rows=max(rows), min_rows=min(rows)),
    st.integers(1, 10_000),
    st.tuples(st.integers(1, 10_000), st.integers(1, 10_000)),
)


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


@pytest.mark.parametrize("precision", PRECISIONS)
def test_booleans_of_tensorrt_are_true_and_false_in_python_s_spelling(precision: str) -> None:
    options = tensorrt_options(profile=Profile(64, max_rows=1), inputs=INPUTS, cache=CACHE, precision=precision)
    assert {options[name] for name in KNOWN_BOOLEANS} == {"True", "False"}
    assert {name for name, value in options.items() if value in ("True", "False")} == KNOWN_BOOLEANS
    assert {name for name in options if name.endswith("_enable")} == KNOWN_BOOLEANS


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_graph_alone_decides_on_precision(precision: str) -> None:
    options = tensorrt_options(profile=Profile(64, max_rows=8), inputs=INPUTS, cache=CACHE, precision=precision)
    assert options["trt_fp16_enable"] == options["trt_int8_enable"] == "False"


def test_options_of_tensorrt_are_strings_that_say_what_was_asked_for() -> None:
    options = tensorrt_options(
        gpu=2,
        profile=Profile(128, max_rows=32),
        inputs=INPUTS,
        cache=CACHE,
        precision="fp16",
        optimization_level=5,
        workspace_bytes=2**30,
    )
    assert options == {
        "device_id": "2",
        "trt_fp16_enable": "False",
        "trt_int8_enable": "False",
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(CACHE),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(CACHE),
        "trt_builder_optimization_level": "5",
        "trt_max_workspace_size": "1073741824",
        "trt_cuda_graph_enable": "False",
        "trt_profile_min_shapes": "input_ids:1x128,attention_mask:1x128",
        "trt_profile_opt_shapes": "input_ids:32x128,attention_mask:32x128",
        "trt_profile_max_shapes": "input_ids:32x128,attention_mask:32x128",
    }


@pytest.mark.parametrize("profile", [Profile(64, max_rows=1), Profile(64, max_rows=8, min_rows=8)])
def test_a_cuda_graph_takes_a_fixed_shape(profile: Profile) -> None:
    options = tensorrt_options(profile=profile, inputs=INPUTS, cache=CACHE, precision="fp16", cuda_graph=True)
    assert options["trt_cuda_graph_enable"] == "True"


def test_a_cuda_graph_of_several_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match="shapes must be fixed"):
        tensorrt_options(profile=Profile(64, max_rows=8), inputs=INPUTS, cache=CACHE, precision="fp16", cuda_graph=True)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown precision 'bf16'; choose from fp32, fp16, int8"):
        tensorrt_options(profile=Profile(64, max_rows=8), inputs=INPUTS, cache=CACHE, precision="bf16")


@pytest.mark.parametrize("level", [-1, 6])
def test_a_level_that_tensorrt_does_not_have_is_refused(level: int) -> None:
    with pytest.raises(ValueError, match=f"from 0 to 5, got {level}"):
        tensorrt_options(
            profile=Profile(64, max_rows=8), inputs=INPUTS, cache=CACHE, precision="fp32", optimization_level=level
        )


# Shapes


@given(inputs=lists_of_names, profile=profiles)
def test_shapes_are_read_back_as_they_were_written(inputs: list[str], profile: Profile) -> None:
    options = profile_shapes(inputs, profile)
    assert {name: parse_shapes(text) for name, text in options.items()} == {
        "trt_profile_min_shapes": dict.fromkeys(inputs, (profile.min_rows, profile.length)),
        "trt_profile_opt_shapes": dict.fromkeys(inputs, (profile.max_rows, profile.length)),
        "trt_profile_max_shapes": dict.fromkeys(inputs, (profile.max_rows, profile.length)),
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "input_ids",
        "input_ids:",
        ":1x64",
        "input_ids:1x",
        "input_ids:x64",
        "input_ids:0x64",
        "input_ids:-1x64",
        "input_ids:1x64,",
        "input_ids:1x64\n",
        "input_ids:1 x64",
        "input_ids:1x64,input_ids:1x128",
        "input_ids:1X64",
        "input_ids:\N{ARABIC-INDIC DIGIT ONE}x64",
    ],
)
def test_malformed_shapes_are_an_error_that_shows_them(text: str) -> None:
    with pytest.raises(ValueError, match="is no list of shapes") as caught:
        parse_shapes(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("inputs", [[], [""], ["a", "a"], ["a,b"]])
def test_inputs_that_could_not_be_told_apart_are_refused(inputs: list[str]) -> None:
    with pytest.raises(ValueError, match="different names without commas"):
        profile_shapes(inputs, Profile(64, max_rows=1))


@pytest.mark.parametrize(("length", "max_rows", "min_rows"), [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, 2)])
def test_a_profile_that_takes_nothing_is_refused(length: int, max_rows: int, min_rows: int) -> None:
    with pytest.raises(ValueError, match="takes nothing"):
        Profile(length, max_rows=max_rows, min_rows=min_rows)


# Sessions


def test_a_session_on_a_gpu_tells_which_node_runs_where_and_one_on_the_cpu_has_nothing_to_tell() -> None:
    assert session_entries("cpu") == {}
    for device in ("cuda", "tensorrt"):
        assert session_entries(device) == {"session.record_ep_graph_assignment_info": "1"}
