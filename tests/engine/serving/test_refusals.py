"""What a client is told that is refused: which limit or field it is, where, and what may be sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cappy_engine.errors import InvalidPair
from cappy_engine.serving.dialects.surrogates import check_surrogates
from tests.support.servers import Server, faulty, pairs_of, serving

SKY = "Is the sky blue?"


@pytest.fixture(scope="module")
def busy(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Give a server whose model hangs, with 29 pairs behind the one that runs."""
    trigger = tmp_path_factory.mktemp("busy") / "trigger"
    options = "--threads 1 --max-queue-pairs 31 --max-queue-tokens 400 --step-tokens 8 --drain-seconds 0"
    with (
        ThreadPoolExecutor(1) as threads,
        serving("--bundle", str(bundle), *options.split(), command=faulty("hangs", trigger)) as running,
    ):
        trigger.touch()
        asked = threads.submit(running.post, "/v1/score", pairs_of(*[(SKY, str(number)) for number in range(30)]))
        running.wait_until(lambda: running.metric("cappy_queue_pairs") == 29)
        yield running
        running.stop()
        assert asked.result().status_code == 503


@pytest.mark.slow
@pytest.mark.parametrize(
    ("texts", "why"),
    [
        ([(SKY, "a"), (SKY, "b"), (SKY, "c")], "; 3 more do not fit into max_queue_pairs, 31. "),
        ([(SKY * 100, "a")], " tokens, do not fit into max_queue_tokens, 400. "),
    ],
)
def test_who_comes_when_a_queue_is_full_hears_which_limit_it_is(
    busy: Server, texts: list[tuple[str, str]], why: str
) -> None:
    refused = busy.post("/v1/score", pairs_of(*texts))
    tokens = int(busy.metric("cappy_queue_tokens"))
    start = f"the server is busy: 29 pairs wait or become tokens, with about {tokens} tokens; {len(texts)} more"
    assert (refused.status_code, refused.json()["error_type"]) == (429, "overloaded")
    assert refused.json()["error"].startswith(start)
    assert why in refused.json()["error"]


def posted(server: Server, path: str, body: bytes, kind: str = "application/json") -> tuple[int, dict[str, Any]]:
    """Post bytes; return the status and the document of the answer."""
    answer = server.client.post(path, content=body, headers={"content-type": kind})
    return answer.status_code, answer.json()


def tensors(*responses: str) -> dict[str, Any]:
    """Make a request of KServe's, whose response comes first."""
    texts = {"response": list(responses), "instruction": [SKY]}
    return {
        "inputs": [
            {"name": name, "shape": [len(data)], "datatype": "BYTES", "data": data} for name, data in texts.items()
        ]
    }


HALF = "Yes \ud83d"
"""What is left of a text that ends in an emoji, if it is cut by its length in UTF-16."""
INFER = "/v2/models/tiny/infer"
CUT = [
    ("/v1/score", pairs_of((SKY, "Yes"), (SKY, HALF)), 1, "$.pairs[1].response"),
    ("/v1/score", pairs_of((HALF, "Yes")), 0, "$.pairs[0].instruction"),
    ("/v1/score", pairs_of((SKY, "\U0001f600"), (HALF + "\\", "Yes")), 1, "$.pairs[1].instruction"),
    ("/v1/score", {"text_1": SKY, "text_2": ["Yes", "No", HALF]}, 2, "$.text_2[2]"),
    ("/score", {"queries": HALF, "documents": ["Yes"]}, 0, "$.queries"),
    ("/v1/rank", {"instruction": SKY, "candidates": ["Yes", "No", HALF, "No"]}, 2, "$.candidates[2]"),
    ("/v1/rank", {"instruction": HALF, "candidates": ["Yes"]}, 0, "$.instruction"),
    ("/rerank", {"query": SKY, "texts": ["Yes", HALF]}, 1, "$.texts[1]"),
    ("/v2/rerank", {"query": SKY, "documents": ["Yes", {"text": HALF}]}, 1, "$.documents[1].text"),
    ("/predict", {"inputs": [SKY, HALF]}, 0, "$.inputs[1]"),
    ("/predict", {"inputs": [[SKY, "Yes"], [SKY, "No"], [HALF, "No"]]}, 2, "$.inputs[2][0]"),
    (INFER, tensors("Yes", HALF), 1, "$.inputs[0].data[1]"),
]


@pytest.mark.parametrize(("path", "body", "pair", "where"), CUT)
def test_half_of_a_character_is_told_with_its_pair(
    server: Server, path: str, body: dict[str, Any], pair: int, where: str
) -> None:
    status, answer = posted(server, path, json.dumps(body).encode())
    assert (status, answer["pair"], answer["error_type"]) == (422, pair, "validation")
    problem = "has a lone surrogate '\\ud83d' at character 4; it is not valid Unicode"
    assert answer["error"] == f"pair {pair}: {where} {problem}"


@pytest.mark.parametrize(
    ("path", "body", "where"),
    [
        ("/v2/rerank", {"query": SKY, "documents": ["Yes"], "model": HALF}, "$.model"),
        ("/v2/rerank", {"query": SKY, "documents": ["Yes"], "rank_fields": ["text", HALF]}, "$.rank_fields[1]"),
        ("/v1/score", pairs_of((SKY, "Yes")) | {"too_long": HALF}, "$.too_long"),
        (INFER, tensors("Yes") | {"id": HALF}, "$.id"),
        ("/v1/rank", {HALF: 1}, "a field of $"),
        (
            "/v2/rerank",
            {"query": SKY, "documents": ["Yes"], "chat_template_kwargs": {"a b" * 500: [{HALF: 1}]}},
            "a field of $.chat_template_kwargs[...][0]",
        ),
        (INFER, tensors("Yes") | {"inputs": [{HALF: 1}]}, "a field of $.inputs[0]"),
        ("/v1/rank", HALF, "$"),
    ],
)
def test_half_of_a_character_that_is_in_no_pair_is_told_with_its_field(
    server: Server, path: str, body: object, where: str
) -> None:
    status, answer = posted(server, path, json.dumps(body).encode())
    assert (status, answer["pair"]) == (422, None)
    assert answer["error"] == f"{where}: has a lone surrogate '\\ud83d' at character 4; it is not valid Unicode"


@pytest.mark.parametrize("body", [b'{"pairs": ["\\ud83d", NaN, ', b'{"pairs": "\\ud83', b'{"pairs": "\\ud83d\\u"}'])
def test_what_is_no_json_besides_is_not_json(server: Server, body: bytes) -> None:
    status, answer = posted(server, "/v1/score", body)
    assert (status, answer["pair"]) == (400, None)
    assert answer["error"].startswith("the body is not JSON: ")


@pytest.mark.parametrize("filler", [b"[],", b"{},", b'"",', b"0,", b"[" * 100 + b"0" + b"]" * 100 + b","])
def test_half_of_a_character_is_found_in_a_large_body(filler: bytes) -> None:
    """Each value is looked at once, however many there are, and however deep: others wait meanwhile."""
    count = 2**20 // len(filler)
    with pytest.raises(InvalidPair, match=f"pair {count}: .*has a lone surrogate"):
        check_surrogates(b'{"pairs": [' + filler * count + b'"\\ud83d"]}')


def test_a_body_that_is_not_utf8_says_where_it_is_not(server: Server) -> None:
    body = json.dumps(pairs_of((SKY, "Ja, größtenteils")), ensure_ascii=False).encode("latin-1")
    status, answer = posted(server, "/v1/score", body)
    assert (status, answer["pair"]) == (400, None)
    where = body.index(b"\xf6")
    assert answer["error"] == f"the body is not UTF-8: byte 0xf6 at offset {where}; send JSON in UTF-8"


@pytest.mark.parametrize(
    ("path", "body", "why"),
    [
        ("/v1/score", pairs_of((SKY, "a")) | {"too_long": "x"}, "$.too_long: {}; it may be refuse, truncate"),
        (
            INFER,
            tensors("a") | {"outputs": [{"name": "x"}]},
            "$.outputs[0].name: {}; it may be score, tokens, truncated",
        ),
        (
            INFER,
            tensors("a") | {"parameters": {"too_long": "x"}},
            "$.parameters.too_long: {}; it may be refuse, truncate",
        ),
        (INFER, {"inputs": [{"name": "x"}] * 2}, "$.inputs[0].name: {}; it may be instruction, response"),
        (INFER, {"inputs": [{"datatype": "x"}] * 2}, "$.inputs[0].datatype: {}; it may be BYTES"),
        (
            "/rerank",
            {"query": SKY, "texts": ["a"], "truncation_direction": "x"},
            "$.truncation_direction: {}; it may be Left, Right, left, right",
        ),
        ("/score", {"text_1": SKY, "text_2": "a", "truncation_side": "x"}, "$.truncation_side: {}; it may be right"),
    ],
)
def test_what_may_be_sent_is_said_where_it_is_one_of_few(
    server: Server, path: str, body: dict[str, Any], why: str
) -> None:
    status, answer = posted(server, path, json.dumps(body).encode())
    assert (status, answer["error"]) == (422, why.format("invalid enum value 'x'"))


@pytest.mark.parametrize(
    "kind",
    [
        "application/json; charset=latin-1",
        'Application/JSON ; CharSet = "ISO-8859-1"',
        "application/json; charset=utf-8; charset=utf-16",
        "application/vnd.api+json;charset=UTF-16",
        "application/json; charset=",
    ],
)
def test_a_body_in_another_charset_is_refused(server: Server, kind: str) -> None:
    for path, body in (("/v1/score", pairs_of((SKY, "Yes"))), (INFER, tensors("Yes"))):
        status, answer = posted(server, path, json.dumps(body).encode(), kind)
        assert (status, answer["error_type"]) == (415, "validation")
        assert answer["error"].endswith("bodies are UTF-8; send it so, with 'Content-Type: application/json'")


@pytest.mark.parametrize(
    "kind",
    [
        "application/json; charset=utf-8",
        'application/json;CHARSET="UTF-8"',
        "application/json; charset=utf8",
        "application/json; charset='utf-8', application/json",
        "application/json; charset=US-ASCII; x=latin-1",
        "application/json; profile=charset",
        "application/json;",
    ],
)
def test_a_body_in_utf8_may_say_so(server: Server, kind: str) -> None:
    assert posted(server, "/v1/score", json.dumps(pairs_of((SKY, "Yes"))).encode(), kind)[0] == 200
