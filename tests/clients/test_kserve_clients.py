"""NVIDIA's tritonclient, over HTTP: tensors behind the JSON, which is its default, and in it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.clients.conftest import DOCUMENTS, QUESTION, Server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as opened:
        yield opened


def tensors(rows: list[list[str]], *, is_binary: bool) -> list[triton.InferInput]:
    found = []
    for name, texts in zip(("instruction", "response"), rows, strict=True):
        tensor = triton.InferInput(name, [len(texts)], "BYTES")
        tensor.set_data_from_numpy(np.array(texts, dtype=np.object_), binary_data=is_binary)
        found.append(tensor)
    return found


@pytest.mark.parametrize("sends_binary", [True, False])
@pytest.mark.parametrize("wants", [None, True, False], ids=["all", "binary", "json"])
def test_tensors_are_scored(
    server: Server, client: triton.InferenceServerClient, sends_binary: bool, wants: bool | None
) -> None:
    outputs = None if wants is None else [triton.InferRequestedOutput("score", binary_data=wants)]
    rows = [[QUESTION] * len(DOCUMENTS), DOCUMENTS]
    found = client.infer(
        "cappy-mini",
        tensors(rows, is_binary=sends_binary),
        outputs=outputs,
        request_id="7",
        headers=server.headers,
        timeout=10_000_000,
    )
    assert found.as_numpy("score").astype(np.float64).tolist() == server.scores
    assert found.get_response()["id"] == "7"
    if wants is None:
        assert found.as_numpy("truncated").tolist() == [False] * (len(DOCUMENTS) - 1) + [True]
        assert found.as_numpy("tokens").dtype == np.int64
    else:
        assert found.as_numpy("truncated") is None


def test_one_instruction_is_enough(server: Server, client: triton.InferenceServerClient) -> None:
    found = client.infer("cappy-mini", tensors([[QUESTION], DOCUMENTS], is_binary=True), headers=server.headers)
    assert found.as_numpy("score").astype(np.float64).tolist() == server.scores


def test_the_server_and_the_model_are_described(server: Server, client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("cappy-mini", headers=server.headers)
    assert not client.is_model_ready("resnet", headers=server.headers)
    assert "binary_tensor_data" in client.get_server_metadata(headers=server.headers)["extensions"]
    assert [each["name"] for each in client.get_model_metadata("cappy-mini", headers=server.headers)["inputs"]] == [
        "instruction",
        "response",
    ]


def test_the_client_tells_what_is_wrong(server: Server, client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="is not served here, only cappy-mini"):
        client.infer("resnet", tensors([[QUESTION], DOCUMENTS], is_binary=True), headers=server.headers)
    with pytest.raises(InferenceServerException, match="instruction has 2 texts and response has 1"):
        client.infer("cappy-mini", tensors([["a", "b"], ["c"]], is_binary=True), headers=server.headers)
    with pytest.raises(InferenceServerException, match="the API key is missing"):
        client.infer("cappy-mini", tensors([[QUESTION], DOCUMENTS], is_binary=True))
