"""`cappy`, with a fault in its model from when a file exists: `python -m tests.support.faulty_cappy FAULT FILE ...`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from cappy_engine.batching import Scores
from cappy_engine.cli.main import main
from cappy_engine.errors import ScoringError
from cappy_engine.options import ScorerOptions
from cappy_engine.scorer import Scorer
from cappy_engine.session import Inputs, OrtSession

POISON = "poison"
"""With the fault of this name, a pair of exactly POISON_TOKENS tokens fails in the model."""
POISON_TOKENS = 23


def install(fault: str, trigger: Path) -> None:
    """Give every session the fault."""
    run, open_with = OrtSession.run, Scorer.open_with

    def faulty(self: OrtSession, inputs: Inputs) -> Scores:
        if trigger.exists():
            if fault == "fails":
                raise ScoringError("the device is gone")
            if fault == "wrong":
                return np.full(len(inputs["input_ids"]), 0.123, dtype=np.float32)
            if fault == "slow":
                time.sleep(0.2)
            if fault == "hangs":  # once
                trigger.unlink()
                time.sleep(60)
            if fault == POISON and (inputs["attention_mask"].sum(axis=1) == POISON_TOKENS).any():
                raise ScoringError("this pair is poison")
        return run(self, inputs)

    OrtSession.run = faulty  # type: ignore[method-assign]
    if fault == "open-bug":

        def fail_to_open(bundle: str | Path, options: ScorerOptions) -> Scorer:
            if trigger.exists():
                raise ZeroDivisionError("a mistake")
            return open_with(bundle, options)

        Scorer.open_with = fail_to_open  # type: ignore[method-assign,assignment]
    if fault == "slow-open":

        def open_slowly(bundle: str | Path, options: ScorerOptions) -> Scorer:
            if trigger.exists():  # the next one is opened after the seconds in the file
                seconds = float(trigger.read_text())
                trigger.unlink()
                time.sleep(seconds)
            return open_with(bundle, options)

        Scorer.open_with = open_slowly  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    install(sys.argv[1], Path(sys.argv[2]))
    raise SystemExit(main(sys.argv[3:]))
