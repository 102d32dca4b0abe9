"""Show a request of each dialect; the OpenAPI page has them, and a test sends them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cappy_engine.serving.dialects import cohere, kserve, native, tei, vllm

QUESTION = "Is the sky blue?"
ANSWERS = ["Yes", "No, it is green"]

EXAMPLES: Mapping[Any, object] = {
    native.ScoreRequest: {"pairs": [{"instruction": QUESTION, "response": answer} for answer in ANSWERS]},
    native.RankRequest: {"instruction": QUESTION, "candidates": ANSWERS, "top_n": 1},
    tei.TeiRerankRequest: {"query": QUESTION, "texts": ANSWERS, "raw_scores": True, "return_text": True},
    tei.TeiPredictRequest: {"inputs": [[QUESTION, answer] for answer in ANSWERS], "raw_scores": True},
    cohere.RerankRequest: {"query": QUESTION, "documents": ANSWERS, "top_n": 1, "return_documents": True},
    vllm.VllmTextRequest: {"text_1": QUESTION, "text_2": ANSWERS},
    vllm.VllmDocumentsRequest: {"queries": QUESTION, "documents": ANSWERS},
    vllm.VllmItemsRequest: {"queries": QUESTION, "items": ANSWERS},
    vllm.VllmDataRequest: {"data_1": QUESTION, "data_2": ANSWERS},
    kserve.InferRequest: {
        "inputs": [
            {"name": "instruction", "shape": [1], "datatype": "BYTES", "data": [QUESTION]},
            {"name": "response", "shape": [2], "datatype": "BYTES", "data": ANSWERS},
        ]
    },
}
"""A request by its type."""
