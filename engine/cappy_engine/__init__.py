"""Score (instruction, response) pairs with Cappy, on ONNX Runtime.

>>> from cappy_engine import Scorer
>>> with Scorer.open("bundle") as scorer:
...     scores = scorer.score([("Is the sky blue?", "Yes"), ("Is the sky blue?", "No")])
...     best = scorer.rank("Is the sky blue?", ["Yes", "No"])[0]
"""

import os

from cappy_engine.batching import EncodedPairs
from cappy_engine.errors import (
    AdaptError,
    BenchmarkError,
    BundleError,
    CappyError,
    CheckpointError,
    DeadlinePassed,
    DeviceUnavailable,
    ExportError,
    GraphError,
    InstallationError,
    InvalidLine,
    InvalidPair,
    InvalidRequest,
    ModelBroken,
    NotReady,
    OutputError,
    ParityError,
    PrecisionUnavailable,
    QueueClosed,
    QueueFull,
    SampleError,
    ScoringError,
    ServingError,
)
from cappy_engine.options import ScorerInfo, ScorerOptions
from cappy_engine.ranking import Candidate
from cappy_engine.scored import Scored
from cappy_engine.scorer import Scorer

# ONNX Runtime reads it when it is imported, and no module that is imported above does that. Child processes inherit it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
__all__ = [
    "AdaptError",
    "BenchmarkError",
    "BundleError",
    "Candidate",
    "CappyError",
    "CheckpointError",
    "DeadlinePassed",
    "DeviceUnavailable",
    "EncodedPairs",
    "ExportError",
    "GraphError",
    "InstallationError",
    "InvalidLine",
    "InvalidPair",
    "InvalidRequest",
    "ModelBroken",
    "NotReady",
    "OutputError",
    "ParityError",
    "PrecisionUnavailable",
    "QueueClosed",
    "QueueFull",
    "SampleError",
    "Scored",
    "Scorer",
    "ScorerInfo",
    "ScorerOptions",
    "ScoringError",
    "ServingError",
    "__version__",
]
