"""Metrics: their names and units are an interface, and what they count is what happened."""

from __future__ import annotations

import math
import re
import time

import numpy as np
import pytest

from cappy_engine import Scorer
from cappy_engine.serving.jobs import Step
from cappy_engine.serving.metrics import Metrics
from tests.support.places import ROOT
from tests.support.servers import Server, pairs_of

ONE = pairs_of(("Is the sky blue?", "Yes"))
LABELS = 'device="cpu",precision="int8"'


@pytest.mark.parametrize(
    ("path", "status", "reason", "document"),
    [
        ("/v1/score", 422, "validation", {"pairs": []}),
        ("/v1/score", 413, "too_large", pairs_of(*[("Is the sky blue?", "Yes")] * 51)),
        ("/v1/none", 404, "not_found", {}),
        ("/health", 405, "method_not_allowed", {}),
        ("/v2/models/none", 404, "not_found", None),
    ],
)
def test_a_refused_request_is_counted_by_its_error_type(
    server: Server, path: str, status: int, reason: str, document: dict[str, object] | None
) -> None:
    line = f'cappy_refused_requests_total{{reason="{reason}"}}'
    # It is there from the start: Prometheus does not see a counter's first value as a rise.
    before = server.metric(line)
    refused = server.get(path) if document is None else server.post(path, document)
    assert (refused.status_code, refused.json()["error_type"]) == (status, reason)
    assert server.metric(line) == before + 1


def test_a_body_that_breaks_off_is_counted_once(server: Server) -> None:
    names = ('cappy_refused_requests_total{reason="validation"}', "cappy_abandoned_requests_total")
    before = sum(map(server.metric, names))
    with server.connect() as client:
        client.sendall(b"POST /v1/score HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nnone\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 400 ")
    server.wait_until(lambda: sum(map(server.metric, names)) > before)
    time.sleep(0.1)
    assert sum(map(server.metric, names)) == before + 1


@pytest.mark.parametrize("result", ["done", "failed"])
def test_swaps_are_counted_from_0_on(server: Server, result: str) -> None:
    assert server.metric(f'cappy_swaps_total{{result="{result}"}}') == 0


def test_stages_are_in_seconds_and_steps_in_tokens(server: Server) -> None:
    stages = ("tokenize", "queue", "score", "total")
    server.post("/v1/score", ONE)  # so that all are counted

    def sums() -> list[float]:
        return [server.metric(f'cappy_stage_seconds_sum{{stage="{stage}"}}') for stage in stages]

    def tokens() -> float:
        return server.metric(f"cappy_step_tokens_sum{{{LABELS}}}")

    def steps() -> float:
        return server.metric(f"cappy_step_tokens_count{{{LABELS}}}")

    before, tokens_before, steps_before = sums(), tokens(), steps()
    answer = server.post("/v1/score", pairs_of(("Is the sky blue?", "Yes"), ("Is it?", "No")))
    server.wait_until(lambda: steps() > steps_before)  # a step is counted when its requests are answered
    assert tokens() - tokens_before == answer.json()["tokens"]
    told = [float(answer.headers[f"x-cappy-{stage}-ms"]) / 1000 for stage in stages]
    assert [now - then for now, then in zip(sums(), before, strict=True)] == pytest.approx(told, abs=2e-6)


@pytest.mark.parametrize(
    ("name", "least", "most"), [("cappy_stage_seconds", 0.001, 60.0), ("cappy_step_tokens", 16.0, 262144.0)]
)
def test_what_a_request_takes_falls_between_the_bounds_of_a_histogram(
    server: Server, name: str, least: float, most: float
) -> None:
    server.post("/v1/score", ONE)
    page = server.get("/metrics")
    bounds = {float(bound) for bound in re.findall(rf'{name}_bucket{{[^}}]*le="([^"]+)"', page.text)}
    assert (min(bounds), max(bounds - {math.inf}), len(bounds) > 10) == (least, most, True)
    assert page.headers["content-type"].startswith("text/plain; version=")


def test_information_names_the_limits_that_hold(server: Server) -> None:
    assert server.get("/info").json()["limits"] == {
        "max_body_bytes": 100_000,
        "max_pairs": 50,
        "max_text_chars": 20_000,
        "max_queue_pairs": 8192,
        "max_queue_tokens": 50_000,
        "request_seconds": 60.0,
    }


def test_the_model_is_busy_while_it_scores_and_never_more_than_all_the_time(server: Server) -> None:
    name = f"cappy_busy_seconds_total{{{LABELS}}}"
    before, began = server.metric(name), time.perf_counter()
    time.sleep(0.2)
    assert server.metric(name) == before
    server.post("/v1/score", pairs_of(*[("Is the sky blue?", f"Yes, {place}") for place in range(50)]))
    server.wait_until(lambda: server.metric(name) > before)
    assert server.metric(name) - before <= time.perf_counter() - began - 0.2


def test_a_step_of_one_of_two_workers_counts_half() -> None:
    metrics, scorer = Metrics(), Scorer.open(precision="int8", device="cpu")
    with scorer:
        metrics.stepped(Step("chosen", np.array([4]), 1, seconds=2.0, workers=0.5), scorer.info, 4)
    assert f"\ncappy_busy_seconds_total{{{LABELS}}} 1.0\n" in metrics.page().decode()


def test_the_limits_of_the_queue_are_what_info_tells(server: Server) -> None:
    told = server.get("/info").json()["limits"]
    found = {each: server.metric(f"cappy_queue_{each}_limit") for each in ("pairs", "tokens")}
    assert found == {each: told[f"max_queue_{each}"] for each in ("pairs", "tokens")}


def test_every_metric_is_told_in_the_docs(server: Server) -> None:
    told = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    names = re.findall(r"^# TYPE (\w+) ", server.get("/metrics").text, re.MULTILINE)
    ours = [name for name in names if name.startswith("cappy_") and not name.endswith("_created")]
    assert len(ours) > 10
    assert [name for name in ours if f"`{name}`" not in told and f"`{name}_total`" not in told] == []


def test_every_metric_and_label_that_the_docs_name_is_there(server: Server) -> None:
    told = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    server.post("/v1/score", ONE)  # so that the stages are counted
    page = server.get("/metrics").text
    names = set(re.findall(r"\bcappy_\w+", told))
    asked = set(re.findall(r'\b(cappy_\w+)\{(\w+="\w+")\}', told))
    assert (len(names) > 10, len(asked) > 4) == (True, True)
    assert [name for name in names if not re.search(rf"\b{name}\b", page)] == []
    assert [one for one in asked if not re.search(rf"^{one[0]}\{{(.*,)?{one[1]}[,}}]", page, re.MULTILINE)] == []
