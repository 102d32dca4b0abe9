"""Make tests/support/tiny-bundle: every target, every precision, random weights, under 500 kB.

    python -m tests.support.make_tiny_bundle OUT

Tests do not run this. The committed bundle stands for those that people exported earlier: it must keep loading, and its
scores must stay (tests/engine/test_old_bundle.py). A new one is committed beside it when the schema's version grows.
Only its canary's tolerances for the CPU were added since: every bundle that is served has them.

Most of its bytes are embeddings: each of 8 models holds 514 positions and the vocabulary, 8 numbers each.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from cappy_bench.make_checkpoint import make_checkpoint
from cappy_engine.bundle import PRECISIONS, TARGETS
from cappy_export import ExportOptions, export

WORDS = 600
"""The vocabulary: 256 bytes, 5 special tokens, and what the parity pairs have most of."""


def make_tiny_bundle(out: Path) -> None:
    """Write the bundle to the folder `out`, which must not exist."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(Path(folder) / "minimal", size="minimal", vocab_size=WORDS)
        export(checkpoint, out, ExportOptions(precisions=PRECISIONS, targets=tuple(TARGETS)))


if __name__ == "__main__":
    make_tiny_bundle(Path(sys.argv[1]))
