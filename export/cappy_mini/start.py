"""Make the checkpoint that cappy-mini's training starts from: a RoBERTa with all-MiniLM-L6-v2's encoder.

    python -m cappy_mini.start MINILM TRAIN.jsonl OUT

MINILM is a folder with all-MiniLM-L6-v2's `model.safetensors`, `config.json` and `vocab.txt` (BERT, 6 layers, hidden
384). A byte-level BPE is trained on the texts of TRAIN.jsonl, with RoBERTa's special tokens and pair template, so that
the result takes exactly cappy-large's path. Encoder layers are carried over as they are; each new token starts as the
mean of the old word pieces of its text; the head is fresh.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from transformers import BertTokenizerFast, RobertaConfig, RobertaForSequenceClassification, RobertaTokenizerFast

from cappy_engine.bulk.formats.json_lines import open_lines, read_rows

SPECIAL = {"<s>": "[CLS]", "<pad>": "[PAD]", "</s>": "[SEP]", "<unk>": "[UNK]", "<mask>": "[MASK]"}
POSITIONS = 512


def make_start(minilm: Path, texts: Iterable[str], out: Path, *, vocab_size: int, layers: int, seed: int = 0) -> Path:
    """Write the starting checkpoint to the new folder `out`.

        >>> make_start(Path("model"), ["the film was good."], Path("start"), vocab_size=11_500, layers=6)

    `layers` of MiniLM's six are kept, evenly spaced, the last one among them. Raises FileExistsError if `out` exists.
    """
    out.mkdir(parents=True)
    tokenizer = _train_tokenizer(texts, out, vocab_size)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=POSITIONS + 2,  # RoBERTa counts positions from padding_idx + 1
        type_vocab_size=1,
        num_labels=1,
        layer_norm_eps=1e-12,
    )
    torch.manual_seed(seed)
    model = RobertaForSequenceClassification(config)
    old = load_file(minilm / "model.safetensors")
    old = {name.removeprefix("bert."): value for name, value in old.items()}
    pieces = BertTokenizerFast(str(minilm / "vocab.txt"), do_lower_case=True)
    weights = {**model.state_dict(), **_carried_layers(old, layers), **_carried_embeddings(old, pieces, tokenizer)}
    model.load_state_dict(weights)
    model.save_pretrained(out)
    return out


def _train_tokenizer(texts: Iterable[str], out: Path, vocab_size: int) -> RobertaTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=vocab_size, min_frequency=3, show_progress=False, special_tokens=list(SPECIAL)
    )
    bpe.save_model(str(out))
    fast = RobertaTokenizerFast(str(out / "vocab.json"), str(out / "merges.txt"), model_max_length=POSITIONS)
    fast.save_pretrained(out)
    return fast


def _carried_layers(old: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """Take the weights of evenly spaced layers; BERT and RoBERTa name them alike."""
    found = 1 + max(int(name.split(".")[2]) for name in old if name.startswith("encoder.layer."))
    kept = [round((place + 1) * found / layers) - 1 for place in range(layers)]
    return {
        f"roberta.encoder.layer.{new}.{name.split('.', 3)[3]}": value
        for new, place in enumerate(kept)
        for name, value in old.items()
        if name.startswith(f"encoder.layer.{place}.")
    }


def _carried_embeddings(
    old: dict[str, torch.Tensor], pieces: BertTokenizerFast, tokenizer: RobertaTokenizerFast
) -> dict[str, torch.Tensor]:
    words, prefix = old["embeddings.word_embeddings.weight"], "roberta.embeddings."
    rows = torch.stack([words[_old_ids(token, pieces, tokenizer)].mean(dim=0) for token in _tokens(tokenizer)])
    rows[tokenizer.pad_token_id] = 0.0
    positions = old["embeddings.position_embeddings.weight"][:POSITIONS]
    return {
        prefix + "word_embeddings.weight": rows,
        prefix + "position_embeddings.weight": torch.cat([torch.zeros(2, positions.shape[1]), positions]),
        prefix + "token_type_embeddings.weight": old["embeddings.token_type_embeddings.weight"][:1],
        prefix + "LayerNorm.weight": old["embeddings.LayerNorm.weight"],
        prefix + "LayerNorm.bias": old["embeddings.LayerNorm.bias"],
    }


def _tokens(tokenizer: RobertaTokenizerFast) -> list[str]:
    return [str(tokenizer.convert_ids_to_tokens(number)) for number in range(len(tokenizer))]


def _old_ids(token: str, pieces: BertTokenizerFast, tokenizer: RobertaTokenizerFast) -> list[int]:
    """Look up the old word pieces that hold the text of `token`.

    A token that starts no word (no space, a lower-case letter) is looked up as the inside of a word first.
    """
    if token in SPECIAL:
        return [pieces.convert_tokens_to_ids(SPECIAL[token])]
    text = tokenizer.convert_tokens_to_string([token])
    inside = pieces.vocab.get("##" + text)
    if inside is not None and text.islower():
        return [int(inside)]
    ids: list[int] = pieces(text, add_special_tokens=False)["input_ids"]
    return ids or [pieces.convert_tokens_to_ids("[PAD]")]  # white space, and bytes that are not a character


def read_texts(paths: Sequence[Path]) -> Iterator[str]:
    """Yield the instructions and responses of JSON Lines files, each distinct text once.

    >>> texts = read_texts([Path("TRAIN.jsonl")])
    """
    seen: set[str] = set()
    for path in paths:
        with open_lines(path) as lines:
            for row in read_rows(lines):
                for text in row.pair:
                    if text not in seen:
                        seen.add(text)
                        yield text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minilm", type=Path)
    parser.add_argument("train", type=Path, nargs="+")
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocab-size", type=int, default=11_500)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    make_start(
        options.minilm,
        read_texts(options.train),
        options.out,
        vocab_size=options.vocab_size,
        layers=options.layers,
        seed=options.seed,
    )
    print(options.out)


if __name__ == "__main__":
    main()
