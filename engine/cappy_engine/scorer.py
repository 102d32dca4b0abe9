"""How a pair becomes a score: tokenise, plan batches, run them, put the scores back in order."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from cappy_engine import batching
from cappy_engine.buckets import bucket_lengths
from cappy_engine.bundle import EMBEDDED, Bundle, open_bundle
from cappy_engine.errors import BundleError, InvalidPair, ScoringError
from cappy_engine.gpu.canary import read_canary
from cappy_engine.opening import Opened, ScorerInfo, check_positive, open_for_scoring
from cappy_engine.session import Session, model_inputs
from cappy_engine.tokenizer import EncodedPairs, PairTokenizer

Scores = npt.NDArray[np.float32]

CLOSED = "this scorer was closed; open another one with Scorer.open"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """Scores (n,) float32 in input order, `token_counts` (n,) int64 and `truncated` (n,) bool."""

    scores: Scores
    token_counts: npt.NDArray[np.int64]
    truncated: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Candidate:
    """A ranked candidate: its place in the list that was passed, its text, its score, whether it was truncated, and
    whether `exact_winner` had it scored again in fp32 (its score is then that one)."""

    index: int
    response: str
    score: float
    is_truncated: bool
    is_exact: bool = False


class Scorer:
    """Scores pairs with one model on one device. Open one with `Scorer.open`."""

    def __init__(
        self,
        *,
        tokenizer: PairTokenizer,
        session: Session,
        pad_token_id: int,
        max_batch_tokens: int,
        padding: batching.Padding = "allowed",
        buckets: Sequence[int] = (),
        narrow_session: Session | None = None,
        callers: int = 1,
        info: ScorerInfo | None = None,
        exact: _Exact | None = None,
    ) -> None:
        """`session` runs a batch alone; where there are several, `narrow_session` runs `callers` of them at a time.

        With `buckets`, which ascend to the tokenizer's longest pair, rows are padded to the next of these lengths.
        """
        check_positive(max_batch_tokens=max_batch_tokens, callers=callers)
        self._tokenizer = tokenizer
        self._session: Session | None = session
        self._narrow_session = narrow_session if callers > 1 else None
        self._callers = ThreadPoolExecutor(callers, "cappy") if self._narrow_session is not None else None
        self._workers = callers if self._narrow_session is not None else 1
        self._pad_token_id = pad_token_id
        self._max_batch_tokens = max_batch_tokens
        self._padding = padding
        self._buckets = tuple(buckets)
        self._info = info
        self._exact = exact

    @classmethod
    def open(
        cls,
        bundle: str | Path | None = None,
        *,
        device: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        mode: str = "auto",
        max_batch_tokens: int | None = None,
        gpus: Sequence[int] | None = None,
    ) -> Self:
        """Open a bundle for scoring; None is cappy-mini, the small model in the package.

        `device` is "cpu", "cuda", "tensorrt" or "auto" (CUDA where the bundle has a model for it and it really works,
        else the CPU). `precision` is "fp32", "fp16", "int8" or "auto" (the first that the bundle has of fp32, int8,
        fp16 on the CPU; of fp32, fp16 on CUDA; of fp32, fp16, int8 on TensorRT). `gpus` are the numbers of the GPUs
        that share the work (None: the first).
        What is asked for by name is what runs, or an error is raised; what "auto" chose stands in `info`.
        `threads` is the number of CPU threads (None: one for each physical core that this process and its container
        may use). `mode` is "latency" (all threads on one batch), "throughput" (one thread for each of several batches),
        "both" (two sessions; the second is opened when there first are several batches, and holds the weights again) or
        "auto" (what `cappy tune` measured here, else "both" for models up to 512 MB and "latency" for larger ones);
        with one thread, or off the CPU, they are one. A batch holds at most `max_batch_tokens` tokens (None: as tuned,
        else 512 on the CPU and 16,384 on GPUs).

        Raises BundleError, PrecisionUnavailable, DeviceUnavailable, InstallationError, ScoringError where a GPU fails
        on its first batches, and ValueError for options out of range.
        """
        found = open_bundle(EMBEDDED if bundle is None else bundle)
        opened = open_for_scoring(
            found,
            device=device,
            precision=precision,
            threads=threads,
            mode=mode,
            max_batch_tokens=max_batch_tokens,
            name="cappy-mini, the package's own small model" if bundle is None else str(bundle),
            gpus=gpus,
        )
        tokenizer = PairTokenizer.from_file(found.file("tokenizer.json"), max_length=opened.info.max_length)
        return cls._of(found, opened, tokenizer, exact=_Exact(found, opened.info, tokenizer))

    @classmethod
    def _of(cls, bundle: Bundle, opened: Opened, tokenizer: PairTokenizer, *, exact: _Exact | None) -> Self:
        return cls(
            tokenizer=tokenizer,
            session=opened.session,
            pad_token_id=bundle.manifest.pad_token_id,
            max_batch_tokens=opened.info.max_batch_tokens,
            padding=opened.info.padding,
            buckets=opened.info.buckets,
            narrow_session=opened.narrow_session,
            callers=opened.callers,
            info=opened.info,
            exact=exact,
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
        padding: batching.Padding | None = None,
        progress: Callable[[int, int], object] = lambda pairs, tokens: None,
    ) -> Scored:
        """Like `score`, with the number of tokens and the truncation of every pair.

        `max_batch_tokens` and `padding` replace the scorer's own for this call. `progress` is called after every batch
        with how many pairs and tokens (without padding) it held.
        """
        if self._session is None:
            raise ScoringError(CLOSED)
        encoded = self._tokenizer.encode(pairs)
        firsts, places = _distinct(encoded)
        scores = np.empty(len(firsts), dtype=np.float32)
        counts = np.bincount(places, minlength=len(firsts))
        batches = self.plan(encoded.lengths[firsts], max_batch_tokens=max_batch_tokens, padding=padding)
        for batch, found in zip(batches, self._run_all(self._session, encoded, firsts, batches), strict=True):
            scores[batch.rows] = found
            repeats = counts[batch.rows]
            progress(int(repeats.sum()), int((repeats * encoded.lengths[firsts[batch.rows]]).sum()))
        return Scored(scores[places], encoded.lengths, encoded.truncated)

    def plan(
        self,
        lengths: batching.Ids,
        *,
        max_batch_tokens: int | None = None,
        padding: batching.Padding | None = None,
    ) -> list[batching.Batch]:
        """The batches in which distinct pairs of these `lengths` (n,) int64 in tokens are run."""
        budget = self._max_batch_tokens if max_batch_tokens is None else max_batch_tokens
        check_positive(max_batch_tokens=budget)
        padding = padding or self._padding
        if self._buckets:  # there are engines for these lengths only, and for no larger batches
            lengths, padding = bucket_lengths(lengths, self._buckets), "avoided"
            budget = min(budget, self._max_batch_tokens)
        shared = batching.plan_batches(lengths, max_batch_tokens=budget, padding=padding, workers=self._workers)
        if self._workers == 1 or self._is_shared(shared, lengths):
            return shared
        return batching.plan_batches(lengths, max_batch_tokens=budget, padding=padding)

    def rank(self, instruction: str, candidates: Sequence[str], *, exact_winner: bool = False) -> list[Candidate]:
        """Score each candidate as the response to `instruction`, best first; the first wins a tie.

        With `exact_winner`, candidates that come so near to the best that int8's error could decide between them (twice
        the largest error on the bundle's parity pairs, which on other pairs is no bound) are scored again in fp32,
        which loads that model at the first time. They are marked `is_exact` and come first, by their fp32 scores; the
        others follow by theirs. Where the best one is alone, nothing is scored again; in fp32 it changes nothing.

        Raises InvalidPair, whose index is the candidate's, ScoringError, and with `exact_winner` PrecisionUnavailable
        if the bundle has no fp32 model, BundleError if it tells no errors.
        """
        if isinstance(candidates, str):
            raise InvalidPair(0, f"candidates must be a list of strings, got one str: {candidates[:40]!r}")
        pairs = [(instruction, candidate) for candidate in candidates]
        margin = self._winner_margin() if exact_winner else 0.0
        scored = self.score_pairs(pairs)
        exact = self._rescore_near_winners(pairs, scored.scores, margin) if margin and pairs else {}
        order = sorted(
            range(len(pairs)), key=lambda place: (place not in exact, -exact.get(place, float(scored.scores[place])))
        )
        return [
            Candidate(
                place,
                candidates[place],
                exact.get(place, float(scored.scores[place])),
                bool(scored.truncated[place]),
                place in exact,
            )
            for place in order
        ]

    def close(self) -> None:
        """Free the model; scoring afterwards raises ScoringError."""
        self._session = self._narrow_session = None
        if self._callers is not None:
            self._callers.shutdown()
        if self._exact is not None:
            self._exact.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _is_shared(self, batches: Sequence[batching.Batch], lengths: batching.Ids) -> bool:
        """Whether callers run the batches beside each other: always where no session has more than one thread."""
        has_wide = self._session is not self._narrow_session
        return len(batches) > 1 and (not has_wide or batching.keeps_busy(batches, lengths, self._workers))

    def _winner_margin(self) -> float:
        """How far below the best score fp32's winner may be; 0 in fp32."""
        if self._exact is None:
            raise AttributeError("exact_winner needs a scorer that was made by Scorer.open")
        return self._exact.margin()

    def _rescore_near_winners(
        self, pairs: Sequence[tuple[str, str]], scores: Scores, margin: float
    ) -> dict[int, float]:
        """Exact scores, by place, of the candidates that could be the best; empty where that is but one."""
        near = [int(place) for place in np.flatnonzero(scores >= scores.max() - margin)]
        if self._exact is None or len(near) < 2:
            return {}
        found = self._exact.scorer().score_pairs([pairs[place] for place in near]).scores
        return {place: float(score) for place, score in zip(near, found, strict=True)}

    def _run_all(
        self, session: Session, encoded: EncodedPairs, firsts: batching.Ids, batches: Sequence[batching.Batch]
    ) -> Iterator[Scores]:
        """Scores of each batch, in their order; several at a time where there are callers for it."""
        narrow, callers = self._narrow_session, self._callers
        if narrow is None or callers is None or not self._is_shared(batches, encoded.lengths[firsts]):
            return (self._run(session, encoded, firsts, batch) for batch in batches)
        try:
            return callers.map(lambda batch: self._run(narrow, encoded, firsts, batch), batches)
        except RuntimeError as error:  # another thread closed the scorer meanwhile
            raise ScoringError(CLOSED) from error

    def _run(self, session: Session, encoded: EncodedPairs, firsts: batching.Ids, batch: batching.Batch) -> Scores:
        chosen = batching.Batch(firsts[batch.rows], batch.length)
        scores = session.run(
            model_inputs(encoded.token_ids, encoded.type_ids, encoded.lengths, chosen, pad_token_id=self._pad_token_id)
        )
        if not np.isfinite(scores).all():
            row = int(chosen.rows[np.flatnonzero(~np.isfinite(scores))[0]])
            raise ScoringError(f"the model gave {scores[~np.isfinite(scores)][0]} for pair {row}, which is no score")
        return scores


class _Exact:
    """What decides a winner exactly: the same bundle's fp32 model, opened when it is first needed."""

    def __init__(self, bundle: Bundle, info: ScorerInfo, tokenizer: PairTokenizer) -> None:
        self._bundle = bundle
        self._info = info
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._scorer: Scorer | None = None
        self._is_closed = False

    def margin(self) -> float:
        """Twice the largest error of the parity report, on a GPU twice the canary's tolerance; 0 in fp32.

        Raises unless the bundle can decide exactly.
        """
        precision, manifest = self._info.precision, self._bundle.manifest
        if precision == "fp32":
            return 0.0
        self._bundle.model("fp32", self._info.device)  # or PrecisionUnavailable
        if self._info.device != "cpu":  # errors were measured on the CPU; this is what the start made sure of
            return 2 * read_canary(manifest.document, self._info.device, precision).tolerance
        try:
            return 2 * float(manifest.document["parity"]["precisions"][precision]["max_error"])
        except (KeyError, TypeError, ValueError) as broken:
            raise BundleError(
                f"bundle {self._bundle.path} says nothing of {precision}'s errors; export it again"
            ) from broken

    def scorer(self) -> Scorer:
        """The scorer in fp32, with the settings of the other one."""
        with self._lock:
            if self._is_closed:
                raise ScoringError(CLOSED)
            if self._scorer is None:
                opened = open_for_scoring(
                    self._bundle,
                    device=self._info.device,
                    precision="fp32",
                    threads=self._info.threads,
                    mode=self._info.mode,
                    max_batch_tokens=self._info.max_batch_tokens,
                    name=self._info.bundle,
                    gpus=self._info.gpus or None,
                )
                self._scorer = Scorer._of(self._bundle, opened, self._tokenizer, exact=None)
            return self._scorer

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            if self._scorer is not None:
                self._scorer.close()


def _distinct(encoded: EncodedPairs) -> tuple[batching.Ids, batching.Ids]:
    """Rows of the first of each distinct pair, by its tokens, and for every row the place among those."""
    firsts: list[int] = []
    seen: dict[tuple[bytes, bytes], int] = {}
    places = np.empty(len(encoded.lengths), dtype=np.int64)
    for row, (ids, types) in enumerate(zip(encoded.token_ids, encoded.type_ids, strict=True)):
        place = seen.setdefault((ids.tobytes(), types.tobytes()), len(firsts))
        if place == len(firsts):
            firsts.append(row)
        places[row] = place
    return np.array(firsts, dtype=np.int64), places
