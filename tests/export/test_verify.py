"""`verify` of a model that is not there: refused before PyTorch scores anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from cappy_engine.bundle import MODEL_FILES, TARGETS
from cappy_engine.errors import BundleError, PrecisionUnavailable
from cappy_export import VerifyOptions, verify
from tests.support.bundles import copy_bundle, keep_precisions


def refused(bundle: Path, checkpoint: Path, options: VerifyOptions) -> BundleError:
    """Give the error of a `verify` that said nothing before it."""
    said: list[str] = []
    with pytest.raises(BundleError) as caught:
        verify(bundle, checkpoint, options, say=said.append)
    assert said == []
    return caught.value


def test_a_precision_that_the_bundle_lacks_is_found_before_pytorch_scores(
    checkpoint: Path, bundle: Path, tmp_path: Path
) -> None:
    small = keep_precisions(copy_bundle(tmp_path / "bundle", source=bundle), "fp32", "int8")
    error = refused(small, checkpoint, VerifyOptions(precisions=("fp32", "bf16")))
    assert isinstance(error, PrecisionUnavailable)
    assert "has no bf16 model for cpu, only fp32, int8" in str(error)


@pytest.mark.parametrize(
    ("source", "name", "options"),
    [
        ("bundle", MODEL_FILES["bf16"], VerifyOptions(precisions=("bf16",))),
        ("bundle", MODEL_FILES["bf16"], VerifyOptions()),
        ("gpu_bundle", TARGETS["cuda"]["fp16"], VerifyOptions()),
    ],
    ids=["the one that was asked for", "one of all", "a GPU's"],
)
def test_a_model_whose_file_was_left_out_is_found_before_pytorch_scores(
    source: str, name: str, options: VerifyOptions, checkpoint: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    copy = copy_bundle(tmp_path / "bundle", source=request.getfixturevalue(source))
    (copy / name).unlink()
    assert name in str(refused(copy, checkpoint, options))
