"""Where the tests find the clone, cappy-mini's checkpoint, and real data where there are some."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "export" / "cappy_mini" / "checkpoint"
"""The checkpoint of cappy-mini: small, with really trained weights."""
DATA = Path(os.environ.get("CAPPY_DATA", ROOT.parent / "shared" / "data"))
"""Real data, where present: the genuine RoBERTa tokenizer and PromptSource pairs."""
