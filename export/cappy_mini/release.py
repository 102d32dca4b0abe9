"""Write the checkpoint that goes into the repository: a trained one, with its weights rounded to float16.

    python -m cappy_mini.release TRAINED OUT

It has half the size, and every precision of the shipped bundle is made from it and compared with it: the rounding is
part of the model, not of the engine.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cappy_engine import storage

COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


def release(trained: Path, out: Path) -> None:
    """Write `trained` to the new folder `out` in float16.

        >>> release(Path("trained2"), Path("export/cappy_mini/checkpoint"))

    Raises FileExistsError if `out` has a checkpoint.
    """
    if (out / "config.json").exists():
        raise FileExistsError(f"{out} has a checkpoint already; remove it first")
    out.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        shutil.copyfile(trained / name, out / name)
    config = json.loads((trained / "config.json").read_text(encoding="utf-8"))
    storage.write_json(out / "config.json", {**config, "torch_dtype": "float16"})
    weights = {name: value.to(torch.float16) for name, value in load_file(trained / "model.safetensors").items()}
    save_file(weights, out / "model.safetensors", {"format": "pt"})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(argv)
    release(options.trained, options.out)
    print(f"{options.out}: {sum(path.stat().st_size for path in options.out.rglob('*') if path.is_file()):,} bytes")


if __name__ == "__main__":
    main()
