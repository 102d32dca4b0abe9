"""KServe v2: tensors in JSON, and behind it as tritonclient sends them."""

from __future__ import annotations

import json
import struct
from functools import partial
from typing import Any

import numpy as np
import pytest

from cappy_engine.errors import InvalidRequest
from cappy_engine.serving.dialects import kserve
from cappy_engine.serving.requests import Reply
from tests.support.dialects import LONG, MODEL, refusal, reply_to, request_of, scores_of

SKY = "Is the sky blue?"
ANSWERS = ["Yes", "No", "Ja, größtenteils 🙂"]
PAIRS = [(SKY, answer) for answer in ANSWERS]


def tensor(name: str, texts: list[Any], shape: list[int] | None = None, **fields: object) -> dict[str, Any]:
    return {"name": name, "shape": shape or [len(texts)], "datatype": "BYTES", "data": texts} | fields


def body(*inputs: dict[str, Any], **fields: object) -> dict[str, Any]:
    return {"inputs": list(inputs)} | fields


PLAIN = body(tensor("instruction", [SKY]), tensor("response", ANSWERS))


def packed(texts: list[str]) -> bytes:
    encoded = [text.encode() for text in texts]
    return b"".join(struct.pack("<I", len(each)) + each for each in encoded)


def behind(head: dict[str, Any], *tensors: bytes) -> tuple[bytes, str]:
    """Put tensors behind a request's JSON; return the body, and the length of the JSON as the header has it."""
    for described, data in zip(head["inputs"], tensors, strict=True):
        del described["data"]
        described["parameters"] = {"binary_data_size": len(data)}
    text = json.dumps(head).encode()
    return text + b"".join(tensors), str(len(text))


def by_name(answer: Any) -> dict[str, Any]:
    return {each["name"]: each for each in answer["outputs"]}


def unpacked(reply: Reply) -> dict[str, Any]:
    """Read an answer with tensors behind it, as tritonclient does."""
    length = int(reply.headers[kserve.JSON_LENGTH_HEADER])
    answer, rest = json.loads(reply.body[:length]), reply.body[length:]
    found = {}
    for each in answer["outputs"]:
        size = each.get("parameters", {}).get("binary_data_size")
        if size is None:
            found[each["name"]] = each["data"]
        else:
            kind = {"FP32": "<f4", "INT64": "<i8", "BOOL": "?"}[each["datatype"]]
            found[each["name"]], rest = np.frombuffer(rest[:size], kind).tolist(), rest[size:]
    assert rest == b""
    return found


def test_tensors_in_json_are_answered_in_json() -> None:
    found = reply_to(kserve.read_infer, PLAIN | {"id": "42"})
    assert (found["model_name"], found["id"]) == ("cappy-mini", "42")
    outputs = by_name(found)
    assert outputs["score"] == {"name": "score", "datatype": "FP32", "shape": [3], "data": scores_of(PAIRS)}
    assert outputs["truncated"]["data"] == [False, False, False]
    assert [outputs["tokens"]["data"][0], outputs["tokens"]["datatype"]] == [10, "INT64"]
    assert "id" not in reply_to(kserve.read_infer, PLAIN)


def test_an_answer_has_the_shape_of_the_responses() -> None:
    rows = body(tensor("instruction", [[SKY]] * 3, [3, 1]), tensor("response", [[each] for each in ANSWERS], [3, 1]))
    flat = body(tensor("instruction", [SKY], [1, 1]), tensor("response", ANSWERS, [3, 1]))
    for asked in (rows, flat):
        assert request_of(kserve.read_infer, asked).pairs == PAIRS
        assert by_name(reply_to(kserve.read_infer, asked))["score"]["shape"] == [3, 1]


def test_tensors_behind_the_json_are_read_and_answered_so() -> None:
    """tritonclient asks for `binary_data_output` where it names no outputs."""
    head = body(tensor("response", ANSWERS), tensor("instruction", [SKY]), parameters={"binary_data_output": True})
    data, length = behind(head, packed(ANSWERS), packed([SKY]))
    read = partial(kserve.read_infer, json_length=length)
    reply = reply_to(read, data)
    assert isinstance(reply, Reply)
    assert reply.headers["content-type"] == "application/octet-stream"
    found = unpacked(reply)
    assert found["score"] == scores_of(PAIRS)
    assert found["truncated"] == [False] * 3
    assert found["tokens"][0] == 10


def test_only_the_outputs_that_are_asked_for_come_back() -> None:
    (score,) = reply_to(kserve.read_infer, PLAIN | {"outputs": [{"name": "score"}]})["outputs"]
    assert score["data"] == scores_of(PAIRS)
    both = [{"name": "tokens", "parameters": {"binary_data": False}}, {"name": "score"}]
    reply = reply_to(kserve.read_infer, PLAIN | {"outputs": both, "parameters": {"binary_data_output": True}})
    found = unpacked(reply)
    assert list(found) == ["tokens", "score"]
    assert found["score"] == scores_of(PAIRS)
    assert len(reply_to(kserve.read_infer, PLAIN | {"outputs": []})["outputs"]) == 3


def test_pairs_that_are_too_long_may_be_refused() -> None:
    asked = body(tensor("instruction", [SKY]), tensor("response", [LONG]))
    assert by_name(reply_to(kserve.read_infer, asked))["truncated"]["data"] == [True]
    assert request_of(kserve.read_infer, asked | {"parameters": {"too_long": "refuse"}}).too_long == "refuse"
    assert request_of(kserve.read_infer, asked | {"parameters": {"priority": 1, "timeout": 5}}).too_long == "truncate"


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (body(tensor("instruction", [SKY])), "$.inputs: expected `array` of length >= 2"),
        (
            body(*[tensor("response", ["a"])] * 2),
            "$.inputs: there are two tensors response; send instruction and response",
        ),
        (body(tensor("text", ["a"]), tensor("response", ["b"])), "$.inputs[0].name: invalid enum value 'text'"),
        (
            body(tensor("instruction", ["a"]), tensor("response", ["b"], datatype="FP32")),
            "$.inputs[1].datatype: invalid enum value 'FP32'",
        ),
        (
            body(tensor("instruction", ["a", "b"]), tensor("response", ANSWERS)),
            "$.inputs: instruction has 2 texts and response has 3; send one instruction for all, or as many",
        ),
        (
            body(tensor("instruction", ["a"]), tensor("response", ANSWERS, [2])),
            "$.inputs[1]: has 3 texts, and its shape is [2]",
        ),
        (body(tensor("instruction", ["a"]), tensor("response", ANSWERS, [1, 3])), "$.inputs[1].shape: is [1, 3];"),
        (
            body(tensor("instruction", ["a"]), tensor("response", [["b", "c"]], [1, 2])),
            "$.inputs[1].data[0]: has 2 texts;",
        ),
        (body(tensor("instruction", ["a"]), tensor("response", [], [0])), "$.inputs: a tensor has no text;"),
        (body(tensor("instruction", ["a"]), tensor("response", ["b"], data=None)), "$.inputs[1]: needs either data or"),
        (
            body(tensor("instruction", ["a"]), tensor("response", ["b"], parameters={"binary_data_size": 3})),
            "$.inputs[1]: needs either data or the parameter binary_data_size",
        ),
        (PLAIN | {"outputs": [{"name": "logits"}]}, "$.outputs[0].name: invalid enum value 'logits'"),
        (
            PLAIN | {"outputs": [{"name": "score", "parameters": {"classification": 1}}]},
            "$.outputs[0].parameters: object contains unknown field `classification`",
        ),
        (PLAIN | {"parameters": {"sequence_id": 1}}, "$.parameters: object contains unknown field `sequence_id`"),
    ],
    ids=str,
)
def test_what_is_not_two_tensors_of_texts_is_refused(asked: dict[str, Any], why: str) -> None:
    assert refusal(kserve.read_infer, asked).startswith(why)


TEXT = packed(["Yes"])


@pytest.mark.parametrize(
    ("response", "why"),
    [
        (TEXT[:-1], "text 0 ends behind the tensor's 6 bytes"),
        (TEXT + b"\x01", "text 1 ends behind the tensor's 8 bytes"),
        (b"\xff\xff\xff\xff" + b"Yes", "text 0 ends behind the tensor's 7 bytes"),
        (b"\x02\x00\x00\x00\xff\xfe", "text 0 is not UTF-8"),
        (packed(["\x00"]) + b"\x03\x00\x00\x00\xed\xa0\x80", "text 1 is not UTF-8"),
        (b"", "has 0 texts, and its shape is [1]"),
    ],
    ids=str,
)
def test_bytes_that_are_not_texts_are_refused(response: bytes, why: str) -> None:
    data, length = behind(body(tensor("instruction", [SKY]), tensor("response", ["Yes"])), packed([SKY]), response)
    found = refusal(partial(kserve.read_infer, json_length=length), data)
    assert found.startswith(f"$.inputs[1]: {why}")


def test_sizes_and_bytes_must_agree() -> None:
    data, length = behind(body(tensor("instruction", [SKY]), tensor("response", ["Yes"])), packed([SKY]), TEXT)
    read = partial(kserve.read_infer, json_length=length)
    assert request_of(read, data).pairs == [(SKY, "Yes")]
    assert refusal(read, data[:-1]) == "$.inputs[1]: binary_data_size is 7, and 6 bytes are left of the body"
    assert refusal(read, data + b"x").startswith("1 bytes are left behind the tensors")


@pytest.mark.parametrize("length", ["", "-1", "1.5", "ten", "٣", "9" * 30, "1000000"])
def test_a_length_of_the_json_that_cannot_be_is_refused(length: str) -> None:
    data, _ = behind(body(tensor("instruction", [SKY]), tensor("response", ["Yes"])), packed([SKY]), TEXT)
    with pytest.raises(InvalidRequest, match="Inference-Header-Content-Length is") as caught:
        kserve.read_infer(data, MODEL, length)
    assert caught.value.status == 400


def test_the_model_and_the_server_tell_what_they_take() -> None:
    assert kserve.describe_server("1.0").extensions == ["binary_tensor_data"]
    described = kserve.describe_model(MODEL)
    assert [(each.name, each.datatype, each.shape) for each in (*described.inputs, *described.outputs)] == [
        ("instruction", "BYTES", [-1]),
        ("response", "BYTES", [-1]),
        ("score", "FP32", [-1]),
        ("tokens", "INT64", [-1]),
        ("truncated", "BOOL", [-1]),
    ]
