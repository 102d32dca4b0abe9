"""Scores are PyTorch's, in input order, whatever they are scored with; and what is asked for is what runs."""

from __future__ import annotations

import json
import logging
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cappy_engine import Candidate, CappyError, Scorer
from cappy_engine.batching import Grouping, position_ids
from cappy_engine.bundle import MANIFEST, MODEL_FILES, TARGETS, seal, sha256_of
from cappy_engine.cpu.cores import usable_cores
from cappy_engine.errors import BundleError, DeviceUnavailable, InvalidPair, PrecisionUnavailable, ScoringError
from cappy_engine.gpu.installation import Gpu, Installation
from cappy_engine.gpu.plan import GpuModel
from cappy_engine.options import Device, Mode, Precision, choose_precision
from cappy_engine.runner import Runner
from cappy_engine.session import INPUTS
from cappy_engine.tokenizer import PairTokenizer
from cappy_export.proof.pairs import default_pairs

Inputs = Mapping[str, npt.NDArray[np.int64]]

TOLERANCE = 1e-5
PAIRS = default_pairs()
FEW = PAIRS[::6]
LONG = "The sky is blue, and so on. " * 200

needs_cpu_package = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="needs an ONNX Runtime without CUDA"
)


class FakeSession:
    """Scores a row by its token ids alone, and remembers every batch."""

    device = "cpu"

    def __init__(self, score: Callable[[list[int]], float] = lambda ids: float(sum(ids) % 1009)) -> None:
        self.batches: list[Inputs] = []
        self._score = score

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        self.batches.append(inputs)
        lengths = inputs["attention_mask"].sum(axis=1)
        rows = [ids[:length].tolist() for ids, length in zip(inputs["input_ids"], lengths, strict=True)]
        return np.array([self._score(row) for row in rows], dtype=np.float32)


@pytest.fixture(scope="module")
def tokenizer(bundle: Path) -> PairTokenizer:
    return PairTokenizer.from_file(bundle / "tokenizer.json", max_length=512)


@pytest.fixture(scope="module")
def scorer(bundle: Path) -> Iterator[Scorer]:
    with Scorer.open(bundle, device="cpu", precision="fp32") as opened:
        yield opened


@pytest.fixture(scope="module")
def half_scorer(bundle: Path) -> Iterator[Scorer]:
    with Scorer.open(bundle, device="cpu", precision="fp16") as opened:
        yield opened


@pytest.fixture(scope="module")
def int8_scorer(bundle: Path) -> Iterator[Scorer]:
    with Scorer.open(bundle, device="cpu", precision="int8") as opened:
        yield opened


@pytest.fixture(scope="module")
def torch_scores(checkpoint: Path) -> npt.NDArray[np.float32]:
    """Scores of FEW by transformers itself, one pair at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    encode = AutoTokenizer.from_pretrained(checkpoint)
    with torch.inference_mode():
        # A list of one pair: `encode(instruction, "")` would drop the empty response and its separators.
        inputs = [encode([pair], truncation=True, max_length=512, return_tensors="pt") for pair in FEW]
        return np.array([float(model(**row).logits[0, 0]) for row in inputs], dtype=np.float32)


@pytest.fixture
def fp32_bundle(bundle: Path, tmp_path: Path) -> Path:
    """The bundle with its fp32 model only."""
    copy = shutil.copytree(bundle, tmp_path / "fp32")
    document = json.loads((copy / MANIFEST).read_bytes())
    document["precisions"] = ["fp32"]
    for precision in ("fp16", "int8"):
        (copy / MODEL_FILES[precision]).unlink()
        del document["files"][MODEL_FILES[precision]]
    (copy / MANIFEST).write_text(json.dumps(seal(document)))
    return copy


def faked(tokenizer: PairTokenizer, session: FakeSession, *, max_batch_tokens: int = 512) -> Scorer:
    return Scorer(tokenizer, Runner(session, Grouping(max_batch_tokens), pad_token_id=1))


# Scores


def test_fp32_scores_are_those_of_pytorch(scorer: Scorer, torch_scores: npt.NDArray[np.float32]) -> None:
    scores = scorer.score(FEW)
    assert scores.shape == (len(FEW),)
    assert scores.dtype == np.float32
    assert float(torch_scores.std()) > 0.1  # or any scores would do
    np.testing.assert_allclose(scores, torch_scores, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.01), ("int8", 0.2)])
def test_other_precisions_are_close_to_pytorch_but_not_the_same_model(
    bundle: Path, torch_scores: npt.NDArray[np.float32], precision: Precision, tolerance: float
) -> None:
    with Scorer.open(bundle, device="cpu", precision=precision) as opened:
        errors = np.abs(opened.score(FEW) - torch_scores)
    assert TOLERANCE < errors.max() < tolerance


@settings(deadline=None, max_examples=15)
@given(order=st.permutations(range(len(FEW))))
def test_scores_come_back_in_input_order(
    scorer: Scorer, torch_scores: npt.NDArray[np.float32], order: list[int]
) -> None:
    scores = scorer.score([FEW[place] for place in order])
    np.testing.assert_allclose(scores, torch_scores[order], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), max_batch_tokens=st.sampled_from([1, 100, 513, 2000, 100_000]))
def test_a_score_does_not_depend_on_its_neighbours_or_the_budget(
    scorer: Scorer, half_scorer: Scorer, precision: str, seed: int, max_batch_tokens: int
) -> None:
    opened = scorer if precision == "fp32" else half_scorer
    pairs = random.Random(seed).sample(PAIRS, 24)
    alone = [float(opened.score([pair])[0]) for pair in pairs[:6]]
    together = opened.score_pairs(pairs, max_batch_tokens=max_batch_tokens).scores
    np.testing.assert_allclose(together[:6], alone, rtol=0, atol=TOLERANCE)


def test_no_pairs_give_no_scores(scorer: Scorer) -> None:
    scores = scorer.score([])
    assert scores.shape == (0,)
    assert scores.dtype == np.float32


def test_the_same_pair_twice_scores_the_same(scorer: Scorer) -> None:
    scores = scorer.score([("Is the sky blue?", "Yes")] * 5)
    assert np.ptp(scores) <= TOLERANCE


def test_pairs_may_be_lists_or_come_from_a_generator(scorer: Scorer) -> None:
    expected = scorer.score(FEW)
    generator: Any = (pair for pair in FEW)
    np.testing.assert_array_equal(scorer.score([list(pair) for pair in FEW]), expected)
    np.testing.assert_array_equal(scorer.score(generator), expected)


def test_instruction_and_response_are_not_the_same(scorer: Scorer) -> None:
    there, back = scorer.score([("Name a fruit.", "A pear."), ("A pear.", "Name a fruit.")])
    assert abs(there - back) > 100 * TOLERANCE


def test_what_is_no_pair_is_refused_with_its_index(scorer: Scorer) -> None:
    pairs: list[Any] = [("a", "b"), ("a", "\ud800")]
    with pytest.raises(InvalidPair, match=r"^pair 1: response has a lone surrogate"):
        scorer.score(pairs)


# What the session sees


@settings(deadline=None, max_examples=40)
@given(
    pairs=st.lists(st.tuples(st.text("ab c", max_size=80), st.text("ab c", max_size=80)), max_size=30),
    max_batch_tokens=st.integers(1, 300),
)
def test_the_session_sees_batches_within_the_budget_longest_first_padded_on_the_right(
    tokenizer: PairTokenizer, pairs: list[tuple[str, str]], max_batch_tokens: int
) -> None:
    session = FakeSession()
    scores = faked(tokenizer, session, max_batch_tokens=max_batch_tokens).score(pairs)
    lengths = []
    for batch in session.batches:
        ids, mask, types, positions = (batch[name] for name in INPUTS)
        assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
        assert ids.dtype == mask.dtype == types.dtype == positions.dtype == np.int64
        assert ids.shape == mask.shape == types.shape
        np.testing.assert_array_equal(positions, position_ids(ids, pad_token_id=1))
        assert ids.size <= max_batch_tokens or len(ids) == 1
        assert (ids[mask == 0] == 1).all()
        assert (ids[mask == 1] != 1).all()
        assert (np.diff(mask, axis=1) <= 0).all()
        assert mask[0].all()
        assert not types.any()
        lengths += mask.sum(axis=1).tolist()
    encoded = tokenizer.encode(pairs)
    distinct = {tuple(ids.tolist()) for ids in encoded.token_ids}
    assert lengths == sorted(map(len, distinct), reverse=True)  # the same pair is not scored twice
    assert scores.tolist() == [float(ids.sum() % 1009) for ids in encoded.token_ids]


def test_the_budget_of_one_call_replaces_the_scorers_own(tokenizer: PairTokenizer) -> None:
    session = FakeSession()
    opened = faked(tokenizer, session, max_batch_tokens=1)
    pairs = [("a", letter) for letter in "bcdefg"]
    opened.score_pairs(pairs, max_batch_tokens=10_000)
    opened.score_pairs(pairs)
    assert [len(batch["input_ids"]) for batch in session.batches] == [6] + [1] * 6


def test_progress_is_told_of_every_batch_without_padding(tokenizer: PairTokenizer) -> None:
    session, told = FakeSession(), list[tuple[int, int]]()
    scored = faked(tokenizer, session, max_batch_tokens=60).score_pairs(
        FEW, progress=lambda pairs, tokens: told.append((pairs, tokens))
    )
    assert told == [(len(batch["input_ids"]), int(batch["attention_mask"].sum())) for batch in session.batches]
    assert sum(tokens for _, tokens in told) == scored.token_counts.sum()
    assert len(told) > 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_score_is_an_error_that_names_the_pair(tokenizer: PairTokenizer, value: float) -> None:
    bad = tokenizer.encode([("Is it?", "The bad one")]).token_ids[0].tolist()
    session = FakeSession(lambda ids: value if ids == bad else 0.5)
    pairs = [("Is it?", "Yes"), ("Is it, at any rate?", "No"), ("Is it?", "The bad one"), ("Is it?", "Maybe")]
    with pytest.raises(ScoringError, match=rf"the model gave {value} for pair 2,"):
        faked(tokenizer, session).score(pairs)


# Truncation


def test_truncation_is_reported_pair_by_pair(scorer: Scorer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        scored = scorer.score_pairs([("short", "pair"), (LONG, "Yes"), ("short", LONG), (LONG, LONG)])
    assert scored.truncated.tolist() == [False, True, True, True]
    assert scored.token_counts.tolist()[1:] == [512, 512, 512]
    assert scored.token_counts[0] < 512
    assert not caplog.records  # the caller has it in hand


def test_score_logs_a_warning_with_the_count_and_the_first_truncated_pair(
    scorer: Scorer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="cappy_engine"):
        scorer.score([("short", "pair"), ("short", LONG), (LONG, "Yes")])
    assert [record.getMessage() for record in caplog.records] == ["2 of 3 pairs were truncated, the first is pair 1"]


def test_score_logs_nothing_where_nothing_was_truncated(scorer: Scorer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="cappy_engine"):
        scorer.score([("short", "pair")])
    assert not caplog.records


def test_a_ranked_candidate_tells_that_it_was_truncated(scorer: Scorer) -> None:
    ranked = scorer.rank("Is the sky blue?", ["Yes", LONG])
    assert {candidate.index: candidate.is_truncated for candidate in ranked} == {0: False, 1: True}


# Ranking


def test_ranking_is_by_score_best_first(scorer: Scorer) -> None:
    candidates = ["A pear", "granite", "", "A pear, of course", "ocean"]
    scores = scorer.score([("Name a fruit.", candidate) for candidate in candidates])
    ranked = scorer.rank("Name a fruit.", candidates)
    assert [candidate.index for candidate in ranked] == sorted(range(5), key=lambda place: -scores[place])
    for candidate in ranked:
        assert candidate.response == candidates[candidate.index]
        assert candidate.score == float(scores[candidate.index])


def test_the_first_candidate_wins_a_tie(tokenizer: PairTokenizer) -> None:
    best = tokenizer.encode([("q", "best")]).token_ids[0].tolist()
    session = FakeSession(lambda ids: 0.75 if ids == best else 0.25)
    candidates = ["long candidates run in another batch " * 3, "b", "best", "b", "c", "best"]
    ranked = faked(tokenizer, session, max_batch_tokens=16).rank("q", candidates)
    assert ranked == [Candidate(place, candidates[place], 0.75 if place in (2, 5) else 0.25, False)
                      for place in (2, 5, 0, 1, 3, 4)]  # fmt: skip


def test_no_candidates_give_an_empty_ranking(scorer: Scorer) -> None:
    assert scorer.rank("Is the sky blue?", []) == []


def test_one_string_as_candidates_is_refused(scorer: Scorer) -> None:
    with pytest.raises(InvalidPair, match="candidates must be a list of strings, got one str: 'Yes'"):
        scorer.rank("Is the sky blue?", "Yes")


def test_a_bad_candidate_is_refused_with_its_index(scorer: Scorer) -> None:
    candidates: list[Any] = ["Yes", "No", None]
    with pytest.raises(InvalidPair, match="must be a str") as caught:
        scorer.rank("Is the sky blue?", candidates)
    assert caught.value.index == 2


# Opening


@needs_cpu_package
def test_auto_takes_the_cpu_and_fp32_here_and_says_why(bundle: Path) -> None:
    with Scorer.open(str(bundle)) as opened:
        info = opened.info
    assert (info.bundle, info.device, info.precision) == (str(bundle), "cpu", "fp32")
    assert info.device_reason == "auto: this ONNX Runtime has no CUDA provider"
    assert info.precision_reason == "auto: the first of fp32, int8, fp16 in the bundle"
    assert (info.threads, info.max_batch_tokens, info.max_length) == (usable_cores(), 512, 512)
    assert info.padding == "removed"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_what_is_asked_for_is_what_runs(bundle: Path, precision: Precision, tmp_path: Path) -> None:
    with Scorer.open(bundle, device="cpu", precision=precision, threads=1, max_batch_tokens=99) as opened:
        info = opened.info
        scores = opened.score(FEW)
    assert (info.device, info.device_reason) == ("cpu", "asked for")
    assert (info.precision, info.precision_reason) == (precision, "asked for")
    assert (info.threads, info.max_batch_tokens) == (1, 99)
    copy = shutil.copytree(bundle, tmp_path / "copy")  # in which no other model can run
    for other in set(MODEL_FILES) - {precision}:
        (copy / MODEL_FILES[other]).write_bytes(b"\0" * (copy / MODEL_FILES[other]).stat().st_size)
    with Scorer.open(copy, device="cpu", precision=precision, threads=1, max_batch_tokens=99) as opened:
        np.testing.assert_array_equal(opened.score(FEW), scores)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_precision_that_the_bundle_lacks_is_refused(fp32_bundle: Path, precision: Precision) -> None:
    with pytest.raises(PrecisionUnavailable, match=f"has no {precision} model for cpu, only fp32; export it"):
        Scorer.open(fp32_bundle, precision=precision)
    with Scorer.open(fp32_bundle, precision="auto") as opened:
        assert opened.info.precision == "fp32"


@pytest.mark.parametrize(
    ("device", "available", "chosen"),
    [
        ("cpu", ("fp32", "fp16", "int8"), "fp32"),
        ("cpu", ("fp16", "int8"), "int8"),
        ("cpu", ("fp16",), "fp16"),
        ("cuda", ("fp32", "fp16", "int8"), "fp32"),
        ("cuda", ("fp16", "int8"), "fp16"),
        ("tensorrt", ("int8", "fp16", "fp32"), "fp32"),
        ("tensorrt", ("int8", "fp16"), "fp16"),
        ("tensorrt", ("int8",), "int8"),
    ],
)
def test_auto_precision_is_the_first_of_the_documented_order(
    device: str, available: Sequence[str], chosen: str
) -> None:
    precision, reason = choose_precision("auto", device, available)
    assert precision == chosen
    assert reason.startswith("auto: ")
    assert choose_precision("fp32", device, available) == ("fp32", "asked for")


def test_int8_is_refused_where_it_would_run_on_the_cpu_unseen() -> None:
    for asked in ("int8", "auto"):
        with pytest.raises(DeviceUnavailable, match="int8 does not run on cuda, which runs fp32, fp16"):
            choose_precision(asked, "cuda", ("int8",))


@pytest.mark.parametrize("device", ["cpu", "cuda", "tensorrt"])
def test_a_bundle_without_a_model_for_the_device_tells_how_to_get_one(device: str) -> None:
    problem = f"the bundle has no model for {device}; export it with --target {device}"
    with pytest.raises(PrecisionUnavailable, match=problem):
        choose_precision("auto", device, ())


class PretendsToHaveCuda:
    """The real ONNX Runtime, but it lists CUDA where there is none, as onnxruntime-gpu does without a GPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(onnxruntime, name)

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]


class FakeGpus:
    """Four GPUs on which fake sessions open, or `error` is raised; remembers what was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, tuple[int, ...], int]] = []
        self.sessions: list[FakeSession] = []
        self.error: Exception | None = None
        self.there = (Gpu("some GPU", "9.0", 2**30),) * 4

    def find_machine(self, device: str, gpus: Sequence[int] = (0,)) -> SimpleNamespace:
        return SimpleNamespace(installation=Installation({}, (), "13.0", None, self.there, {}, None, {}))

    def open_on_gpus(self, model: GpuModel, machine: SimpleNamespace) -> FakeSession:
        self.asked.append((model.device, model.precision, model.gpus, model.grouping.max_batch_tokens))
        if self.error is not None:
            raise self.error
        self.sessions.append(FakeSession())
        return self.sessions[-1]


@pytest.fixture
def fake_gpus(monkeypatch: pytest.MonkeyPatch) -> FakeGpus:
    gpus = FakeGpus()
    monkeypatch.setattr("cappy_engine.opening.load_runtime", PretendsToHaveCuda)
    monkeypatch.setattr("cappy_engine.opening.find_machine", gpus.find_machine)
    monkeypatch.setattr("cappy_engine.opening.open_on_gpus", gpus.open_on_gpus)
    return gpus


@pytest.fixture
def gpu_bundle(bundle: Path, tmp_path: Path) -> Path:
    """The bundle, with models for GPUs that no device could open: for CUDA no fp32, for TensorRT all."""
    copy = shutil.copytree(bundle, tmp_path / "gpu")
    document = json.loads((copy / MANIFEST).read_bytes())
    document["targets"] = {
        "cuda": {"precisions": ["fp16"], "graphs": {"fp16": {"unpadded": True}}},
        "tensorrt": {"precisions": ["fp32", "fp16", "int8"], "buckets": [16, 64, 512], "graphs": {}},
    }
    pair = {"input_ids": [0, 4, 2], "token_type_ids": [0, 0, 0], "score": 0.5}
    document["canary"] = {"pairs": [pair], "tolerance": {"tensorrt": {"int8": 1e9}}}
    for target, part in document["targets"].items():
        (copy / target).mkdir()
        for precision in part["precisions"]:
            name = TARGETS[target][precision]
            (copy / name).write_bytes(b"model")
            document["files"][name] = {"sha256": sha256_of(copy / name), "bytes": 5}
    (copy / MANIFEST).write_text(json.dumps(seal(document)))
    return copy


def test_auto_takes_cuda_where_it_works(gpu_bundle: Path, fake_gpus: FakeGpus, tokenizer: PairTokenizer) -> None:
    with Scorer.open(gpu_bundle) as opened:
        info = opened.info
        scores = opened.score(FEW)
    assert fake_gpus.asked == [("cuda", "fp16", (0,), 16_384)]
    assert (info.device, info.device_reason) == ("cuda", "auto: CUDA works here")
    assert (info.precision, info.precision_reason) == ("fp16", "auto: the first of fp32, fp16 in the bundle")
    assert (info.mode, info.mode_reason) == ("latency", "one session")
    assert (info.padding, info.max_batch_tokens, info.gpus, info.buckets) == ("allowed", 16_384, (0,), ())
    assert all(batch["input_ids"].size <= 16_384 for batch in fake_gpus.sessions[0].batches)
    assert scores.tolist() == [float(ids.sum() % 1009) for ids in tokenizer.encode(FEW).token_ids]


def test_tensorrt_runs_in_buckets_on_all_of_the_gpus(
    gpu_bundle: Path, fake_gpus: FakeGpus, tokenizer: PairTokenizer
) -> None:
    with Scorer.open(gpu_bundle, device="tensorrt", gpus=[2, 0], max_batch_tokens=1024) as opened:
        info = opened.info
        scores = opened.score_pairs(FEW, max_batch_tokens=100_000, padding="allowed").scores
    assert fake_gpus.asked == [("tensorrt", "fp32", (2, 0), 1024)]
    assert (info.device, info.device_reason) == ("tensorrt", "asked for")
    assert info.mode_reason == "one session on each of 2 GPUs"
    assert (info.padding, info.gpus, info.buckets) == ("avoided", (2, 0), (16, 64, 512))
    shapes = {batch["input_ids"].shape for batch in fake_gpus.sessions[0].batches}
    assert {length for _, length in shapes} <= {16, 64, 512}
    assert all(rows * length <= 1024 for rows, length in shapes)
    assert scores.tolist() == [float(ids.sum() % 1009) for ids in tokenizer.encode(FEW).token_ids]


def test_auto_passes_over_a_gpu_that_cannot_be_used_and_says_why(
    gpu_bundle: Path, fake_gpus: FakeGpus, caplog: pytest.LogCaptureFixture
) -> None:
    fake_gpus.error = DeviceUnavailable("device 'cuda' gives wrong scores:\n    0.5")
    with Scorer.open(gpu_bundle, device="auto") as opened:
        assert (opened.info.device, opened.info.precision, opened.info.gpus) == ("cpu", "fp32", ())
        assert opened.info.device_reason == "auto: device 'cuda' gives wrong scores: 0.5"
    assert "using the CPU, since device 'cuda' gives wrong scores" in caplog.text
    for device, precision in (("cuda", "fp16"), ("tensorrt", "fp32")):
        with pytest.raises(DeviceUnavailable, match="gives wrong scores"):
            Scorer.open(gpu_bundle, device=cast(Device, device), precision=cast(Precision, precision))


def test_auto_takes_the_cpu_where_the_bundle_has_no_model_for_cuda(
    bundle: Path, gpu_bundle: Path, fake_gpus: FakeGpus
) -> None:
    for path, precision, reason in (
        (bundle, "auto", "the bundle has no model for cuda; export it with --target cuda"),
        (gpu_bundle, "fp32", "has no fp32 model for cuda, only fp16; export it with --precision fp32 --target cuda"),
        (gpu_bundle, "int8", "int8 does not run on cuda, which runs fp32, fp16"),
    ):
        with Scorer.open(path, precision=cast(Precision, precision)) as opened:
            assert opened.info.device == "cpu"
            assert opened.info.device_reason.startswith("auto: ")
            assert opened.info.device_reason.endswith(reason)
    with pytest.raises(PrecisionUnavailable, match="no model for cuda; export it with --target cuda"):
        Scorer.open(bundle, device="cuda")
    assert not fake_gpus.sessions


def test_auto_does_not_hide_that_the_bundle_or_a_run_is_at_fault(gpu_bundle: Path, fake_gpus: FakeGpus) -> None:
    for error in (BundleError("cuda/model_fp16.onnx is not the file that was exported"), ScoringError("out of memory")):
        fake_gpus.error = error
        with pytest.raises(type(error), match=str(error)):
            Scorer.open(gpu_bundle)


def test_an_exact_winner_is_found_on_the_same_gpus(gpu_bundle: Path, fake_gpus: FakeGpus) -> None:
    candidates = ["A pear", "granite", "ocean"]
    with Scorer.open(gpu_bundle, device="tensorrt", precision="int8", gpus=[1], max_batch_tokens=600) as opened:
        ranked = opened.rank("Name a fruit.", candidates, exact_winner=True)
    assert fake_gpus.asked == [("tensorrt", "int8", (1,), 600), ("tensorrt", "fp32", (1,), 600)]
    assert all(candidate.is_exact for candidate in ranked)


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
@needs_cpu_package
def test_a_gpu_asked_for_by_name_does_not_fall_back(bundle: Path, gpu_bundle: Path, device: Device) -> None:
    provider = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}[device]
    for path in (bundle, gpu_bundle):  # that there is no device comes before that there is no model
        with pytest.raises(DeviceUnavailable, match=f"(?s)device '{device}' cannot be used here:.* no {provider}: "):
            Scorer.open(path, device=device)


def test_cuda_that_is_listed_but_has_no_driver_is_refused_by_name_and_passed_over_by_auto(
    gpu_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    providers = tuple(PretendsToHaveCuda().get_available_providers())
    without_driver = Installation({"onnxruntime-gpu": "9.9"}, providers, None, "no libcuda.so.1", (), {}, "9.9", {})
    for module in ("gpu.start", "opening"):
        monkeypatch.setattr(f"cappy_engine.{module}.load_runtime", PretendsToHaveCuda)
    monkeypatch.setattr("cappy_engine.gpu.start.inspect_installation", lambda **asked: without_driver)
    with pytest.raises(DeviceUnavailable, match=r"device 'cuda' cannot be used here:\n  driver: no libcuda\.so\.1\n"):
        Scorer.open(gpu_bundle, device="cuda")
    with Scorer.open(gpu_bundle, device="auto") as opened:
        assert opened.info.device == "cpu"
        assert opened.info.device_reason.startswith("auto: device 'cuda' cannot be used here: driver: no libcuda.so.1")
        assert "\n" not in opened.info.device_reason
    assert "using the CPU, since device 'cuda' cannot be used here" in caplog.text


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"gpus": [1]}, r"gpus \[1\] need a device that has some: cuda or tensorrt, not 'auto'"),
        ({"device": "cpu", "gpus": [0]}, r"gpus \[0\] need a device that has some"),
        ({"device": "gpu"}, "unknown device 'gpu'; choose from auto, cpu, cuda"),
        ({"precision": "bf16"}, "unknown precision 'bf16'; choose from auto, fp32, fp16, int8"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"threads": -2}, "threads must be at least 1, got -2"),
        ({"max_batch_tokens": 0}, "max_batch_tokens must be at least 1, got 0"),
        ({"max_batch_tokens": -1}, "max_batch_tokens must be at least 1, got -1"),
    ],
)
def test_an_option_out_of_range_is_a_wrong_argument(bundle: Path, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Scorer.open(bundle, **options)


@pytest.mark.parametrize("max_batch_tokens", [0, -1])
def test_a_budget_out_of_range_for_one_call_is_a_wrong_argument(scorer: Scorer, max_batch_tokens: int) -> None:
    with pytest.raises(ValueError, match="max_batch_tokens must be at least 1"):
        scorer.score_pairs([("a", "b")], max_batch_tokens=max_batch_tokens)


def test_an_unknown_option_is_an_error(bundle: Path) -> None:
    options: dict[str, Any] = {"batch_size": 8}
    with pytest.raises(TypeError, match="batch_size"):
        Scorer.open(bundle, **options)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="it does not exist"):
        Scorer.open(tmp_path / "nowhere")


# Closing


def test_a_closed_scorer_refuses_to_score(bundle: Path) -> None:
    opened = Scorer.open(bundle, device="cpu")
    opened.score([("a", "b")])
    opened.close()
    opened.close()
    with pytest.raises(ScoringError, match=r"this scorer was closed; open another one with Scorer\.open"):
        opened.score([("a", "b")])
    with pytest.raises(CappyError):
        opened.rank("a", ["b"])


@pytest.mark.parametrize("call", [lambda scorer: scorer.score([]), lambda scorer: scorer.rank("a", [])])
def test_a_closed_scorer_refuses_even_nothing(bundle: Path, call: Callable[[Scorer], object]) -> None:
    opened = Scorer.open(bundle, device="cpu")
    opened.close()
    with pytest.raises(ScoringError, match="closed"):
        call(opened)


def test_leaving_the_context_closes_the_scorer_also_on_an_error(bundle: Path) -> None:
    opened = Scorer.open(bundle, device="cpu")
    with pytest.raises(InvalidPair), opened as entered:
        entered.rank("a", "b")
    assert entered is opened
    with pytest.raises(ScoringError, match="closed"):
        opened.score([("a", "b")])


def test_a_scorer_that_was_not_opened_from_a_bundle_has_no_info(tokenizer: PairTokenizer) -> None:
    with pytest.raises(AttributeError, match=r"not made by Scorer\.open"):
        _ = faked(tokenizer, FakeSession()).info


# Modes, companions and exact winners


class Recorder(FakeSession):
    """Also remembers which thread ran each batch, fails on one that holds `bad`, and at first waits for two others."""

    def __init__(self, bad: list[int] | None = None) -> None:
        super().__init__()
        self.threads: set[str] = set()
        self._bad = bad
        self._others = threading.Barrier(3)

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        name = threading.current_thread().name
        if name not in self.threads:
            self.threads.add(name)
            self._others.wait(timeout=30)  # breaks if batches ran one after the other
        if self._bad is not None and self._bad in [row.tolist()[: len(self._bad)] for row in inputs["input_ids"]]:
            raise ScoringError("this batch is bad")
        return super().run(inputs)


def with_callers(tokenizer: PairTokenizer, wide: FakeSession, narrow: FakeSession) -> Scorer:
    return Scorer(tokenizer, Runner(wide, Grouping(100), pad_token_id=1, narrow_session=narrow, callers=3))


def test_several_batches_run_beside_each_other_and_one_alone_has_all_threads(tokenizer: PairTokenizer) -> None:
    wide, narrow = FakeSession(), Recorder()
    with with_callers(tokenizer, wide, narrow) as opened:
        scores = opened.score(FEW)
        assert not wide.batches
        assert len(narrow.batches) > 3
        assert len(narrow.threads) == 3
        opened.score(FEW[:1])
        assert len(wide.batches) == 1
    np.testing.assert_array_equal(scores, faked(tokenizer, FakeSession()).score(FEW))


def test_where_no_session_has_all_threads_uneven_batches_run_beside_each_other_too(tokenizer: PairTokenizer) -> None:
    narrow = Recorder()
    with with_callers(tokenizer, narrow, narrow) as opened:
        opened.score([("word " * 90, "a"), ("word " * 30, "b"), ("c", "d")])
    assert len(narrow.threads) == 3


def test_an_error_in_one_of_several_batches_is_raised(tokenizer: PairTokenizer) -> None:
    bad = tokenizer.encode(FEW[3:4]).token_ids[0].tolist()
    with (
        with_callers(tokenizer, FakeSession(), Recorder(bad)) as opened,
        pytest.raises(ScoringError, match="this batch is bad"),
    ):
        opened.score(FEW)


@pytest.mark.parametrize("mode", ["latency", "throughput", "both"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_every_mode_gives_the_same_scores(bundle: Path, mode: Mode, precision: Precision) -> None:
    with (
        Scorer.open(bundle, device="cpu", precision=precision, threads=1) as one,
        Scorer.open(bundle, device="cpu", precision=precision, threads=2, mode=mode) as opened,
    ):
        assert (opened.info.mode, opened.info.mode_reason) == (mode, "asked for")
        np.testing.assert_allclose(opened.score(FEW), one.score(FEW), rtol=0, atol=TOLERANCE)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), max_batch_tokens=st.sampled_from([1, 100, 513, 2000, 100_000]))
def test_in_int8_too_a_pair_scores_the_same_alone_and_in_any_company(
    int8_scorer: Scorer, seed: int, max_batch_tokens: int
) -> None:
    pairs = random.Random(seed).sample(PAIRS, 12)
    together = int8_scorer.score_pairs(pairs, max_batch_tokens=max_batch_tokens).scores
    alone = np.concatenate([int8_scorer.score([pair]) for pair in pairs])
    np.testing.assert_allclose(together, alone, rtol=0, atol=TOLERANCE)


def test_a_pair_that_comes_twice_is_scored_once(tokenizer: PairTokenizer) -> None:
    session, told = FakeSession(), list[tuple[int, int]]()
    pairs = [("a", "b"), ("c", "d"), ("a", "b"), ("a", "b")]
    scored = faked(tokenizer, session).score_pairs(pairs, progress=lambda *counts: told.append(counts))
    assert [len(batch["input_ids"]) for batch in session.batches] == [2]
    assert scored.scores[0] == scored.scores[2] == scored.scores[3] != scored.scores[1]
    assert told == [(4, int(scored.token_counts.sum()))]


def test_an_exact_winner_is_fp32s_and_only_near_candidates_are_scored_again(bundle: Path, scorer: Scorer) -> None:
    error = json.loads((bundle / MANIFEST).read_bytes())["parity"]["precisions"]["int8"]["max_error"]
    with Scorer.open(bundle, device="cpu", precision="int8") as opened:
        for instruction in ("Is the sky blue?", "Name a fruit.", ""):
            candidates = [f"{response} {place}" for place, (_, response) in enumerate(FEW[:12])]
            plain = opened.rank(instruction, candidates)
            ranked = opened.rank(instruction, candidates, exact_winner=True)
            exact = scorer.rank(instruction, candidates)
            assert ranked[0].index == exact[0].index
            near = {candidate.index for candidate in plain if candidate.score >= plain[0].score - 2 * error}
            assert {candidate.index for candidate in ranked if candidate.is_exact} == (near if len(near) > 1 else set())
            by_index = {candidate.index: candidate.score for candidate in exact}
            for candidate in ranked[: len(near)]:
                if candidate.is_exact:
                    assert candidate.score == pytest.approx(by_index[candidate.index], abs=TOLERANCE)
            assert sorted(candidate.index for candidate in ranked) == list(range(len(candidates)))


def test_an_exact_winner_needs_nothing_more_in_fp32(scorer: Scorer) -> None:
    candidates = ["Yes", "No", "Perhaps"]
    assert scorer.rank("Is it?", candidates, exact_winner=True) == scorer.rank("Is it?", candidates)


def test_an_exact_winner_needs_an_fp32_model(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "int8")
    document = json.loads((copy / MANIFEST).read_bytes())
    document["precisions"] = ["int8"]
    for precision in ("fp32", "fp16"):
        (copy / MODEL_FILES[precision]).unlink()
        del document["files"][MODEL_FILES[precision]]
    document["parity"]["precisions"]["int8"]["max_error"] = 100.0
    (copy / MANIFEST).write_text(json.dumps(seal(document)))
    with (
        Scorer.open(copy, device="cpu") as opened,
        pytest.raises(PrecisionUnavailable, match="has no fp32 model"),
    ):
        opened.rank("Is it?", ["Yes", "No"], exact_winner=True)


def test_a_closed_scorer_runs_nothing_in_any_mode(bundle: Path) -> None:
    opened = Scorer.open(bundle, device="cpu", precision="int8", threads=2, mode="both")
    opened.close()
    opened.close()
    with pytest.raises(ScoringError, match="was closed"):
        opened.score(FEW)
