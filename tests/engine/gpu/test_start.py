"""A GPU serves only after it was proven. All on fakes, since the machines that run these tests have no GPU."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from cappy_engine.batching import Grouping, Scores
from cappy_engine.bundle import TARGETS, Bundle
from cappy_engine.dispatcher import Dispatcher
from cappy_engine.errors import BundleError, DeviceUnavailable, InvalidPair, ScoringError
from cappy_engine.gpu.plan import batch_flops, plan_gpu
from cappy_engine.gpu.sessions import SharedSession
from cappy_engine.parts import PART_PAIRS
from cappy_engine.scorer import Scorer
from cappy_engine.session import INPUTS, Inputs
from cappy_engine.testing import real_tokens, score_of
from cappy_engine.tokenizer import PairTokenizer
from tests.support.bundles import flip_byte, with_value
from tests.support.gpus import (
    BUCKETS,
    BUDGET,
    CPU,
    CUDA,
    EXACT,
    LAYERS,
    LONGEST,
    MODELS,
    ROWS,
    TENSORRT,
    TOKENS,
    FakeRuntime,
    On,
    PlacedSession,
    fails_on,
    inputs_of,
    open_faked,
    write_gpu_bundle,
)
from tests.support.installations import H100

# What opens


@pytest.mark.parametrize(("device", "precision"), MODELS)
def test_a_device_that_is_right_opens_and_scores(sealed: Bundle, root: Path, device: str, precision: str) -> None:
    runtime = FakeRuntime()
    session = open_faked(sealed, root, runtime, device=device, precision=precision)
    assert session.device == device
    assert {model for model, _ in runtime.opened} == {sealed.path / TARGETS[device][precision]}
    rows = [[0, 7, 9, 2], [0, 8, 2]]
    np.testing.assert_allclose(session.run(inputs_of(rows, length=16)), [score_of(row) for row in rows], atol=1e-6)


@pytest.mark.parametrize(("device", "precision"), MODELS)
def test_the_canary_is_run_in_the_batches_of_the_scorer_after_a_full_batch_twice(
    sealed: Bundle, root: Path, tokenizer: PairTokenizer, device: str, precision: str
) -> None:
    runtime = FakeRuntime()
    open_faked(sealed, root, runtime, device=device, precision=precision)
    model = plan_gpu(sealed, device, precision, gpus=[0], max_batch_tokens=BUDGET, there=[H100])
    dispatcher = Dispatcher(PlacedSession(device), model.grouping, pad_token_id=1)
    expected = [(len(batch.rows), batch.length) for batch in dispatcher.plan(np.array(list(map(len, TOKENS)))).batches]
    assert len(expected) > 1
    if device == "cuda":
        (session,) = runtime.sessions
        assert session.shapes == [(2, 64), (2, 64), *expected]
    else:
        for session, bucket in zip(runtime.sessions, BUCKETS, strict=True):
            full = (ROWS[bucket], bucket)
            fitting = sum(len(tokens) <= bucket for tokens in TOKENS)  # each engine scores all that it can take
            most = ROWS[bucket]
            canary = [(min(most, fitting - start), bucket) for start in range(0, fitting, most)]
            assert session.shapes == [full, full, *canary]
    full_batches = [batch for session in runtime.sessions for batch in session.batches[:2]]
    assert all(batch["attention_mask"].all() for batch in full_batches)
    rows = [row for session in runtime.sessions for batch in session.batches[2:] for row in real_tokens(batch)]
    buckets = (LONGEST,) if device == "cuda" else BUCKETS
    assert sorted(rows) == sorted(tokens for bucket in buckets for tokens in TOKENS if len(tokens) <= bucket)
    assert all(set(batch) == set(INPUTS) for session in runtime.sessions for batch in session.batches)


def test_a_device_may_be_off_by_as_much_as_was_measured_at_the_export(sealed: Bundle, root: Path) -> None:
    runtime = FakeRuntime(lambda device, gpu: PlacedSession(device, lambda ids: score_of(ids) + 0.0009))
    open_faked(sealed, root, runtime, precision="fp16")
    with pytest.raises(DeviceUnavailable, match=r"0\.0001 is allowed"):
        open_faked(sealed, root, runtime, precision="fp32")


@pytest.mark.parametrize(
    ("device", "placed", "problem"),
    [
        ("cuda", {CPU: LAYERS}, "CPUExecutionProvider runs 12 MatMul"),
        ("cuda", {CUDA: LAYERS, CPU: Counter({"MatMul": 1})}, "CPUExecutionProvider runs 1 MatMul"),
        ("tensorrt", {TENSORRT: LAYERS, CUDA: Counter({"Gelu": 2})}, "CUDAExecutionProvider runs 2 Gelu"),
        ("tensorrt", {TENSORRT: LAYERS, CPU: LAYERS}, "CPUExecutionProvider runs 12 MatMul"),
        ("tensorrt", {}, "no node at all"),
    ],
)
def test_a_session_whose_work_is_done_elsewhere_is_refused_before_it_runs(
    sealed: Bundle, root: Path, device: str, placed: Mapping[str, Counter[str]], problem: str
) -> None:
    runtime = FakeRuntime(lambda device, gpu: PlacedSession(device, placed=placed))
    with pytest.raises(DeviceUnavailable, match=f"^GPU 1: .*{problem}"):
        open_faked(sealed, root, runtime, device=device, gpus=[1])
    assert [session.batches for session in runtime.sessions] == [[]]


class Clock:
    """Stands still but for what a session adds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedSession(PlacedSession):
    """Its first run takes `first` seconds, and all others `later`."""

    def __init__(self, device: str, clock: Clock, *, first: float, later: float) -> None:
        super().__init__(device)
        self._clock = clock
        self._first, self._later = first, later

    def run(self, inputs: Inputs) -> Scores:
        self._clock.now += self._later if self.batches else self._first
        return super().run(inputs)


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_device_that_is_slower_than_any_gpu_opens_with_a_warning(
    tmp_path: Path, root: Path, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Of so large a model that the fake's own time does not count.
    quick = write_gpu_bundle(tmp_path / "quick", change=with_value(2**20, "model", "hidden_size"))
    flops = batch_flops(quick.manifest.document["model"], 2, 64)
    clock = Clock()
    fast = FakeRuntime(lambda device, gpu: TimedSession(device, clock, first=100.0, later=flops / 2e12))
    open_faked(quick, root, fast, device=device, on=On(clock=clock))  # the first run loads kernels, and counts nothing
    assert not caplog.records
    slow = FakeRuntime(lambda device, gpu: TimedSession(device, clock, first=0.0, later=flops / 2.5e11))
    open_faked(quick, root, slow, device=device, gpus=[1], on=On(clock=clock))
    assert f"GPU 1: device '{device}' computes 0.250 TFLOP/s on a full batch" in caplog.text


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_changed_model_file_is_refused_before_anything_is_opened(sealed: Bundle, root: Path, device: str) -> None:
    name = TARGETS[device]["fp16"]
    flip_byte(sealed.path / name, 3)
    runtime = FakeRuntime()
    with pytest.raises(BundleError, match=f"{name} .* is not the file that was exported"):
        open_faked(sealed, root, runtime, device=device)
    assert not runtime.opened
    open_faked(sealed, root, runtime, device=device, precision="fp32")


@pytest.mark.parametrize("environment", [{}, {"NVIDIA_TF32_OVERRIDE": "1"}, {"NVIDIA_TF32_OVERRIDE": ""}])
def test_fp32_under_tensorrt_needs_an_environment_without_tf32(
    sealed: Bundle, root: Path, environment: Mapping[str, str]
) -> None:
    runtime = FakeRuntime()
    with pytest.raises(DeviceUnavailable, match="unless NVIDIA_TF32_OVERRIDE=0 is in the environment"):
        open_faked(sealed, root, runtime, device="tensorrt", precision="fp32", on=On(environment=environment))
    assert not runtime.opened
    for device, precision in (("tensorrt", "fp16"), ("tensorrt", "int8"), ("cuda", "fp32")):
        open_faked(sealed, root, runtime, device=device, precision=precision, on=On(environment=environment))
    open_faked(sealed, root, runtime, device="tensorrt", precision="fp32", on=On(environment=EXACT))


# Runs that fail


@pytest.mark.parametrize(("length", "runs"), [(LONGEST, 1), (len(TOKENS[3]), 4)])
def test_a_run_that_fails_while_opening_is_repeated_nowhere(sealed: Bundle, root: Path, length: int, runs: int) -> None:
    runtime = FakeRuntime(lambda device, gpu: PlacedSession(device, fails_on(length)))
    with pytest.raises(ScoringError, match=r"^GPU 1: out of GPU memory"):
        open_faked(sealed, root, runtime, gpus=[1, 0])
    (session,) = runtime.sessions
    assert len(session.batches) == runs


def test_several_gpus_are_all_proven_and_share_the_work(sealed: Bundle, root: Path, tokenizer: PairTokenizer) -> None:
    runtime = FakeRuntime()
    session = open_faked(sealed, root, runtime, gpus=[1, 0])
    assert isinstance(session, SharedSession)
    assert session.device == "cuda"
    assert [options["device_id"] for options in runtime.options] == ["1", "0"]
    assert runtime.sessions[0].shapes == runtime.sessions[1].shapes
    pairs = [("word " * count, "yes") for count in range(1, 40)]
    model = plan_gpu(sealed, "cuda", "fp16", gpus=[0, 1], max_batch_tokens=BUDGET, there=[H100] * 2)
    dispatcher = Dispatcher(session, model.grouping, pad_token_id=1, narrow_session=session, callers=2)
    with Scorer(tokenizer, dispatcher) as scorer:
        scores = scorer.score(pairs)
    np.testing.assert_allclose(scores, [score_of(ids.tolist()) for ids in tokenizer.encode(pairs).token_ids], atol=1e-6)


def scorer_beside(tokenizer: PairTokenizer, session: PlacedSession, *, gpus: int = 1) -> Scorer:
    """A scorer on GPUs that are faked, whose CPU is free while they compute."""
    shared = SharedSession(dict.fromkeys(range(gpus), session), device="cuda") if gpus > 1 else None
    return Scorer(
        tokenizer, Dispatcher(shared or session, Grouping(BUDGET), pad_token_id=1, narrow_session=shared, callers=gpus)
    )


@pytest.mark.parametrize("gpus", [1, 2])
def test_parts_that_are_tokenised_beside_the_gpu_give_what_one_call_gives(tokenizer: PairTokenizer, gpus: int) -> None:
    total = 2 * gpus * PART_PAIRS + 9
    pairs = [("" if place % 400 == 7 else f"word {place}", "yes " * (place % 9)) for place in range(total)]
    pairs[gpus * PART_PAIRS + 3] = ("word " * 600, "yes")
    seen: list[tuple[int, int]] = []
    with scorer_beside(tokenizer, PlacedSession("cuda"), gpus=gpus) as scorer:
        generator = (pair for pair in pairs)
        apart = scorer.score_pairs(generator, progress=lambda count, tokens: seen.append((count, tokens)))
    with Scorer(tokenizer, Dispatcher(PlacedSession("cpu"), Grouping(BUDGET), pad_token_id=1)) as scorer:
        whole = scorer.score_pairs(pairs)
    for name in ("scores", "token_counts", "truncated", "without_instruction"):
        np.testing.assert_array_equal(getattr(apart, name), getattr(whole, name))
    assert whole.without_instruction == tuple(range(7, total, 400))
    assert tuple(map(sum, zip(*seen, strict=True))) == (len(pairs), whole.token_counts.sum())


@pytest.mark.parametrize("place", [0, PART_PAIRS - 1, PART_PAIRS, PART_PAIRS + 5])
def test_a_pair_at_fault_in_any_part_is_named_by_its_place(tokenizer: PairTokenizer, place: int) -> None:
    pairs = [(f"word {number}", "yes") for number in range(PART_PAIRS + 8)]
    bad = tokenizer.encode([pairs[place]]).token_ids[0].tolist()

    def score(ids: Sequence[int]) -> float:
        if list(ids) == bad:
            raise ScoringError("id out of range")
        return score_of(ids)

    session = PlacedSession("cuda", score)
    with scorer_beside(tokenizer, session) as scorer:
        with pytest.raises(ScoringError, match=rf"^pair {place}: id out of range"):
            scorer.score(pairs)
        before = len(session.batches)
        long = [*pairs[:place], ("word " * 600, "yes"), *pairs[place + 1 :]]
        with pytest.raises(InvalidPair, match=rf"^pair {place}\b"):
            scorer.score(long, too_long="refuse")
        assert len(session.batches) == before  # refused before anything is computed


def test_a_text_that_cannot_be_tokenised_is_named_in_a_later_part(
    tokenizer: PairTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def encode_batch_fast(self, texts: list[str], **options: object) -> object:
            if "word 515" in texts:
                raise Exception("no such byte")  # noqa: TRY002 - as the library does
            return whole.encode_batch_fast(texts, **options)

    whole = tokenizer._tokenizer
    monkeypatch.setattr(tokenizer, "_tokenizer", Failing())
    pairs = [(f"word {number}", "yes") for number in range(PART_PAIRS + 8)]
    with scorer_beside(tokenizer, PlacedSession("cuda")) as scorer, pytest.raises(InvalidPair, match=r"^pair 515: "):
        scorer.score(pairs)


def test_pairs_are_read_in_the_thread_that_gives_them(tokenizer: PairTokenizer) -> None:
    def pairs() -> Iterator[tuple[str, str]]:
        for number in range(PART_PAIRS + 8):
            assert threading.current_thread() is mine
            yield f"word {number}", "yes"

    mine = threading.current_thread()
    with scorer_beside(tokenizer, PlacedSession("cuda")) as scorer:
        assert scorer.score(pairs()).shape == (PART_PAIRS + 8,)


def test_no_pairs_have_no_scores_on_a_gpu_either(tokenizer: PairTokenizer) -> None:
    with scorer_beside(tokenizer, PlacedSession("cuda")) as scorer:
        nothing: list[tuple[str, str]] = []
        assert scorer.score(pair for pair in nothing).shape == (0,)
