"""What is planned for GPUs: the model, the batches, and the batches that prove it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cappy_engine.batching import Grouping, Ids, Padding
from cappy_engine.bundle import EMBEDDED, TARGETS, Bundle, open_bundle
from cappy_engine.dispatcher import Dispatcher
from cappy_engine.errors import BundleError, DeviceUnavailable, PrecisionUnavailable
from cappy_engine.gpu.plan import GpuModel, batch_flops, canary_batches
from cappy_engine.inputs import full_batch
from cappy_engine.session import INPUTS
from tests.support.bundles import Manifest, remove_file, with_value, without
from tests.support.gpus import (
    BUCKETS,
    BUDGET,
    LONGEST,
    PlacedSession,
    planned,
    write_gpu_bundle,
)

# Plans


def test_a_plan_is_what_was_asked_for(sealed: Bundle) -> None:
    assert planned(sealed, gpus=[1, 0]) == GpuModel(sealed, "cuda", "fp16", (1, 0), Grouping(BUDGET, "allowed"))
    tensorrt = planned(sealed, device="tensorrt", precision="int8")
    assert tensorrt == GpuModel(sealed, "tensorrt", "int8", (0,), Grouping(BUDGET, "avoided", BUCKETS))


def test_padding_counts_on_cuda_though_its_graph_removes_it(sealed: Bundle) -> None:
    """Or a batch of one long row and many short ones would take any memory for its embeddings."""
    assert ("cuda", "fp16") in sealed.manifest.unpadded
    batches = canary_batches(np.array([LONGEST, *[2] * 60], dtype=np.int64), planned(sealed))
    assert all(batch.padded_tokens <= BUDGET for batch in batches)


@pytest.mark.parametrize("gpus", [(2,), (-1,), (0, 2), (0, 0), (1, 0, 1)])
def test_gpus_that_are_not_there_or_named_twice_are_refused(sealed: Bundle, gpus: tuple[int, ...]) -> None:
    with pytest.raises(DeviceUnavailable, match="were asked for; there are 2, numbered from 0") as caught:
        planned(sealed, gpus=gpus)
    assert f"GPUs {list(gpus)} " in str(caught.value)


def test_without_a_gpu_there_is_no_plan(sealed: Bundle) -> None:
    with pytest.raises(DeviceUnavailable, match="there are 0"):
        planned(sealed, there=())


@pytest.mark.parametrize(
    "buckets", [[16, 32], [32, 16, 64], [16, 16, 64], [16, 64, 128], [0, 64], [-8, 64], [64, 32]], ids=str
)
def test_buckets_that_do_not_ascend_to_the_longest_pair_are_refused(tmp_path: Path, buckets: list[int]) -> None:
    change = with_value(buckets, "targets", "tensorrt", "buckets")
    bundle = write_gpu_bundle(tmp_path / "bundle", change=change)
    with pytest.raises(BundleError, match="do not ascend to its 64 tokens; export it again") as caught:
        planned(bundle, device="tensorrt")
    assert str(buckets) in str(caught.value)
    planned(bundle, device="cuda")


def test_a_bundle_that_names_no_buckets_has_the_usual_ones(tmp_path: Path) -> None:
    bundle = write_gpu_bundle(tmp_path / "bundle", change=without("targets", "tensorrt", "buckets"))
    assert planned(bundle, device="tensorrt").grouping.buckets == (64,)


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_precision_that_the_bundle_lacks_for_the_device_is_refused_with_how_to_get_it(
    tmp_path: Path, device: str
) -> None:
    name = TARGETS[device]["fp32"]

    def change(document: Manifest) -> None:
        document["targets"][device]["precisions"].remove("fp32")
        remove_file(tmp_path / "bundle", document, name)

    bundle = write_gpu_bundle(tmp_path / "bundle", change=change)
    problem = f"has no fp32 model for {device}, only fp16.*; export it with --precision fp32 --target {device}"
    with pytest.raises(PrecisionUnavailable, match=problem):
        planned(bundle, device=device, precision="fp32")


def test_int8_is_for_tensorrt_alone(sealed: Bundle) -> None:
    with pytest.raises(PrecisionUnavailable, match="has no int8 model for cuda, only fp32, fp16"):
        planned(sealed, precision="int8")


def test_a_full_batch_is_of_real_tokens_that_every_model_has() -> None:
    for pad_token_id, token in ((1, 0), (0, 1), (5, 0)):
        inputs = full_batch(3, 4, pad_token_id=pad_token_id)
        assert set(inputs) == set(INPUTS)
        assert all(values.shape == (3, 4) and values.dtype == np.int64 for values in inputs.values())
        assert (inputs["input_ids"] == token).all()
        assert inputs["attention_mask"].all()
        assert inputs["position_ids"].tolist() == [[pad_token_id + place for place in (1, 2, 3, 4)]] * 3


def test_the_operations_of_a_batch_are_two_for_each_weight_and_token() -> None:
    layer = 4 * 1024**2 + 2 * 4 * 1024**2  # attention's four matrices, and two of the feed-forward
    assert batch_flops({"layers": 24, "hidden_size": 1024}, 3, 512) == 2 * 24 * layer * 3 * 512


# Batches


@st.composite
def lengths_and_buckets(draw: st.DrawFn) -> tuple[Ids, tuple[int, ...]]:
    """Buckets, and lengths of rows that fit into them."""
    buckets = tuple(sorted(draw(st.sets(st.integers(1, 600), min_size=1, max_size=6))))
    lengths = draw(st.lists(st.integers(1, buckets[-1]), max_size=120))
    return np.array(lengths, dtype=np.int64), buckets


budgets = st.integers(1, 3000)
paddings: st.SearchStrategy[Padding] = st.sampled_from(("removed", "avoided", "allowed"))


@settings(deadline=None)
@given(
    case=lengths_and_buckets(),
    budget=budgets,
    asked=st.none() | budgets,
    padding=st.none() | paddings,
    callers=st.integers(1, 4),
)
def test_whatever_is_asked_of_a_call_every_batch_fits_an_engine(
    case: tuple[Ids, tuple[int, ...]],
    budget: int,
    asked: int | None,
    padding: Padding | None,
    callers: int,
) -> None:
    lengths, buckets = case
    session, grouping = PlacedSession("tensorrt"), Grouping(budget, "avoided", buckets)
    dispatcher = Dispatcher(session, grouping, pad_token_id=1, narrow_session=session, callers=callers)
    batches = dispatcher.plan(lengths, grouping.changed(max_batch_tokens=asked, padding=padding)).batches
    dispatcher.close()
    assert sorted(int(row) for batch in batches for row in batch.rows) == list(range(len(lengths)))
    for batch in batches:
        assert batch.length in buckets
        assert 1 <= len(batch.rows) <= max(1, min(budget, asked or budget) // batch.length)
        shorter = max((bucket for bucket in buckets if bucket < batch.length), default=0)
        assert ((shorter < lengths[batch.rows]) & (lengths[batch.rows] <= batch.length)).all()


def grouped(grouping: Grouping) -> GpuModel:
    """A model of the package's own bundle, which is not opened here, with that grouping."""
    return GpuModel(open_bundle(EMBEDDED), "any", "fp16", (0,), grouping)


@pytest.mark.slow
@settings(deadline=None)
@given(case=lengths_and_buckets(), budget=budgets)
def test_every_engine_scores_all_of_the_canary_that_it_can_take(case: tuple[Ids, tuple[int, ...]], budget: int) -> None:
    lengths, buckets = case
    batches = canary_batches(lengths, grouped(Grouping(budget, "avoided", buckets)))
    assert all(len(batch.rows) <= max(1, budget // batch.length) for batch in batches)
    for bucket in buckets:
        scored = [int(row) for batch in batches if batch.length == bucket for row in batch.rows]
        assert scored == [row for row, length in enumerate(lengths) if length <= bucket]
