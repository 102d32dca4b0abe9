"""Makes a checkpoint of Cappy's shape from a seed: real formats, real size, random weights.

`btan2/cappy-large` cannot always be downloaded, and speed and numerical parity do not need trained weights. They do
need scores that *vary*: with transformers' default initialisation (standard deviation 0.02 throughout) every pair gets
nearly the same score, and any exporter would look right. So each layer keeps the variance of its input, and the head is
calibrated on the package's parity pairs until their scores have mean 0.5 and standard deviation 0.35.

    python -m cappy_bench.make_checkpoint OUT --size large --tokenizer ROBERTA --format safetensors --format msgpack

ROBERTA is a folder with the genuine `vocab.json` and `merges.txt` (50,265 entries): part of cappy-large's 355 M
parameters. Without it a vocabulary of 4,000 is trained on the parity pairs, which is enough for the smaller sizes.

    python -m cappy_bench.make_checkpoint OUT --family bge-reranker-v2-m3

makes one of another family, in the form and size of the published checkpoint (`families.py`), tiny with `--size tiny`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cappy_bench.needed import needed
from cappy_export.proof.pairs import default_pairs

with needed("bench", __name__):
    import msgpack
    import numpy as np
    import torch
    from safetensors.torch import save_file
    from tokenizers import ByteLevelBPETokenizer
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        RobertaConfig,
        RobertaForSequenceClassification,
        RobertaTokenizerFast,
    )

    from cappy_bench import family_ettin
    from cappy_bench.families import FAMILIES
    from cappy_export.checkpoints.config import read_config
    from cappy_export.checkpoints.models import build_model, model_config

SHAPES: dict[str, dict[str, int]] = {
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "minimal": {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16},
}
FORMATS = ("safetensors", "bin", "msgpack")
MEAN, SPREAD = 0.5, 0.35
"""Of the scores of random weights, on the package's pairs."""


def make_checkpoint(
    out: Path,
    *,
    size: str = "small",
    seed: int = 0,
    formats: Sequence[str] = ("safetensors",),
    tokenizer: Path | None = None,
    vocab_size: int = 4000,
) -> Path:
    """Write a checkpoint folder like `btan2/cappy-large`'s, with the same float32 weights in each of `formats`.

    `tokenizer` is a folder with RoBERTa's `vocab.json` and `merges.txt`; without it a byte-level BPE of `vocab_size`
    entries is trained on the package's own parity pairs. Raises FileExistsError if `out` exists.

        >>> make_checkpoint(Path("tiny"), size="tiny", formats=["safetensors", "bin"])
        PosixPath('tiny')
    """
    out.mkdir(parents=True)
    fast = _save_tokenizer(out, tokenizer, vocab_size)
    config = RobertaConfig(
        vocab_size=len(fast),
        max_position_embeddings=514,
        type_vocab_size=1,
        num_labels=1,
        layer_norm_eps=1e-5,
        **SHAPES[size],
    )
    model = RobertaForSequenceClassification._from_config(config, attn_implementation="eager").eval()
    _fill(model, seed)
    _calibrate_head(model, fast)
    config.architectures = ["RobertaForSequenceClassification"]
    config.save_pretrained(out)
    for name in formats:
        save_weights(model.state_dict(), out, name)
    return out


def make_family(out: Path, family: str, *, is_tiny: bool = False, seed: int = 0) -> Path:
    """Write a checkpoint in the form of one of `families.FAMILIES`.

        >>> make_family(Path("minilm"), "ms-marco-MiniLM-L6-v2", is_tiny=True)
        PosixPath('minilm')

    It has the published size, or is tiny. Its weights have the type that config.json names. Raises FileExistsError if
    `out` exists.
    """
    published = FAMILIES[family]
    out.mkdir(parents=True)
    tokens = None if is_tiny else published.config["vocab_size"] - published.rows_without_tokens
    fast = published.write_tokenizer(out, tokens, published.max_length)
    fast.save_pretrained(out)
    written = published.config_of(fast, is_tiny=is_tiny)
    (out / "config.json").write_text(json.dumps(written, indent=2))
    head = family_ettin.HEAD if published.has_modules else None
    model = build_model(model_config(read_config(out, family, head=head)))
    model.eval()
    _fill(model, seed)
    _calibrate_head(model, fast)
    dtype = getattr(torch, written.get("torch_dtype", "float32"))
    weights = {name: value.to(dtype) for name, value in model.state_dict().items()}
    if published.has_modules:
        weights = family_ettin.write_modules(out, weights)
    positions = torch.arange(written["max_position_embeddings"])[None]
    save_weights({**weights, **dict.fromkeys(published.buffers, positions)}, out, "safetensors")
    return out


def save_weights(weights: dict[str, torch.Tensor], out: Path, name: str) -> None:
    """Write `weights` (PyTorch's names) to `out` in the format `name`, one of FORMATS.

    >>> save_weights(model.state_dict(), Path("tiny"), "safetensors")
    """
    if name == "safetensors":
        save_file(
            {key: value.contiguous() for key, value in weights.items()}, out / "model.safetensors", {"format": "pt"}
        )
    elif name == "bin":
        torch.save(dict(weights), out / "pytorch_model.bin")
    elif name == "msgpack":
        (out / "flax_model.msgpack").write_bytes(_flax_bytes(weights))
    else:
        raise ValueError(f"unknown format {name!r}; choose from {', '.join(FORMATS)}")


def _flax_bytes(weights: dict[str, torch.Tensor]) -> bytes:
    """Write these weights as `flax.serialization.to_bytes` does, under Flax's parameter names."""
    tree: dict[str, Any] = {}
    for key, value in weights.items():
        *parents, leaf = key.split(".")
        array = value.numpy()
        if leaf == "weight":
            is_norm, is_embedding = array.ndim == 1, parents[-1].endswith("embeddings")
            leaf = "scale" if is_norm else "embedding" if is_embedding else "kernel"
            array = array.T if leaf == "kernel" else array
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = _flax_array(array)
    return bytes(msgpack.packb(tree, strict_types=True))


def _flax_array(array: np.ndarray[Any, Any]) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes()), use_bin_type=True))


def _save_tokenizer(out: Path, source: Path | None, vocab_size: int) -> RobertaTokenizerFast:
    if source is None:
        bpe = ByteLevelBPETokenizer()
        texts = [text for pair in default_pairs() for text in pair]
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        bpe.train_from_iterator(texts, vocab_size=vocab_size, show_progress=False, special_tokens=special)
        bpe.save_model(str(out))
    else:
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(source / name, out / name)
    fast = RobertaTokenizerFast(str(out / "vocab.json"), str(out / "merges.txt"), model_max_length=512)
    fast.save_pretrained(out)
    return fast


def _fill(model: PreTrainedModel, seed: int) -> None:
    """Fill in random weights, each tensor from a stream of its own.

    So a tensor that is added or renamed leaves the others as they are.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            random = np.random.default_rng([seed, zlib.crc32(name.encode())])
            values = random.standard_normal(tuple(parameter.shape), dtype=np.float32)
            parameter.copy_(
                torch.from_numpy(values * _spread(name, parameter) + (1.0 if _is_norm_scale(name) else 0.0))
            )
        words = model.get_input_embeddings()
        words.weight[words.padding_idx] = 0.0


def _is_norm_scale(name: str) -> bool:
    return name.endswith(("LayerNorm.weight", "norm.weight"))


def _spread(name: str, parameter: torch.Tensor) -> float:
    if _is_norm_scale(name) or parameter.ndim == 1:
        return 0.05
    if "embeddings" in name:
        return 1.0 if "word" in name or "tok_embeddings" in name else 0.3
    return float(1.0 / np.sqrt(parameter.shape[1]))


def _calibrate_head(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    pairs = [pair for pair in default_pairs() if len(pair[0]) + len(pair[1]) < 400][::4]
    with torch.no_grad():
        scores = torch.cat([model(**tokenizer([pair], return_tensors="pt")).logits[:, 0] for pair in pairs])
        head = getattr(model.classifier, "out_proj", model.classifier)
        head.weight.mul_(SPREAD / scores.std())
        head.bias.copy_(MEAN - (scores.mean() - head.bias) * SPREAD / scores.std())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=sorted(SHAPES), help="default: small, or that of the family's published one")
    parser.add_argument("--family", choices=sorted(FAMILIES), help="another family, in its published form")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", dest="formats", action="append", choices=FORMATS)
    parser.add_argument("--tokenizer", type=Path, help="folder with RoBERTa's vocab.json and merges.txt")
    options = parser.parse_args(argv)
    if options.size == "large" and options.tokenizer is None and options.family is None:
        parser.error("--size large needs --tokenizer: with a small vocabulary it would not be cappy-large's size")
    if options.family is None:
        size, formats = options.size or "small", options.formats or ["safetensors"]
        make_checkpoint(options.out, size=size, seed=options.seed, formats=formats, tokenizer=options.tokenizer)
    elif options.size in (None, "tiny") and options.formats is None and options.tokenizer is None:
        make_family(options.out, options.family, is_tiny=options.size == "tiny", seed=options.seed)
    else:
        parser.error("--family takes --seed, and --size tiny; it has formats and a tokenizer of its own")
    sizes = {path.name: path.stat().st_size for path in sorted(options.out.iterdir())}
    made = {"checkpoint": str(options.out), "seed": options.seed, "size": options.size, "family": options.family}
    print(json.dumps({**made, "bytes": sizes}))


if __name__ == "__main__":
    main()
