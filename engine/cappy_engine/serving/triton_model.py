"""Score what NVIDIA's Triton batches: its Python backend calls this in a process of its own, for each model instance.

`cappy triton` writes a model.py that imports the class. Triton's own module exists only where Triton calls.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from cappy_engine.batching import EncodedPairs
from cappy_engine.canary import read_canary
from cappy_engine.errors import InvalidPair, ScoringError
from cappy_engine.options import ScorerOptions
from cappy_engine.pairs import TooLong
from cappy_engine.scored import Scored
from cappy_engine.scorer import Scorer
from cappy_engine.serving.ready_check import check_scores

BUNDLE_FOLDER = "bundle"
OPTIONS, TOO_LONG = "options", "too_long"
"""Names of the parameters in config.pbtxt."""
log = logging.getLogger(__name__)


class TritonPythonModel:
    """Scores the pairs of requests: `instruction` and `response`, (n, 1) BYTES in UTF-8, become `score` and others."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle beside model.py, and check its scores; Triton serves no request before."""
        import triton_python_backend_utils as pb_utils

        self._triton: Any = pb_utils
        config = json.loads(args["model_config"])["parameters"]
        options = ScorerOptions.from_json(config[OPTIONS]["string_value"])
        if args["model_instance_kind"] == "GPU":
            options = dataclasses.replace(options, gpus=(int(args["model_instance_device_id"]),))
        self._too_long = cast(TooLong, config[TOO_LONG]["string_value"])
        bundle = Path(args["model_repository"]) / args["model_version"] / BUNDLE_FOLDER
        self._scorer = Scorer.open_with(bundle, options)
        info, manifest = self._scorer.info, self._scorer.exact.bundle.manifest
        check_scores(read_canary(manifest.document, info.device, info.precision), self._scorer.dispatcher.run)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Score requests together, and answer each; a bad one has an error of its own, and the others their scores."""
        answers: list[Any] = [None] * len(requests)
        encoded: dict[int, EncodedPairs] = {}
        for place, request in enumerate(requests):
            if request.is_cancelled():
                answers[place] = self._error("the client gave the request up", "CANCELLED")
                continue
            try:
                encoded[place] = self._scorer.encode(self._pairs(request), too_long=self._too_long)
            except (InvalidPair, UnicodeDecodeError) as error:
                answers[place] = self._error(str(error), "INVALID_ARG")
        while encoded:
            starts = np.cumsum([0, *map(len, encoded.values())])
            try:
                found = self._scorer.score_encoded(EncodedPairs.joined(list(encoded.values())))
            except ScoringError as error:
                log.warning("%s", error)
                if error.index is None:
                    guilty = list(encoded)
                else:
                    guilty = [list(encoded)[int(np.searchsorted(starts, error.index, side="right")) - 1]]
                for place in guilty:
                    answers[place] = self._error(error.problem, "INTERNAL")
                    del encoded[place]
                continue
            for place, start, end in zip(encoded, starts[:-1], starts[1:], strict=True):
                answers[place] = self._answer(found, slice(start, end))
            break
        return answers

    def finalize(self) -> None:
        """Free the model."""
        self._scorer.close()

    def _pairs(self, request: Any) -> list[tuple[str, str]]:
        """Read the texts of a request."""
        columns = []
        for name in ("instruction", "response"):
            tensor = self._triton.get_input_tensor_by_name(request, name)
            columns.append([text.decode() for text in tensor.as_numpy().reshape(-1)])
        return list(zip(*columns, strict=True))

    def _answer(self, found: Scored, rows: slice) -> Any:
        outputs = {
            "score": found.scores[rows],
            "truncated": found.truncated[rows],
            "tokens": found.token_counts[rows].astype(np.int32),
        }
        tensors = [self._triton.Tensor(name, values.reshape(-1, 1)) for name, values in outputs.items()]
        return self._triton.InferenceResponse(output_tensors=tensors)

    def _error(self, message: str, code: str) -> Any:
        number = getattr(self._triton.TritonError, code, None)  # CANCELLED came later than the others
        error = self._triton.TritonError(message) if number is None else self._triton.TritonError(message, number)
        return self._triton.InferenceResponse(output_tensors=[], error=error)
