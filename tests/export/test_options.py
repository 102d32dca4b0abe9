"""Options of an export: what is refused before any work is done, and how little it takes to say them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cappy_engine.errors import ExportError
from cappy_export import ExportOptions, VerifyOptions
from cappy_export.proof.limits import LIMITS, parse_limits


@pytest.mark.slow
def test_the_package_and_its_options_need_neither_torch_nor_onnx() -> None:
    heavy = ["torch", "onnx", "onnxruntime", "transformers", "optimum", "accelerate"]
    code = (
        "import sys, cappy_export, cappy_export.adaptation.recipe, cappy_export.cli\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_lists_have_one_form() -> None:
    options = ExportOptions(precisions=["int8", "fp32", "int8"], targets=["cpu"], pairs="mine.jsonl")  # type: ignore[arg-type]
    assert options == ExportOptions(precisions=("fp32", "int8"), pairs=Path("mine.jsonl"))


def test_each_target_gets_the_precisions_that_it_runs() -> None:
    options = ExportOptions(precisions=("fp32", "fp16", "int8"), targets=("tensorrt", "cuda"))
    assert options.for_cpus == options.kept == ()
    assert options.for_gpus == {"cuda": ("fp32", "fp16"), "tensorrt": ("fp32", "fp16", "int8")}
    assert ExportOptions(precisions=("fp32", "int8"), keep=("int8",)).kept == ("int8",)


@pytest.mark.parametrize("options", [ExportOptions, VerifyOptions])
def test_limits_are_changed_by_name(options: Any) -> None:
    limits = parse_limits(options(limits=("fp32.max_error=0.5",)).limits, spread=1.0)
    assert limits == {**LIMITS, "fp32": dataclasses.replace(LIMITS["fp32"], max_error=0.5)}
    with pytest.raises(ExportError, match=r"limit 'fp32\.error=1' is not PRECISION"):
        options(limits=("fp32.error=1",))


@pytest.mark.parametrize("precisions", [[], ["fp64"], "fp32"])
@pytest.mark.parametrize("options", [ExportOptions, VerifyOptions])
def test_unknown_precisions_are_refused(options: Any, precisions: Any) -> None:
    with pytest.raises(ValueError, match="precisions must be a list from fp32, fp16, bf16, int8"):
        options(precisions=precisions)


@pytest.mark.parametrize("targets", [[], "cuda", ["gpu"]])
def test_unknown_targets_are_refused(targets: Any) -> None:
    with pytest.raises(ValueError, match="targets must be a list from cpu, cuda, tensorrt"):
        ExportOptions(targets=targets)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"buckets": 0}, "buckets must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"float32_products": "layer.0"}, "float32_products must be a list of texts, got str 'layer.0'"),
        ({"keep": []}, "keep must be a list from fp32"),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(field: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExportOptions(**field)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["cuda"], "precisions": ["int8"]}, r"cuda runs fp32, fp16, not int8"),
        ({"targets": ["cuda"], "precisions": ["fp16", "int8"]}, r"int8 does not run on cuda; add a --target"),
        ({"keep": ["fp16"]}, "cannot keep fp16 of fp32; name it as a precision too"),
        ({"float32_products": ["layer.0"]}, "float32 products are for the CPU's int8; name it as a precision too"),
        ({"limits": ["int8.max_error=1"]}, "limit 'int8.max_error=1' changes nothing: measured are fp32"),
        ({"limits": ["fp32.max_error=1"], "precisions": ["fp16"], "targets": ["cuda"]}, "measured are fp16"),
        ({"buckets": 4}, "buckets are TensorRT's lengths; add --target tensorrt"),
    ],
    ids=str,
)
def test_options_that_would_come_to_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        ExportOptions(**options)


@pytest.mark.parametrize(
    "options",
    [{"max_length": "512"}, {"max_length": True}, {"max_length": 0}, {"buckets": 2.5}],
)
def test_a_wrong_number_or_flag_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        ExportOptions(**options)


def test_the_fp32_model_that_others_are_made_from_has_limits_too() -> None:
    limits = ("fp32.max_error=0.5", "int8.max_error=1")
    assert ExportOptions(precisions=("int8",), limits=limits).limits == limits
    assert ExportOptions(precisions=("int8",), targets=("tensorrt",), limits=limits[1:]).limits == limits[1:]
