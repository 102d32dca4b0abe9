"""Exports that are broken on purpose: the proof finds them, and nothing is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from cappy_engine.errors import ParityError
from cappy_export import ExportOptions, cpu_models, export
from cappy_export.graphs.build import build_graph
from cappy_export.proof.limits import LIMITS
from tests.support.faults import perturb


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_a_perturbed_weight_is_a_parity_error_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Break each converter on purpose, as a wrong export would."""
    names = {"fp32": "build_graph", "fp16": "convert_to_half", "bf16": "convert_to_bf16", "int8": "quantize"}
    name = names[precision]
    right = getattr(cpu_models, name)

    def wrong(source: Any, path: Path, *others: Any, **options: Any) -> Any:
        if precision in ("bf16", "int8"):
            return right(_perturbed(source), path, *others, **options)
        facts = right(source, path, *others, **options)
        perturb(path, 0.05)
        return facts

    def _perturbed(path: Path) -> Path:
        broken = shutil.copyfile(path, path.with_name("broken.onnx"))
        perturb(broken, 5.0)
        return broken

    monkeypatch.setattr(cpu_models, name, wrong)
    with pytest.raises(ParityError, match=f"{precision}: ") as caught:
        export(checkpoint, tmp_path / "bundle", ExportOptions(precisions=(precision,)))
    assert caught.value.report["precisions"][precision]["worst"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_scores_that_are_all_doubled_are_a_parity_error_though_they_keep_their_order(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    name = {"bf16": "convert_to_bf16", "int8": "quantize"}[precision]
    right = getattr(cpu_models, name)

    def wrong(source: Path, path: Path, *others: Any, **options: Any) -> Any:
        model = onnx.load(source)
        head = next(entry for entry in model.graph.initializer if entry.name == "classifier.out_proj.matrix")
        head.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(head), head.name))
        doubled = source.with_name("doubled.onnx")
        onnx.save(model, doubled)
        return right(doubled, path, *others, **options)

    monkeypatch.setattr(cpu_models, name, wrong)
    with pytest.raises(ParityError, match=f"{precision}: relative error ") as caught:
        export(checkpoint, tmp_path / "bundle", ExportOptions(precisions=(precision,)))
    assert caught.value.report["precisions"][precision]["spearman"] > LIMITS[precision].min_spearman
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_int8_export_proves_the_fp32_graph_it_is_made_from(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error far below what int8 is allowed, in a graph that is not in the bundle."""

    def wrong(source: Any, path: Path) -> Any:
        facts = build_graph(source, path)
        perturb(path, 0.01)
        return facts

    monkeypatch.setattr(cpu_models, "build_graph", wrong)
    with pytest.raises(ParityError, match="fp32: max error"):
        export(checkpoint, tmp_path / "bundle", ExportOptions(precisions=("int8",)))
