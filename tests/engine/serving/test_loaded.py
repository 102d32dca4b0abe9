"""A model at work: what it expects of requests, before their tokens are made, and how it finds that it is broken."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import numpy as np
import numpy.typing as npt
import pytest

from cappy_engine.batching import Grouping
from cappy_engine.bundle import open_bundle
from cappy_engine.dispatcher import Dispatcher
from cappy_engine.errors import InvalidRequest, ModelBroken, NotReady, QueueClosed, QueueFull, ScoringError
from cappy_engine.gpu.sessions import SharedSession
from cappy_engine.options import ScorerOptions
from cappy_engine.scorer import Scorer
from cappy_engine.serving.loaded import LoadedModel
from cappy_engine.serving.metrics import Metrics
from cappy_engine.serving.requests import ScoringRequest
from cappy_engine.serving.server_options import ServerOptions
from cappy_engine.session import Inputs, Session, open_session
from cappy_engine.slim import slim
from cappy_engine.testing import FakeSession

SKY = "Is the sky blue?"
INT8 = ScorerOptions(precision="int8", device="cpu")
TEXT = "Is the sky blue, or is it green? " * 4


@pytest.fixture
def loaded(bundle: Path) -> Iterator[LoadedModel]:
    """Give a model whose queue takes 512 tokens."""
    options = ServerOptions(max_queue_tokens=512)
    model = LoadedModel(bundle, ScorerOptions(precision="int8"), options, Metrics(), lambda model, error: None)
    yield model
    model.close(1)


def request_of(pairs: int) -> ScoringRequest:
    """Make a request of pairs that are not alike."""
    return ScoringRequest([(TEXT, str(number)) for number in range(pairs)], answer=lambda result: result)


def test_a_request_that_will_not_fit_is_refused_before_its_tokens_are_made(loaded: LoadedModel) -> None:
    tokens = int(loaded.scorer.encode(request_of(1).pairs).lengths.sum())
    with loaded.reserve(request_of(1), 0), loaded.reserve(request_of(40), 0):  # nothing is known of tokens yet
        pass
    cut = ScoringRequest([("word " * 10_000, "Yes")], lambda result: result)
    with ThreadPoolExecutor(1) as encoder:
        for request in (cut, request_of(1)):  # a text that was cut does not tell how many tokens a character has
            with loaded.reserve(request, 0) as place:
                loaded.score(request, place, float("inf"), encoder).result(timeout=20)
    fits = 512 // tokens - 1
    with loaded.reserve(request_of(1), 0):
        with loaded.reserve(request_of(fits), 0):
            pass
        with loaded.reserve(ScoringRequest([request_of(1).pairs[0]] * 500, lambda result: result), 0):  # they wait once
            pass
        with loaded.reserve(cut, 0):  # not all of its characters count
            pass
        with pytest.raises(QueueFull, match=f"{fits + 4} more, with about .* max_queue_tokens, 512"):
            loaded.reserve(request_of(fits + 4), 0)


def test_texts_of_a_client_that_left_are_not_kept_until_the_encoder_comes_to_them(loaded: LoadedModel) -> None:
    encoder_is_free, request = threading.Event(), request_of(3)
    kept = weakref.ref(request)
    with ThreadPoolExecutor(1) as encoder:
        encoder.submit(encoder_is_free.wait, 20)
        with loaded.reserve(request, 0) as place:
            answer = loaded.score(request, place, float("inf"), encoder)
        assert answer.cancel()
        del request
        gc.collect()
        is_kept = kept() is not None
        encoder_is_free.set()
    assert not is_kept


@pytest.mark.parametrize("is_text_known", [False, True])
def test_short_texts_do_not_have_long_ones_refused_that_fit(loaded: LoadedModel, is_text_known: bool) -> None:
    """Most of their tokens are special ones, and their words are shorter than others."""
    fits = 512 // int(loaded.scorer.encode(request_of(1).pairs).lengths.sum()) - 1
    short = [ScoringRequest([("q", str(number))], lambda result: result) for number in range(40)]
    with ThreadPoolExecutor(1) as encoder:
        for request in [request_of(1)] * is_text_known + short:
            with loaded.reserve(request, 0) as place:
                loaded.score(request, place, float("inf"), encoder).result(timeout=20)
    with loaded.reserve(request_of(1), 0), loaded.reserve(request_of(fits), 0):
        pass


@pytest.mark.parametrize(("threads", "step_tokens"), [(1, 512), (2, 8 * 512)])
def test_a_queue_is_bounded_also_where_no_bound_was_asked_for(bundle: Path, threads: int, step_tokens: int) -> None:
    options = ScorerOptions(precision="int8", device="cpu", threads=threads)
    model = LoadedModel(bundle, options, ServerOptions(), Metrics(), lambda model, error: None)
    model.close()
    limits = model.queue.limits
    assert (limits.step_tokens, limits.max_tokens, limits.max_pairs) == (step_tokens, 4 * step_tokens, 8192)
    assert limits.max_chars == 2**22


@pytest.mark.parametrize("grouping", [Grouping(4096, "allowed"), Grouping(4096, "avoided", (16, 64, 512))])
def test_padding_is_counted_where_the_model_computes_it(
    bundle: Path, grouping: Grouping, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher = Dispatcher(FakeSession(), grouping, pad_token_id=1)
    monkeypatch.setattr(LoadedModel, "_check", lambda model: None)  # made-up scores are not the canary's
    monkeypatch.setattr(Scorer, "dispatcher", property(lambda scorer: dispatcher))
    metrics = Metrics()
    model = LoadedModel(bundle, INT8, ServerOptions(), metrics, lambda model, error: None)
    pairs = [(SKY, "Yes"), (SKY, "Yes, it is blue, as blue as can be."), (SKY, "word " * 70)]
    lengths = model.scorer.encode(pairs).lengths.tolist()
    with ThreadPoolExecutor(1) as encoder, model.reserve(ScoringRequest(pairs, lambda result: result), 0) as place:
        request = ScoringRequest(pairs, lambda result: result)
        model.score(request, place, float("inf"), encoder).result(timeout=20)
    model.close()
    buckets = [
        next(bucket for bucket in grouping.buckets if bucket >= length) for length in lengths if grouping.buckets
    ]
    page = metrics.page().decode()
    computed = sum(buckets) or 3 * max(lengths)
    for name, count in (
        ("tokens_total", sum(lengths)),
        ("step_tokens_sum", sum(lengths)),
        ("computed_tokens_total", computed),
    ):
        assert f'cappy_{name}{{device="cpu",precision="int8"}} {float(count)}\n' in page


class Worn:
    """A session that works as another does until it is worn out."""

    def __init__(self, session: Session) -> None:
        self.device = session.device
        self.is_worn = False
        self._session = session

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        if self.is_worn:
            raise ScoringError("the device is gone")
        return self._session.run(inputs)


def test_a_model_is_broken_where_one_of_several_gpus_is(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else some requests would fail, on a server that says that it is ready."""
    session = open_session(open_bundle(bundle).model("fp32", "cpu"), threads=1)
    last = Worn(session)
    shared = SharedSession(
        {**dict.fromkeys(range(7), session), 7: last}, device="cpu"
    )  # more than the canary has pairs
    dispatcher = Dispatcher(shared, Grouping(4096), pad_token_id=1, narrow_session=shared, callers=8)
    monkeypatch.setattr(Scorer, "dispatcher", property(lambda scorer: dispatcher))
    broken: Queue[ModelBroken] = Queue()
    model = LoadedModel(
        bundle, ScorerOptions(precision="fp32"), ServerOptions(), Metrics(), lambda model, error: broken.put(error)
    )
    last.is_worn = True
    with ThreadPoolExecutor(1) as encoder:
        for _ in range(8):  # one of them comes to the last GPU
            with contextlib.suppress(ScoringError, ModelBroken, QueueClosed), model.reserve(request_of(1), 0) as place:
                model.score(request_of(1), place, float("inf"), encoder).result(timeout=20)
    assert "GPU 7: the device is gone" in str(broken.get(timeout=20))
    model.close()


class Paired:
    """A session whose first run waits for another one beside it."""

    def __init__(self, session: Session) -> None:
        self.device = session.device
        self.is_waiting = False
        self._session = session
        self._lock = threading.Lock()
        self._runs = 0
        self._are_two = threading.Event()

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        with self._lock:
            self._runs += self.is_waiting
        if self._runs == 2:
            self._are_two.set()
        assert not self.is_waiting or self._are_two.wait(20)
        return self._session.run(inputs)


def test_a_request_that_is_alone_is_computed_by_all_workers(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Paired(open_session(open_bundle(bundle).model("fp32", "cpu"), threads=1))
    dispatcher = Dispatcher(session, Grouping(64), pad_token_id=1, narrow_session=session, callers=2)
    monkeypatch.setattr(Scorer, "dispatcher", property(lambda scorer: dispatcher))
    options = ScorerOptions(precision="fp32")
    model = LoadedModel(bundle, options, ServerOptions(step_tokens=4096), Metrics(), lambda model, error: None)
    session.is_waiting = True
    with ThreadPoolExecutor(1) as encoder, model.reserve(request_of(6), 0) as place:
        answer = model.score(request_of(6), place, float("inf"), encoder).result(timeout=60)
        assert answer.scores().shape == (6,)
    model.close()


def test_an_exact_winner_needs_an_fp32_model_beside_the_one_that_is_served(bundle: Path, tmp_path: Path) -> None:
    slim(bundle, precisions=["int8"], targets=["cpu"], out=tmp_path / "slim")
    model = LoadedModel(tmp_path / "slim", INT8, ServerOptions(), Metrics(), lambda model, error: None)
    assert not model.has_exact_winner
    with pytest.raises(InvalidRequest, match="exact_winner needs an fp32 model, and this server's bundle has none"):
        model.reach()
    model.close()


def test_an_fp32_model_that_is_gone_is_an_error_of_the_server(copy: Path) -> None:
    model = LoadedModel(copy, INT8, ServerOptions(), Metrics(), lambda model, error: None)
    assert model.has_exact_winner
    open_bundle(copy).model("fp32", "cpu").unlink()
    with pytest.raises(NotReady, match="the fp32 model cannot be opened"):
        model.open_exact()
    model.close()


def test_a_model_that_does_not_score_its_canary_right_is_freed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each bundle that is refused at SIGHUP would stay in memory."""
    opened: list[Scorer] = []
    open_with, run = Scorer.open_with, Dispatcher.run

    def open_noted(bundle: Path, options: ScorerOptions) -> Scorer:
        opened.append(open_with(bundle, options))
        return opened[-1]

    monkeypatch.setattr(Scorer, "open_with", open_noted)
    monkeypatch.setattr(Dispatcher, "run", lambda dispatcher, encoded: run(dispatcher, encoded) + np.float32(0.5))
    with pytest.raises(ModelBroken, match="wrong scores"):
        LoadedModel(bundle, INT8, ServerOptions(), Metrics(), lambda model, error: None)
    monkeypatch.setattr(Dispatcher, "run", run)
    with pytest.raises(ScoringError, match="closed"):
        opened[0].score([(SKY, "Yes")])


def test_a_request_whose_texts_are_not_read_any_more_is_not_left_waiting(loaded: LoadedModel) -> None:
    may_go, encoder = threading.Event(), ThreadPoolExecutor(1)
    encoder.submit(may_go.wait)
    with loaded.reserve(request_of(1), 0) as place:
        answer = loaded.score(request_of(1), place, float("inf"), encoder)
        encoder.shutdown(wait=False, cancel_futures=True)
        may_go.set()
        assert answer.cancelled()
