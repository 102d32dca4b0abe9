"""List the families of encoders whose graphs are written from their weights, operator by operator.

A family is a module that writes its graph, and an entry here. What has none is exported by optimum (`optimum.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx

from cappy_export.graphs import bert_cpu, deberta_cpu, modernbert_cpu
from cappy_export.graphs.parts import LAYOUTS
from cappy_export.graphs.writer import Weights, has_known_layers


@dataclass(frozen=True)
class Family:
    """A family: `is_known` tells whether the graph of a config can be written, `write` writes it with the weights."""

    is_known: Callable[[Mapping[str, Any]], bool]
    write: Callable[[Any, Weights], onnx.ModelProto]


FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(LAYOUTS, Family(has_known_layers, bert_cpu.encoder_model)),
    "modernbert": Family(modernbert_cpu.is_known, modernbert_cpu.encoder_model),
    "deberta-v2": Family(deberta_cpu.is_known, deberta_cpu.encoder_model),
}
"""The families by the model types of their configs."""


def family_of(config: Mapping[str, Any]) -> Family | None:
    """Find the family that can write the graph of a config.json; None if there is none.

    >>> family_of({"model_type": "bert", "hidden_act": "silu"}) is None
    True
    """
    family = FAMILIES.get(config["model_type"])
    return family if family is not None and family.is_known(config) else None
