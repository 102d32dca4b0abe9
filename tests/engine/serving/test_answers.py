"""What the server answers: the scores of `Scorer`, what they cost, and clear errors for everything else."""

from __future__ import annotations

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from cappy_engine import __version__
from cappy_engine.scorer import Scorer
from tests.support.servers import Server, pairs_of, serving

SKY = "Is the sky blue?"
LONG = "word " * 800
TENSORS = {
    "inputs": [{"name": name, "shape": [1], "datatype": "BYTES", "data": [SKY]} for name in ("instruction", "response")]
}


def test_scores_are_the_scorers(server: Server, scorer: Scorer) -> None:
    texts = [(SKY, "Yes"), (SKY, "No"), ("", "空は青い"), (SKY, LONG)]
    answer = server.post("/v1/score", pairs_of(*texts)).json()
    expected = scorer.score_pairs(texts)
    assert [row["score"] for row in answer["results"]] == expected.scores.tolist()
    assert [row["tokens"] for row in answer["results"]] == expected.token_counts.tolist()
    assert [row["is_truncated"] for row in answer["results"]] == [False, False, False, True]
    assert (answer["model"], answer["precision"], answer["truncated"]) == ("tiny", "int8", 1)


def test_a_ranking_is_the_scorers(server: Server, scorer: Scorer) -> None:
    candidates = ["Yes", "No", "Perhaps", "Yes"]
    answer = server.post("/v1/rank", {"instruction": SKY, "candidates": candidates, "top_n": 3}).json()
    expected = scorer.rank(SKY, candidates)[:3]
    assert [(row["index"], row["response"], row["score"]) for row in answer["results"]] == [
        (found.index, found.response, found.score) for found in expected
    ]


def test_an_exact_winner_is_the_scorers(server: Server, scorer: Scorer) -> None:
    candidates = [f"answer {number}" for number in range(12)]
    asked = {"instruction": SKY, "candidates": candidates, "exact_winner": True}
    expected = scorer.rank(SKY, candidates, exact_winner=True)
    names = [f'cappy_pairs_total{{device="cpu",precision="{precision}"}}' for precision in ("int8", "fp32")]
    server.post("/v1/rank", asked)  # so that both are counted
    before = [server.metric(name) for name in names]
    answer = server.post("/v1/rank", asked).json()["results"]
    assert [(row["index"], row["score"], row["is_exact"]) for row in answer] == [
        (found.index, found.score, found.is_exact) for found in expected
    ]
    exact = sum(found.is_exact for found in expected)
    assert exact > 1
    assert [server.metric(name) - count for name, count in zip(names, before, strict=True)] == [12, exact]


def test_requests_at_once_get_their_own_scores(server: Server, scorer: Scorer) -> None:
    def ask(number: int) -> list[float]:
        texts = [(SKY, f"{number} {place}") for place in range(1 + number % 7)]
        return [row["score"] for row in server.post("/v1/score", pairs_of(*texts)).json()["results"]]

    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(ask, range(64)))
    for number, scores in enumerate(found):
        assert scores == scorer.score([(SKY, f"{number} {place}") for place in range(1 + number % 7)]).tolist()


def test_headers_say_what_a_request_cost(server: Server) -> None:
    headers = server.post("/v1/score", pairs_of((SKY, "Yes"), (SKY, LONG)), x_request_id="my-own.id").headers
    assert headers["x-request-id"] == "my-own.id"
    assert (headers["x-cappy-truncated"], int(headers["x-cappy-tokens"]) > 512) == ("1", True)
    stages = {name: float(headers[f"x-cappy-{name}-ms"]) for name in ("tokenize", "queue", "score", "total")}
    assert sum(stages.values()) == pytest.approx(2 * stages["total"], abs=0.1)
    assert headers["server-timing"].startswith("tokenize;dur=")


def test_an_answer_to_vllm_says_when_it_was_made(server: Server) -> None:
    began = int(time.time())
    created = server.post("/score", {"text_1": SKY, "text_2": "Yes"}).json()["created"]
    assert began <= created <= time.time()


def test_a_refused_request_keeps_its_id(server: Server) -> None:
    refused = server.post("/v1/score", {"pairs": []}, x_request_id="my-own.id")
    assert (refused.status_code, refused.headers["x-request-id"]) == (422, "my-own.id")
    assert "my-own.id" not in server.log  # only with --log-requests


def test_an_odd_request_id_is_not_repeated(server: Server) -> None:
    found = server.post("/v1/score", pairs_of((SKY, "Yes")), x_request_id="a b<script>").headers["x-request-id"]
    assert found.isalnum()


ERRORS: list[tuple[int, str, Any, str]] = [
    (422, "/v1/score", {"pairs": []}, "pairs"),
    (422, "/v1/score", {"pairs": [{"instruction": SKY}]}, "response"),
    (422, "/v1/score", {"pairs": [{"instruction": SKY, "response": 1}]}, "$.pairs[0].response"),
    (422, "/v1/rank", {"instruction": SKY, "candidates": ["Yes"], "topn": 1}, "topn"),
    (422, "/v1/score", {**pairs_of((SKY, LONG)), "too_long": "refuse"}, "the model takes 512"),
    (422, "/v1/score", pairs_of((SKY, "x" * 20001)), "max_text_chars is 20000"),
    (413, "/v1/score", pairs_of(*[(SKY, "Yes")] * 51), "51 pairs in one request"),
    (413, "/v1/score", pairs_of(*[("x" * 15000, "")] * 7), "max_body_bytes"),
    (404, "/v1/rerank", {"model": "gpt", "query": SKY, "documents": ["Yes"]}, "'gpt' is not served here"),
    (404, "/v2/models/gpt/infer", {"inputs": []}, "'gpt' is not served here"),
    (404, "/v1/nothing", {}, "there is nothing at '/v1/nothing'"),
]


ERROR_TYPES = {404: "not_found", 413: "too_large", 422: "validation"}


@pytest.mark.parametrize(("status", "path", "document", "part"), ERRORS)
def test_errors_say_what_is_wrong_in_one_shape(
    server: Server, status: int, path: str, document: Any, part: str
) -> None:
    response = server.post(path, document)
    assert response.status_code == status
    answer = response.json()
    assert answer["error_type"] == ERROR_TYPES[status]
    assert set(answer) == {"error", "error_type", "message", "pair"}
    assert part in answer["error"] == answer["message"]


def test_an_error_names_the_pair(server: Server) -> None:
    answer = server.post("/v1/score", {**pairs_of((SKY, "Yes"), (SKY, LONG)), "too_long": "refuse"}).json()
    assert answer["pair"] == 1


BODIES = [
    (b"", 400),
    (b"{", 400),
    (b"\xff\xfe", 400),
    (b'{"instruction": "\\ud800", "candidates": ["b"]}', 422),
    (b"[" * 50000, 422),
    (b'{"instruction": ' + b"[" * 50000, 422),
    (b"null", 422),
    (b"[]", 422),
    (b'{"instruction": "a", "candidates": ["b"], "top_n": 1e400}', 422),
    (b'{"instruction": "a", "candidates": ["b"], "top_n": NaN}', 400),
]


@pytest.mark.parametrize(("body", "status"), BODIES)
def test_a_body_that_is_not_what_it_must_be_is_refused(server: Server, body: bytes, status: int) -> None:
    response = server.client.post("/v1/rank", content=body, headers={"content-type": "application/json"})
    assert response.status_code == status


def test_a_request_without_a_body_hears_so(server: Server) -> None:
    for path in ("/v1/rank", "/rerank", "/v2/models/tiny/infer"):
        for content in (b"", b" \n"):
            response = server.client.post(path, content=content)
            assert (response.status_code, response.json()["error"]) == (400, "the body is empty; send a JSON object")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "application/json", "content-encoding": "gzip"}, 415),
        ({"content-type": "application/json; charset=utf-8"}, 200),
        ({"content-type": "APPLICATION/JSON"}, 200),
        ({"content-type": "application/problem+json", "content-encoding": "Identity"}, 200),
        ({}, 200),
    ],
)
def test_bodies_are_json_unless_they_say_otherwise(server: Server, headers: dict[str, str], status: int) -> None:
    body = json.dumps({"instruction": SKY, "candidates": ["Yes"]})
    assert server.client.post("/v1/rank", content=body, headers=headers).status_code == status


def test_methods_and_paths_that_are_not_there(server: Server) -> None:
    refused = server.get("/v1/score")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    for path in ("/v1/score/", "//v1/score", "/v1/../v1/score", "/%00", "/v1/score%2f", "/" + "x" * 5000):
        connection = http.client.HTTPConnection(httpx.URL(server.url).host, httpx.URL(server.url).port)
        connection.request("POST", path, body="{}", headers={"content-type": "application/json"})
        assert connection.getresponse().status == 404, path
        connection.close()


@pytest.mark.slow
def test_a_name_with_a_slash_stands_in_kserves_paths(bundle: Path) -> None:
    with serving("--bundle", str(bundle), "--model-name", "org/model") as server:
        for name in ("org/model", "org%2Fmodel", "org%2fmodel"):
            path = f"/v2/models/{name}"
            assert server.get(path).json()["name"] == "org/model"
            assert server.get(f"{path}/ready").json() == {"name": "org/model", "ready": True}
            assert server.post(f"{path}/infer", TENSORS).json()["model_name"] == "org/model"
        for name in ("org", "model", "org/model/x"):
            for answer in (server.get(f"/v2/models/{name}"), server.post(f"/v2/models/{name}/infer", TENSORS)):
                assert answer.status_code == 404
                assert answer.json()["error"].startswith(f"model {name!r} is not served here, only org/model;")
        version = "/v2/models/org/model/versions/1"
        for answer in (
            *(server.get(path) for path in ("/v2/models/", version, f"{version}/ready")),
            *(server.post(path, TENSORS) for path in ("/v2/models//infer", f"{version}/infer")),
        ):
            assert answer.json()["error"].startswith("there is nothing at '/v2/models/")
        assert server.get("/v2/models/org/model/infer").headers["allow"] == "POST"
        assert server.post("/v2/models/org/model/ready", TENSORS).status_code == 405
        assert server.metric('cappy_requests_total{route="/v2/models/{name}/infer",status="200"}') == 3
        assert server.metric('cappy_requests_total{route="/v2/models/{name}",status="404"}') >= 3


def test_health_and_information(server: Server) -> None:
    assert server.get("/health").json() == {"status": "alive"}
    assert server.get("/ready").json() == {"status": "ready"}
    found = server.get("/info").json()
    assert (found["model"], found["names"], found["precision"]) == ("tiny", ["tiny", "other"], "int8")
    assert found["limits"]["max_pairs"] == 50
    assert found["version"] == __version__


def test_metrics_count_what_was_done_and_hold_no_text(server: Server) -> None:
    labels = '{device="cpu",precision="int8"}'
    before = {name: server.metric(f"cappy_{name}_total{labels}") for name in ("pairs", "tokens", "computed_tokens")}
    truncated = server.metric("cappy_truncated_pairs_total")
    answer = server.post("/v1/score", pairs_of(("a secret instruction", LONG), ("b", "c"))).json()
    after = {name: server.metric(f"cappy_{name}_total{labels}") for name in before}
    assert after["pairs"] - before["pairs"] == 2
    assert after["tokens"] - before["tokens"] == answer["tokens"]
    assert after["computed_tokens"] - before["computed_tokens"] >= answer["tokens"]
    assert server.metric("cappy_truncated_pairs_total") - truncated == 1
    assert server.metric("cappy_queue_pairs") == 0
    assert "secret" not in server.get("/metrics").text
    assert "secret" not in server.log


@pytest.mark.slow
def test_a_short_request_does_not_wait_until_long_texts_are_tokenised(bundle: Path) -> None:
    text = "word " * 190_000
    with serving("--bundle", str(bundle)) as server, ThreadPoolExecutor(4) as threads:
        long = [threads.submit(server.post, "/v1/score", pairs_of((SKY, f"{number} {text}"))) for number in range(4)]
        server.wait_until(lambda: server.metric("cappy_encoding_chars") > 3.5 * len(text))
        assert server.post("/v1/score", pairs_of((SKY, "Yes"))).status_code == 200
        assert server.metric("cappy_encoding_chars") > 0
        assert {future.result().status_code for future in long} == {200}


def test_requests_of_every_kind_are_counted_by_their_path(server: Server) -> None:
    kinds = ['route="/health",status="200"', 'route="other",status="404"', 'route="/v1/score",status="405"']
    kinds += ['route="/v2/models/{name}",status="404"', 'route="/v1/score",status="200"']
    for path in ("/health", "/nothing/1", "/nothing/2", "/v1/score", "/v2/models/gpt"):
        server.get(path)
    server.post("/v1/score", pairs_of((SKY, "Yes")))
    for kind in kinds:
        assert server.metric(f"cappy_requests_total{{{kind}}}") >= 1
    assert "nothing" not in server.get("/metrics").text
