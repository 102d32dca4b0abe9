"""One checkpoint with the mean of several checkpoints' weights.

    python -m training.average ONE OTHER OUT

Trainings that began at the same checkpoint, but saw other data or other noise, err differently; the mean of their
weights is often better than each (model soups, arXiv 2203.05482). All but the weights is taken from ONE.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def average(checkpoints: Sequence[Path], out: Path) -> Path:
    """Write the mean of `checkpoints` (the same architecture and tokenizer) to the new folder `out`.

    Raises FileExistsError if `out` exists, and ValueError if weights' names or shapes differ.
    """
    loaded = [load_file(folder / "model.safetensors") for folder in checkpoints]
    shapes = [{name: value.shape for name, value in weights.items()} for weights in loaded]
    if any(other != shapes[0] for other in shapes[1:]):
        raise ValueError(f"{', '.join(map(str, checkpoints))} do not have the same weights")
    shutil.copytree(checkpoints[0], out)
    means = {name: torch.stack([weights[name] for weights in loaded]).mean(dim=0) for name in loaded[0]}
    save_file(means, out / "model.safetensors", {"format": "pt"})
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("out", type=Path)
    options = parser.parse_args(argv)
    print(average(options.checkpoints, options.out))


if __name__ == "__main__":
    main()
