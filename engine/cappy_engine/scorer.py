"""How a pair becomes a score: tokenise, plan batches, run them, put the scores back in order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from cappy_engine import batching
from cappy_engine.bundle import EMBEDDED, PRECISIONS, Bundle, open_bundle
from cappy_engine.errors import DeviceUnavailable, InvalidPair, ScoringError
from cappy_engine.session import DEVICES, Session, load_runtime, open_session
from cappy_engine.tokenizer import EncodedPairs, PairTokenizer

Scores = npt.NDArray[np.float32]

AUTO_PRECISIONS = {"cpu": ("fp32", "int8", "fp16"), "cuda": ("fp32", "fp16"), "tensorrt": ("fp32", "fp16")}
"""What precision="auto" takes, first found first, and what a device runs at all. Exact scores come before fast ones:
int8 changes scores by more than rounding and must be asked for; fp16 is slow on a CPU, and not measured on CUDA."""

BATCH_TOKENS = {"cpu": 512, "cuda": 16_384}
"""Default `max_batch_tokens`: on CPUs larger batches lose more to padding and cache misses than they win."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScorerInfo:
    """What was chosen, and why; `threads` is None where ONNX Runtime takes one for each physical core."""

    bundle: str
    device: str
    device_reason: str
    precision: str
    precision_reason: str
    threads: int | None
    max_batch_tokens: int
    max_length: int


@dataclass(frozen=True)
class Scored:
    """Scores (n,) float32 in input order, `token_counts` (n,) int64 and `truncated` (n,) bool."""

    scores: Scores
    token_counts: npt.NDArray[np.int64]
    truncated: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Candidate:
    """A ranked candidate: its place in the list that was passed, its text, its score, whether it was truncated."""

    index: int
    response: str
    score: float
    is_truncated: bool


class Scorer:
    """Scores pairs with one model on one device. Open one with `Scorer.open`."""

    def __init__(
        self,
        *,
        tokenizer: PairTokenizer,
        session: Session,
        pad_token_id: int,
        max_batch_tokens: int,
        info: ScorerInfo | None = None,
    ) -> None:
        _check_positive(max_batch_tokens=max_batch_tokens)
        self._tokenizer = tokenizer
        self._session: Session | None = session
        self._pad_token_id = pad_token_id
        self._max_batch_tokens = max_batch_tokens
        self._info = info

    @classmethod
    def open(
        cls,
        bundle: str | Path | None = None,
        *,
        device: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        max_batch_tokens: int | None = None,
    ) -> Self:
        """Open a bundle for scoring; None is cappy-mini, the small model in the package.

        `device` is "cpu", "cuda" or "auto" (CUDA where it really works, else the CPU). `precision` is "fp32", "fp16",
        "int8" or "auto" (the first that the bundle has of fp32, int8, fp16 on the CPU; of fp32, fp16 on CUDA).
        What is asked for by name is what runs, or an error is raised; what "auto" chose stands in `info`.
        `threads` is the number of CPU threads (None: one for each physical core). A batch holds at most
        `max_batch_tokens` tokens, padding included (None: 512 on the CPU, 16,384 on CUDA).

        Raises BundleError, PrecisionUnavailable, DeviceUnavailable, InstallationError, and ValueError for options out
        of range.
        """
        _check_options(device, precision, threads)
        opened = open_bundle(EMBEDDED if bundle is None else bundle)
        session, chosen, reasons = _open_session(opened, device, precision, threads)
        budget = BATCH_TOKENS[session.device] if max_batch_tokens is None else max_batch_tokens
        manifest = opened.manifest
        info = ScorerInfo(
            bundle="cappy-mini, the package's own small model" if bundle is None else str(bundle),
            device=session.device,
            device_reason=reasons[0],
            precision=chosen,
            precision_reason=reasons[1],
            threads=threads,
            max_batch_tokens=budget,
            max_length=manifest.max_length,
        )
        return cls(
            tokenizer=PairTokenizer.from_file(opened.file("tokenizer.json"), max_length=manifest.max_length),
            session=session,
            pad_token_id=manifest.pad_token_id,
            max_batch_tokens=budget,
            info=info,
        )

    @property
    def info(self) -> ScorerInfo:
        """What this scorer runs, and why that was chosen; only a scorer from `Scorer.open` knows."""
        if self._info is None:
            raise AttributeError("this scorer was not made by Scorer.open")
        return self._info

    def score(self, pairs: Sequence[Sequence[str]]) -> Scores:
        """Score (instruction, response) pairs: (n,) float32, in input order; about 0 to 1, not clipped.

        A pair too long for the model is truncated as in training, and a warning is logged with the count; use
        `score_pairs` to learn which ones.

            >>> scorer.score([("Is the sky blue?", "Yes"), ("Is the sky blue?", "No")])
            array([0.93, 0.08], dtype=float32)

        Raises InvalidPair (with the index) and ScoringError.
        """
        scored = self.score_pairs(pairs)
        if scored.truncated.any():
            count, first = int(scored.truncated.sum()), int(scored.truncated.argmax())
            log.warning("%d of %d pairs were truncated, the first is pair %d", count, len(scored.scores), first)
        return scored.scores

    def score_pairs(
        self,
        pairs: Sequence[Sequence[str]],
        *,
        max_batch_tokens: int | None = None,
        progress: Callable[[int, int], object] = lambda pairs, tokens: None,
    ) -> Scored:
        """Like `score`, with the number of tokens and the truncation of every pair.

        `max_batch_tokens` replaces the scorer's own for this call. `progress` is called after every batch with how many
        pairs and tokens (without padding) it held.
        """
        if self._session is None:
            raise ScoringError("this scorer was closed; open another one with Scorer.open")
        budget = self._max_batch_tokens if max_batch_tokens is None else max_batch_tokens
        _check_positive(max_batch_tokens=budget)
        encoded = self._tokenizer.encode(pairs)
        scores = np.empty(len(encoded.lengths), dtype=np.float32)
        for batch in batching.plan_batches(encoded.lengths, max_batch_tokens=budget):
            scores[batch.rows] = self._run(self._session, encoded, batch)
            progress(len(batch.rows), int(encoded.lengths[batch.rows].sum()))
        return Scored(scores, encoded.lengths, encoded.truncated)

    def rank(self, instruction: str, candidates: Sequence[str]) -> list[Candidate]:
        """Score each candidate as the response to `instruction`, best first; the first wins a tie.

        Raises InvalidPair, whose index is the candidate's, and ScoringError.
        """
        if isinstance(candidates, str):
            raise InvalidPair(0, f"candidates must be a list of strings, got one str: {candidates[:40]!r}")
        scored = self.score_pairs([(instruction, candidate) for candidate in candidates])
        order = np.argsort(-scored.scores, kind="stable")
        return [
            Candidate(int(place), candidates[place], float(scored.scores[place]), bool(scored.truncated[place]))
            for place in order
        ]

    def close(self) -> None:
        """Free the model; scoring afterwards raises ScoringError."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, session: Session, encoded: EncodedPairs, batch: batching.Batch) -> Scores:
        scores = session.run(
            {
                "input_ids": batching.pad(encoded.token_ids, batch, value=self._pad_token_id),
                "attention_mask": batching.attention_mask(encoded.lengths, batch),
                "token_type_ids": batching.pad(encoded.type_ids, batch, value=0),
            }
        )
        if not np.isfinite(scores).all():
            row = int(batch.rows[np.flatnonzero(~np.isfinite(scores))[0]])
            raise ScoringError(f"the model gave {scores[~np.isfinite(scores)][0]} for pair {row}, which is no score")
        return scores


def _check_options(device: str, precision: str, threads: int | None) -> None:
    if device not in ("auto", *DEVICES):
        raise ValueError(f"unknown device {device!r}; choose from auto, {', '.join(DEVICES)}")
    if precision not in ("auto", *PRECISIONS):
        raise ValueError(f"unknown precision {precision!r}; choose from auto, {', '.join(PRECISIONS)}")
    if threads is not None:
        _check_positive(threads=threads)


def _check_positive(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _open_session(
    bundle: Bundle, device: str, precision: str, threads: int | None
) -> tuple[Session, str, tuple[str, str]]:
    """The session, its precision, and the reasons for device and precision."""
    if device != "auto":
        chosen, reason = choose_precision(precision, device, bundle.manifest.precisions)
        return open_session(bundle.model(chosen), device=device, threads=threads), chosen, ("asked for", reason)
    why_not = "this ONNX Runtime has no CUDA provider"
    if "CUDAExecutionProvider" in load_runtime().get_available_providers():
        try:
            session, chosen, (_, reason) = _open_session(bundle, "cuda", precision, threads)
            return session, chosen, ("auto: CUDA works here", reason)
        except DeviceUnavailable as error:
            why_not = str(error)
            log.warning("device auto: using the CPU, since %s", why_not)
    session, chosen, (_, reason) = _open_session(bundle, "cpu", precision, threads)
    return session, chosen, (f"auto: {why_not}", reason)


def choose_precision(asked: str, device: str, available: Sequence[str]) -> tuple[str, str]:
    """The precision to run, and why: `asked`, or for "auto" the first of AUTO_PRECISIONS that is available.

    Raises DeviceUnavailable if the device does not run that precision.
    """
    order = AUTO_PRECISIONS[device]
    found = asked if asked != "auto" else next((name for name in order if name in available), available[0])
    if found not in order:
        raise DeviceUnavailable(f"{found} runs on the CPU only: most of its operators have no {device} version")
    return found, "asked for" if asked != "auto" else f"auto: the first of {', '.join(order)} in the bundle"
