"""A model at work: what was opened and passed its canary, and the queue of what it has to score."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cappy_engine.batching import EncodedPairs, Ids, Scores
from cappy_engine.bundle import EMBEDDED
from cappy_engine.canary import read_canary
from cappy_engine.errors import (
    BundleError,
    CappyError,
    InvalidRequest,
    ModelBroken,
    NotReady,
    PrecisionUnavailable,
    ScoringError,
)
from cappy_engine.options import ScorerOptions
from cappy_engine.scorer import Scorer
from cappy_engine.serving.jobs import Job, Model, QueueLimits, Step
from cappy_engine.serving.metrics import Metrics
from cappy_engine.serving.queue import Reservation, ScoringQueue
from cappy_engine.serving.ready_check import check_scores
from cappy_engine.serving.requests import ScoringRequest, ServedModel
from cappy_engine.serving.server_options import ServerOptions

STEPS_THAT_WAIT = 4
BATCHES_OF_A_WORKER = 4
"""Measured on two cores, the loss of throughput: 1 batch a worker 4%, 2 batches 2%, 4 none; with kernels, 2 batches 9%.
What comes meanwhile waits for a step."""
MAX_CHARS = 2**22
"""The characters that are tokenised, or wait for it: some seconds of work."""
LEAST_CHARS = 32
"""Shorter pairs do not tell how many tokens a character has: a letter alone is a token."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Waiting:
    """The pairs of a request, of which each distinct one waits once; `places` are theirs among these, (n,) int64."""

    encoded: EncodedPairs
    places: Ids
    job: Job

    def scores(self) -> Scores:
        """Give the scores of all pairs, which are there. Raises what made the job fail, with the index of the pair."""
        return scores_of_job(self.job, lambda index: int((self.places == index).argmax()))[self.places]


def scores_of_job(job: Job, place_of: Callable[[int], int]) -> Scores:
    """Give the scores of a job, which are there; `place_of` maps a pair of the job to its pair in the request."""
    try:
        return job.future.result(timeout=0)
    except ScoringError as error:
        if error.index is None:
            raise
        raise ScoringError(error.problem, place_of(error.index)) from error


class LoadedModel:
    """A model at work: its scorer, which passed the canary, and its queue.

    `place` is where its bundle lies, without links, and `manifest_sha256` the digest that tells it from all others.
    """

    def __init__(
        self,
        bundle: str | Path,
        options: ScorerOptions,
        server: ServerOptions,
        metrics: Metrics,
        on_broken: Callable[[LoadedModel, ModelBroken], None],
    ) -> None:
        self.scorer = Scorer.open_with(bundle, options)
        self._bundle = self.scorer.exact.bundle
        self.place = self.scorer.info.bundle if bundle == EMBEDDED else str(self._bundle.path)
        self.manifest_sha256 = str(self._bundle.manifest.document["manifest_sha256"])
        self.max_text_chars = options.max_text_chars
        self._metrics = metrics
        self._tokens_per_char = 0.0
        self._special_tokens = self.scorer.tokenizer.template.special_tokens
        info = self.scorer.info
        metrics.serves(info.device, info.precision)
        if self.has_exact_winner:
            metrics.serves(info.device, "fp32")
        own_name = "cappy-mini" if bundle == EMBEDDED else Path(bundle).absolute().name
        self.card = ServedModel(server.model_names or (own_name,), info.device, info.precision, info.max_length)
        try:
            self._canary = read_canary(self._bundle.manifest.document, info.device, info.precision)
            self._check()
        except CappyError:
            self.scorer.close()
            raise
        workers = self.scorer.dispatcher.workers
        batches = BATCHES_OF_A_WORKER * workers if workers > 1 else 1
        step_tokens = server.step_tokens or info.max_batch_tokens * batches
        most_tokens = server.max_queue_tokens or STEPS_THAT_WAIT * step_tokens
        self.queue = ScoringQueue(
            self._run,
            QueueLimits(server.max_queue_pairs, most_tokens, step_tokens, workers, MAX_CHARS, info.max_batch_tokens),
            check=self._check,
            on_step=self._count,
            on_broken=partial(on_broken, self),
        )

    def __str__(self) -> str:
        card = self.card
        digest = self.manifest_sha256[:12]
        return f"{card.name}: {card.precision} on {card.device}, of {self.place}, manifest {digest}"

    def reserve(self, request: ScoringRequest, chars: int) -> Reservation:
        """Get room in the queue for a request, whose distinct texts have so many characters.

        Its tokens are guessed from its characters, by what earlier requests had. If these do not fit, it is refused
        before they are made.
        """
        share, most, special = self._tokens_per_char, self.card.max_length, self._special_tokens
        expected = sum(min(most, special + share * (len(first) + len(second))) for first, second in set(request.pairs))
        return self.queue.reserve(len(request.pairs), chars, int(expected))

    def reach(self) -> float:
        """Tell how far below the best score fp32's winner may be. Raises InvalidRequest without an fp32 model."""
        try:
            return self.scorer.exact.reach()
        except PrecisionUnavailable as error:
            problem = f"exact_winner needs an fp32 model, and this server's bundle has none for {self.card.device}"
            raise InvalidRequest(problem) from error

    @property
    def has_exact_winner(self) -> bool:
        """Tell if the bundle has an fp32 model beside this one, for `exact_winner`."""
        try:
            return self.scorer.exact.reach() > 0
        except BundleError:
            return False

    def open_exact(self) -> None:
        """Open the fp32 model beside the one that is served. Raises NotReady where that is not possible any more."""
        try:
            self.scorer.exact.open()
        except (BundleError, OSError) as error:
            log.error("the fp32 model cannot be opened: %s", error)  # noqa: TRY400 - the message says all
            raise NotReady("the fp32 model cannot be opened; ask without exact_winner, or see the log") from error

    def score(self, request: ScoringRequest, room: Reservation, deadline: float, encoder: Executor) -> Future[Waiting]:
        """Have `encoder` tokenise the pairs of a request and let them wait; the future is done when they are scored.

        So whoever waits is woken once, and not between the two. The future raises what tokenising and `room` raise.
        """
        answer: Future[Waiting] = Future()
        kept = [request]
        answer.add_done_callback(lambda done: kept.clear())  # texts of a client that left wait for no encoder

        def tokenise() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            request = kept[0]
            try:
                encoded = self.scorer.encode(request.pairs, too_long=request.too_long)
                distinct, places = encoded.distinct()
                self._learn(request, distinct)
                room.submit(
                    distinct,
                    deadline=deadline,
                    on_done=lambda job: answer.set_result(Waiting(encoded, places, job)),
                )
            except BaseException as error:
                answer.set_exception(error)

        work = encoder.submit(tokenise)
        work.add_done_callback(lambda done: done.cancelled() and answer.cancel())  # an encoder that is shut down
        return answer

    def close(self, wait_seconds: float | None = None) -> None:
        """Answer waiting requests for at most `wait_seconds`. The model is freed when its last run has ended."""
        self.queue.close(wait_seconds=wait_seconds)
        self.scorer.close()

    def _run(self, model: Model, encoded: EncodedPairs, is_alone: bool) -> Scores:
        if model == "exact":
            return self.scorer.exact.run(encoded)
        dispatcher = self.scorer.dispatcher
        return dispatcher.run(encoded) if is_alone else dispatcher.run_beside(encoded)

    def _check(self) -> None:
        """Raise ModelBroken unless the model scores the canary right. All its ways to run are tried, on every GPU."""
        for run in self.scorer.dispatcher.ways():
            check_scores(self._canary, run)

    def _learn(self, request: ScoringRequest, distinct: EncodedPairs) -> None:
        """Note how many tokens a character has. Texts that were cut, or are short, do not tell."""
        chars = sum(len(first) + len(second) for first, second in set(request.pairs))
        if chars and chars >= LEAST_CHARS * len(distinct) and not distinct.truncated.any():
            share = (int(distinct.lengths.sum()) - self._special_tokens * len(distinct)) / chars
            self._tokens_per_char += (share - self._tokens_per_char) * (0.1 if self._tokens_per_char else 1.0)

    def _count(self, step: Step) -> None:
        dispatcher = self.scorer.dispatcher
        computed = int(step.lengths.sum())
        if dispatcher.grouping.padding == "allowed" or dispatcher.grouping.buckets:
            computed = sum(batch.padded_tokens for batch in dispatcher.plan(step.lengths).batches)
        self._metrics.stepped(step, self.scorer.info, computed)
