"""Read KServe v2 inference requests (the Open Inference Protocol), and write their answers. Knows nothing of HTTP.

A request has two tensors of texts, `instruction` and `response`; an answer has `score`, `tokens` and `truncated`.
Tensors stand in the JSON, or behind it (the binary tensor data extension, which tritonclient uses by default).
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import UNSET, Meta, UnsetType

from cappy_engine.errors import InvalidRequest
from cappy_engine.pairs import Pair, TooLong
from cappy_engine.serving.dialects.reading import decoded
from cappy_engine.serving.dialects.tensors import flattened, split_body, texts_of
from cappy_engine.serving.requests import Reply, ScoringRequest, ScoringResult, ServedModel

JSON_LENGTH_HEADER = "inference-header-content-length"
"""How many bytes of a body are JSON; tensors follow."""
INPUTS = ("instruction", "response")
OUTPUTS = {"score": "FP32", "tokens": "INT64", "truncated": "BOOL"}

Shape = Annotated[
    list[Annotated[int, Meta(ge=0)]], Meta(min_length=1, max_length=2, description="[n] or [n, 1].", examples=[[1]])
]


class InputParameters(msgspec.Struct, forbid_unknown_fields=True):
    """`binary_data_size` says how many bytes of a tensor follow the JSON."""

    binary_data_size: Annotated[int, Meta(ge=0)] | None = None


class InputTensor(msgspec.Struct, forbid_unknown_fields=True):
    """A tensor of texts."""

    name: Literal["instruction", "response"]
    shape: Shape
    datatype: Literal["BYTES"]
    data: Annotated[list[str | list[str]] | None, Meta(description="The texts, unless they follow the JSON.")] = None
    parameters: InputParameters | None = None


class OutputParameters(msgspec.Struct, forbid_unknown_fields=True):
    """`binary_data` says whether a tensor follows the JSON of the answer."""

    binary_data: bool | None = None


class WantedOutput(msgspec.Struct, forbid_unknown_fields=True):
    """A tensor that the answer shall have."""

    name: Literal["score", "tokens", "truncated"]
    parameters: OutputParameters | None = None


class InferParameters(msgspec.Struct, forbid_unknown_fields=True):
    """What holds for a whole request."""

    binary_data_output: Annotated[
        bool | None, Meta(description="Whether all tensors follow the JSON of the answer.")
    ] = None
    too_long: Annotated[
        Literal["truncate", "refuse"], Meta(description="What happens to pairs with more tokens than the model takes.")
    ] = "truncate"
    priority: Annotated[int, Meta(description="Ignored: it cannot change a score.")] | None = None
    timeout: Annotated[int, Meta(description="Ignored: the server has its own limit.")] | None = None


class InferRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The tensors `instruction` and `response`: one instruction for all responses, or as many."""

    inputs: Annotated[list[InputTensor], Meta(min_length=2, max_length=2)]
    id: Annotated[str | None, Meta(description="Comes back in the answer.")] = None
    outputs: Annotated[list[WantedOutput] | None, Meta(description="null or empty: all.")] = None
    parameters: InferParameters | None = None


class OutputSize(msgspec.Struct, frozen=True):
    """How many bytes of a tensor follow the JSON."""

    binary_data_size: Annotated[int, Meta(ge=0)]


class OutputTensor(msgspec.Struct, frozen=True):
    """A tensor with one value for each pair, in the shape of `response`."""

    name: Literal["score", "tokens", "truncated"]
    datatype: Literal["FP32", "INT64", "BOOL"]
    shape: list[Annotated[int, Meta(ge=0)]]
    data: list[float | int | bool] | UnsetType = UNSET
    parameters: OutputSize | UnsetType = UNSET


class InferAnswer(msgspec.Struct, frozen=True):
    """The tensors that were asked for."""

    model_name: str
    outputs: list[OutputTensor]
    id: str | UnsetType = UNSET


class TensorMetadata(msgspec.Struct, frozen=True):
    """What a tensor is; -1 stands for any count."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(msgspec.Struct, frozen=True):
    """What the model takes and gives."""

    name: str
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerMetadata(msgspec.Struct, frozen=True):
    """What the server is."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(msgspec.Struct, frozen=True):
    """Whether the server runs."""

    live: bool


class ServerReady(msgspec.Struct, frozen=True):
    """Whether the server can score."""

    ready: bool


class ModelReady(msgspec.Struct, frozen=True):
    """Whether the model can score."""

    name: str
    ready: bool


def describe_server(version: str) -> ServerMetadata:
    """Tell what the server is.

    >>> describe_server("1.0").name
    'cappy'
    """
    return ServerMetadata("cappy", version, ["binary_tensor_data"])


def describe_model(model: ServedModel) -> ModelMetadata:
    """Tell what the model takes and gives.

    >>> describe_model(model).inputs[0]
    TensorMetadata(name='instruction', datatype='BYTES', shape=[-1])
    """
    return ModelMetadata(
        name=model.name,
        platform="onnx_onnxv1",
        inputs=[TensorMetadata(name, "BYTES", [-1]) for name in INPUTS],
        outputs=[TensorMetadata(name, datatype, [-1]) for name, datatype in OUTPUTS.items()],
    )


def read_infer(body: bytes, model: ServedModel, json_length: str | None = None) -> ScoringRequest:
    """Read the tensors of an inference request; `json_length` is the value of the header JSON_LENGTH_HEADER.

    Raises InvalidRequest. The caller checks the model's name, which stands in the path.

        >>> read_infer(tensor_request, model).pairs
        [('Is the sky blue?', 'Yes')]
    """
    head, rest = split_body(body, json_length)
    asked = decoded(head, InferRequest)
    tensors = {tensor.name: tensor for tensor in asked.inputs}
    if len(tensors) != len(INPUTS):
        raise InvalidRequest(f"$.inputs: there are two tensors {asked.inputs[0].name}; send instruction and response")
    texts = _texts(asked.inputs, rest)
    pairs = _pairs(texts["instruction"], texts["response"])
    shape = [len(pairs), 1] if len(tensors["response"].shape) == 2 else [len(pairs)]
    too_long: TooLong = asked.parameters.too_long if asked.parameters else "truncate"
    return ScoringRequest(pairs, partial(_answer, asked, shape), too_long)


def _texts(tensors: list[InputTensor], rest: bytes) -> dict[str, list[str]]:
    """Read the texts of each tensor, from the JSON or the bytes after it."""
    found: dict[str, list[str]] = {}
    for place, tensor in enumerate(tensors):
        where = f"$.inputs[{place}]"
        size = tensor.parameters.binary_data_size if tensor.parameters else None
        if (size is None) == (tensor.data is None):
            raise InvalidRequest(f"{where}: needs either data or the parameter binary_data_size")
        if size is None:
            texts = flattened(where, tensor.data or [])
        elif size > len(rest):
            raise InvalidRequest(f"{where}: binary_data_size is {size}, and {len(rest)} bytes are left of the body")
        else:
            texts, rest = texts_of(where, rest[:size]), rest[size:]
        if len(tensor.shape) == 2 and tensor.shape[1] != 1:
            raise InvalidRequest(f"{where}.shape: is {tensor.shape}; send [n] or [n, 1]")
        if len(texts) != tensor.shape[0]:
            raise InvalidRequest(f"{where}: has {len(texts)} texts, and its shape is {tensor.shape}")
        found[tensor.name] = texts
    if rest:
        raise InvalidRequest(f"{len(rest)} bytes are left behind the tensors; no binary_data_size names them")
    return found


def _pairs(instructions: list[str], responses: list[str]) -> list[Pair]:
    if not instructions or not responses:
        raise InvalidRequest("$.inputs: a tensor has no text; send at least one instruction and one response")
    if len(instructions) == 1:
        instructions = instructions * len(responses)
    if len(instructions) != len(responses):
        raise InvalidRequest(
            f"$.inputs: instruction has {len(instructions)} texts and response has {len(responses)}; send one "
            "instruction for all, or as many"
        )
    return list(zip(instructions, responses, strict=True))


def _answer(asked: InferRequest, shape: list[int], result: ScoringResult) -> InferAnswer | Reply:
    scored = result.scored
    values: dict[str, npt.NDArray[Any]] = {
        "score": scored.scores.astype("<f4"),
        "tokens": scored.token_counts.astype("<i8"),
        "truncated": scored.truncated.astype(np.bool_),
    }
    outputs: list[OutputTensor] = []
    behind: list[bytes] = []
    for name, is_binary in _wanted(asked).items():
        data = values[name].tobytes() if is_binary else UNSET
        outputs.append(
            OutputTensor(
                name=name,
                datatype=OUTPUTS[name],  # type: ignore[arg-type]
                shape=shape,
                data=UNSET if is_binary else values[name].tolist(),
                parameters=UNSET if data is UNSET else OutputSize(len(data)),
            )
        )
        behind += [] if data is UNSET else [data]
    answer = InferAnswer(result.model.name, outputs, asked.id if asked.id is not None else UNSET)
    if not behind:
        return answer
    head = msgspec.json.encode(answer)
    headers = {"content-type": "application/octet-stream", JSON_LENGTH_HEADER: str(len(head))}
    return Reply(b"".join([head, *behind]), headers)


def _wanted(asked: InferRequest) -> dict[Literal["score", "tokens", "truncated"], bool]:
    """Name the tensors of the answer, and whether each follows the JSON."""
    default = bool(asked.parameters and asked.parameters.binary_data_output)
    names: list[Literal["score", "tokens", "truncated"]] = ["score", "tokens", "truncated"]
    if not asked.outputs:
        return dict.fromkeys(names, default)
    found: dict[Literal["score", "tokens", "truncated"], bool] = {}
    for each in asked.outputs:
        is_binary = each.parameters.binary_data if each.parameters else None
        found[each.name] = default if is_binary is None else is_binary
    return found
