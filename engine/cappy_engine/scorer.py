"""Turn pairs into scores: tokenise, run the distinct pairs in batches, restore the order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Self, cast

import numpy as np

from cappy_engine.activations import ACTIVATIONS, Activation, activated
from cappy_engine.batching import Batch, EncodedPairs, Padding, Scores
from cappy_engine.bundle import EMBEDDED, Bundle, open_bundle
from cappy_engine.checks import check_callable, check_flag, check_word, described
from cappy_engine.dispatcher import CLOSED, Dispatcher
from cappy_engine.errors import CappyError, PrecisionUnavailable, ScoringError
from cappy_engine.exact import ExactModel
from cappy_engine.opening import open_dispatcher
from cappy_engine.options import Device, Mode, Precision, ScorerInfo, ScorerOptions
from cappy_engine.pairs import MAX_TEXT_CHARS, Pair, Pairs, TooLong, candidate_pairs
from cappy_engine.parts import PART_PAIRS, score_in_parts
from cappy_engine.ranking import Candidate, near_best, ranked
from cappy_engine.scored import Scored
from cappy_engine.tokenizer import PairTokenizer

EMBEDDED_NAME = "cappy-mini, the package's own small model"

log = logging.getLogger(__name__)


class Scorer:
    """Scores pairs with one model on one device. Open one with `Scorer.open`; any number of threads may use it."""

    @classmethod
    def open(
        cls,
        bundle: str | Path = EMBEDDED,
        *,
        device: Device = "auto",
        precision: Precision = "auto",
        threads: int | None = None,
        mode: Mode = "auto",
        max_batch_tokens: int | None = None,
        gpus: Sequence[int] | None = None,
        max_text_chars: int = MAX_TEXT_CHARS,
    ) -> Self:
        """Open a bundle for scoring; without one it is cappy-mini, the small model in the package.

            >>> with Scorer.open("cappy-bundle", precision="int8") as scorer:
            ...     scores = scorer.score([("Is the sky blue?", "Yes")])

        `device` is "cpu", "cuda", "tensorrt" or "auto": CUDA where the bundle has a model for it and it really works,
        else the CPU. `gpus` are the numbers of the GPUs that share the work (None: the first).

        `precision` is "fp32", "fp16", "bf16", "int8" or "auto": the first that the bundle has of fp32, int8, fp16 on
        the CPU, of fp32, fp16 on CUDA, of fp32, fp16, int8 on TensorRT.

        `threads` is the number of CPU threads (None: one for each physical core that this process and its container
        may use). `mode` says how they are used:

        - "latency": all threads on one batch.
        - "throughput": one thread for each of several batches.
        - "both": two sessions, each for what it does best. The second is opened when there first are several batches,
          and holds the weights again; sessions share those of more than 128 MiB.
        - "auto": what `cappy tune` measured here, else "both" for models up to 512 MiB and "latency" for larger ones.

        With one thread, or off the CPU, the modes are one. A batch holds at most `max_batch_tokens` tokens (None: as
        tuned, else 512 on the CPU and 16,384 on GPUs). A text of more than `max_text_chars` characters is refused.

        What is asked for by name is what runs, or an error is raised. `info` says what "auto" chose, and why.

        Raises BundleError, PrecisionUnavailable, DeviceUnavailable, InstallationError, ScoringError where a GPU fails
        on its first batches or no thread can be started, and ValueError for options out of range.
        """
        return cls.open_with(
            bundle,
            ScorerOptions(
                device=device,
                precision=precision,
                threads=threads,
                mode=mode,
                max_batch_tokens=max_batch_tokens,
                gpus=cast("tuple[int, ...] | None", gpus),  # which it makes of any collection of numbers
                max_text_chars=max_text_chars,
            ),
        )

    @classmethod
    def open_with(cls, bundle: str | Path = EMBEDDED, options: ScorerOptions | None = None) -> Self:
        """Open a bundle with all options in one object. It pickles, and writes itself as JSON.

        >>> scorer = Scorer.open_with("cappy-bundle", ScorerOptions(precision="int8", threads=4))

        Raises what `open` raises.
        """
        found, asked = open_bundle(bundle), ScorerOptions() if options is None else options
        if not isinstance(asked, ScorerOptions):
            raise ValueError(f"options must be ScorerOptions, got {described(asked)}")  # noqa: TRY004 - as for all
        dispatcher, info = open_dispatcher(found, asked, name=EMBEDDED_NAME if bundle == EMBEDDED else str(bundle))
        tokenizer = PairTokenizer.from_bytes(
            found.read("tokenizer.json"), max_length=info.max_length, max_text_chars=asked.max_text_chars
        )
        return cls(tokenizer, dispatcher, bundle=found, info=info, options=asked)

    def __init__(
        self,
        tokenizer: PairTokenizer,
        dispatcher: Dispatcher,
        *,
        bundle: Bundle | None = None,
        info: ScorerInfo | None = None,
        options: ScorerOptions | None = None,
    ) -> None:
        """Score with a tokenizer and a dispatcher that are open; the others say where they come from."""
        self.tokenizer = tokenizer
        self._dispatcher = dispatcher
        self._bundle = bundle
        self._info = info
        self._options = options
        self._exact = ExactModel(bundle, info) if bundle is not None and info is not None else None
        self._is_closed = False

    def __reduce__(self) -> tuple[Callable[..., Scorer], tuple[object, ...]]:
        """Pickle as the bundle's path and the options, by which it is opened again."""
        if self._is_closed:
            raise ScoringError(CLOSED)
        if self._bundle is None or self._options is None:
            raise CappyError("only a scorer from Scorer.open can be pickled or copied; make it anew where it is needed")
        elsewhere = () if self._bundle.path == EMBEDDED.resolve() else (self._bundle.path,)
        return _open_again, (type(self), self._options, *elsewhere)

    @property
    def info(self) -> ScorerInfo:
        """Tell what this scorer runs, and why. Only a scorer from `Scorer.open` knows."""
        if self._info is None:
            raise AttributeError("this scorer was not made by Scorer.open")
        return self._info

    @property
    def dispatcher(self) -> Dispatcher:
        """Give the dispatcher, which plans and runs batches."""
        return self._dispatcher

    @property
    def exact(self) -> ExactModel:
        """Give the fp32 model of `exact_winner`. Only a scorer from `Scorer.open` has one."""
        if self._exact is None:
            raise AttributeError("exact_winner needs a scorer that was made by Scorer.open")
        return self._exact

    def score(self, pairs: Pairs, *, activation: Activation = "identity", too_long: TooLong = "truncate") -> Scores:
        """Score (instruction, response) pairs: (n,) float32, in input order; the model's raw output, not clipped.

        `pairs` may be a table, of pandas, polars, Arrow or datasets: its columns `instruction` and `response`, or its
        only two. A pair too long for the model is truncated as in training; with `too_long="refuse"` it is an
        InvalidPair. A warning counts truncated pairs and empty instructions. "sigmoid" puts scores between 0 and 1.

            >>> scorer.score([("Is the sky blue?", "Yes"), ("Is the sky blue?", "No")])
            array([0.93, 0.08], dtype=float32)

        Raises InvalidPair (with the index) and ScoringError.
        """
        check_word("activation", activation, ACTIVATIONS)
        scored = self.score_pairs(pairs, too_long=too_long)
        for remark in scored.remarks():
            log.warning("%s", remark)
        return activated(scored.scores, activation)

    def score_pairs(
        self,
        pairs: Pairs,
        *,
        too_long: TooLong = "truncate",
        max_batch_tokens: int | None = None,
        padding: Padding | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> Scored:
        """Score like `score`, and tell the number of tokens and the truncation of every pair.

        Other options are those of `score_encoded`. On GPUs, many pairs are tokenised in parts, beside the scoring:
        equal pairs are computed once in each, and may differ by rounding. Raises InvalidPair and ScoringError.

            >>> scorer.score_pairs([("Is the sky blue?", "Yes")]).token_counts
            array([10])
        """
        score = partial(self.score_encoded, max_batch_tokens=max_batch_tokens, padding=padding, progress=progress)
        count = PART_PAIRS * self._dispatcher.workers if self._dispatcher.is_apart else None
        return score_in_parts(self.tokenizer, pairs, score, too_long=too_long, count=count)

    def encode(self, pairs: Pairs, *, too_long: TooLong = "truncate") -> EncodedPairs:
        """Tokenise (instruction, response) pairs, without scoring them.

        Each distinct text is tokenised once. Raises InvalidPair, with the index.

            >>> encoded = scorer.encode([("Is the sky blue?", "Yes")])
            >>> scorer.score_encoded(encoded).scores
            array([0.93], dtype=float32)
        """
        return self.tokenizer.encode(pairs, too_long=too_long)

    def score_encoded(
        self,
        encoded: EncodedPairs,
        *,
        max_batch_tokens: int | None = None,
        padding: Padding | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> Scored:
        """Score pairs that `encode` made, of any scorer with the same tokenizer.

        A pair that comes several times is computed once. Raises ValueError for pairs of another tokenizer.

        `max_batch_tokens` and `padding` replace the scorer's own for this call. `progress` is called after every batch
        with how many pairs and tokens (without padding) it held. Raises ScoringError, with the index of a pair that
        fails in the model; the index is None where no single pair is at fault.
        """
        check_callable("progress", progress)
        self.tokenizer.check(encoded)
        distinct, places = encoded.distinct()
        repeats = np.bincount(places, minlength=len(distinct))

        def report(batch: Batch) -> None:
            times = repeats[batch.rows]
            if progress is not None:
                progress(int(times.sum()), int((times * distinct.lengths[batch.rows]).sum()))

        grouping = self._dispatcher.grouping.changed(max_batch_tokens=max_batch_tokens, padding=padding)
        try:
            found = self._dispatcher.run(distinct, grouping=grouping, progress=report)
        except ScoringError as error:
            if error.index is None:
                raise
            raise ScoringError(error.problem, int((places == error.index).argmax())) from error
        return Scored(found[places], encoded.lengths.copy(), encoded.truncated.copy(), encoded.without_instruction)

    def rank(
        self,
        instruction: str,
        candidates: Iterable[str],
        *,
        exact_winner: bool = False,
        activation: Activation = "identity",
        too_long: TooLong = "truncate",
    ) -> list[Candidate]:
        """Score each candidate as the response to `instruction`, best first; the first wins a tie.

        `candidates` may be any collection of texts, a column of a table too. Raw scores decide the order, also with the
        `activation` "sigmoid", which puts scores between 0 and 1.

            >>> scorer.rank("Is the sky blue?", ["Yes", "No"])[0].response
            'Yes'

        With `exact_winner`, the candidates that int8's error could put first are scored again in fp32: their scores are
        within twice the largest error on the bundle's parity pairs (no bound for other pairs) of the best one. They are
        marked `is_exact` and come first, by their fp32 scores. If only one comes that near, nothing is scored again.
        The first such call loads the fp32 model. In fp32 nothing changes.

        Raises InvalidPair, whose index is the candidate's, and ScoringError. With `exact_winner`, raises
        PrecisionUnavailable if the bundle has no fp32 model, and BundleError if it tells no errors.
        """
        check_flag("exact_winner", exact_winner)
        check_word("activation", activation, ACTIVATIONS)
        pairs = candidate_pairs(instruction, candidates)
        if exact_winner and self._exact is None:
            raise PrecisionUnavailable("exact_winner needs an fp32 model, and this scorer was not made by Scorer.open")
        reach = self.exact.reach() if exact_winner else 0.0
        scored = self.score_pairs(pairs, too_long=too_long)
        if scored.without_instruction:
            log.warning("the instruction is empty")
        exact = self._rescore(pairs, near_best(scored.scores, reach)) if reach and pairs else {}
        return ranked([pair[1] for pair in pairs], scored.scores, scored.truncated, exact, activation=activation)

    def close(self) -> None:
        """Free the model, once no call uses it; scoring afterwards raises ScoringError. It waits for nothing."""
        self._is_closed = True
        if self._exact is not None:
            self._exact.close()
        self._dispatcher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def _rescore(self, pairs: Sequence[Pair], near: Sequence[int]) -> dict[int, float]:
        """Score the `near` pairs in fp32; returns scores by place, none if one candidate is alone."""
        if len(near) < 2:
            return {}
        try:
            scores = self.exact.run(self.encode(pairs[place] for place in near))
        except ScoringError as error:
            raise ScoringError(error.problem, None if error.index is None else int(near[error.index])) from error
        return {place: float(score) for place, score in zip(near, scores, strict=True)}


def _open_again(kind: type[Scorer], options: ScorerOptions, bundle: Path = EMBEDDED) -> Scorer:
    return kind.open_with(bundle, options)
