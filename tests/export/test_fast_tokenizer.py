"""A checkpoint's tokenizer: saved by transformers 5, with ids beyond the tables, or broken."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cappy_bench.families import FAMILIES, write_unigram
from cappy_bench.make_checkpoint import make_family, save_weights
from cappy_engine.errors import CheckpointError
from cappy_engine.tokenizer import PairTokenizer
from cappy_export import export
from cappy_export.adaptation.model_setup import pair_tokenizer
from cappy_export.checkpoints.checkpoint import open_checkpoint
from cappy_export.checkpoints.fast_tokenizer import PROBES, load_tokenizer
from cappy_export.proof.reference import score_with_torch
from tests.support.checkpoints import copy, edit

Change = Callable[[dict[str, Any]], object]


def changed(checkpoint: Path, folder: Path, change: Change, *, name: str = "tokenizer.json") -> Path:
    """A copy of the checkpoint with a change in one of its files."""
    copied = copy(checkpoint, folder)
    edit(copied / name, change)
    return copied


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(open_checkpoint(folder), max_length=512)
    return str(caught.value)


def newer(checkpoint: Path, folder: Path, **changes: Any) -> Path:
    """A copy with the tokenizer's files as transformers 5 writes them: tokenizer.json, and a config of another form."""
    copied = copy(checkpoint, folder)
    for name in ("special_tokens_map.json", "vocab.json", "vocab.txt", "merges.txt"):
        (copied / name).unlink(missing_ok=True)
    special = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>"}
    special |= {"mask": "<mask>", "pad": "<pad>", "unk": "<unk>"}
    written: dict[str, Any] = {f"{name}_token": token for name, token in special.items()}
    written |= {"backend": "tokenizers", "is_local": True, "tokenizer_class": "TokenizersBackend"}
    written |= {"model_max_length": 512, **changes}
    (copied / "tokenizer_config.json").write_text(json.dumps(written))
    edit(copied / "config.json", lambda config: config.update(transformers_version="5.1.0"))
    return copied


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"extra_special_tokens": ["<mask>", "<unk>"]},
        {"extra_special_tokens": []},
        {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": False, "trim_offsets": True},
    ],
)
def test_a_tokenizer_of_transformers_5_makes_the_ids_of_its_own_file(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = newer(checkpoint, tmp_path / "newer", **changes)
    found = load_tokenizer(open_checkpoint(folder), max_length=512)
    own = PairTokenizer.from_file(folder / "tokenizer.json", max_length=512)
    for pair in (*PROBES, ("a<mask> b", "<unk></s>")):
        assert found([pair])["input_ids"][0] == own.encode([pair]).token_ids[0].tolist()
    assert (found.pad_token_id, found.model_max_length) == (1, 512)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"extra_special_tokens": ["<new>"]}, "reads it unlike its tokenizer.json: ('<s> x"),
        ({"add_prefix_space": True}, "reads it unlike its tokenizer.json: ('a', 'b') becomes [0, 263, 2"),
        ({"extra_special_tokens": ["<unk>"], "additional_special_tokens": ["<s>"]}, "saved by transformers 5: extra_"),
        ({"pad_token": None}, "padding token"),
        ({"tokenizer_class": ["TokenizersBackend"]}, "names the tokenizer class"),
        ({"split_special_tokens": True}, "split_special_tokens"),
    ],
)
def test_a_tokenizer_of_transformers_5_that_cannot_be_read_right_is_refused(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    folder = newer(checkpoint, tmp_path / "newer", **changes)
    if changes.get("tokenizer_class"):
        edit(folder / "config.json", lambda config: config.update(transformers_version="4.57.6"))
        edit(folder / "tokenizer_config.json", lambda config: config.pop("backend"))
    assert text in refusal(folder)


@pytest.mark.parametrize(
    "sign",
    [{"tokenizer_class": "TokenizersBackend"}, {"backend": "tokenizers"}, {"extra_special_tokens": []}, {}],
    ids=str,
)
def test_each_sign_of_transformers_5_is_enough(checkpoint: Path, tmp_path: Path, sign: dict[str, Any]) -> None:
    """The last one is the version in config.json."""
    folder = newer(checkpoint, tmp_path / "newer", add_prefix_space=True)
    edit(folder / "tokenizer_config.json", lambda config: (config.pop("backend"), config.pop("tokenizer_class")))
    if sign:
        edit(folder / "tokenizer_config.json", lambda config: config.update(sign))
        edit(folder / "config.json", lambda config: config.update(transformers_version="4.57.6"))
    assert "reads it unlike its tokenizer.json" in refusal(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "names", "problem"),
    [
        ("TokenizersBackend", None, "its model_input_names leave token_type_ids out"),
        ("AlbertTokenizer", None, "its model_input_names leave token_type_ids out"),
        ("TokenizersBackend", ["input_ids", "token_type_ids", "attention_mask"], None),
        ("BertTokenizer", None, None),
    ],
)
def test_a_tokenizer_of_transformers_5_gives_token_types_only_where_it_does_there(
    tmp_path: Path, kind: str, names: list[str] | None, problem: str | None
) -> None:
    """Its default are no types (huggingface/transformers#48128), transformers 4's are types of 0 and 1."""
    folder = newer(make_family(tmp_path / "bert", "ms-marco-MiniLM-L6-v2", is_tiny=True), tmp_path / "newer")
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]"}
    written: dict[str, Any] = {"backend": "tokenizers", "tokenizer_class": kind, "unk_token": "[UNK]", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(written | ({"model_input_names": names} if names else {})))
    if problem:
        assert problem in refusal(folder)
    else:
        assert "token_type_ids" in load_tokenizer(open_checkpoint(folder), max_length=512).model_input_names


def test_a_tokenizer_of_transformers_5_needs_its_tokenizer_json(checkpoint: Path, tmp_path: Path) -> None:
    folder = newer(checkpoint, tmp_path / "newer")
    (folder / "tokenizer.json").unlink()
    shutil.copyfile(checkpoint / "vocab.json", folder / "vocab.json")
    assert "was saved by transformers 5 without a tokenizer.json" in refusal(folder)


def test_ids_unlike_those_of_the_file_are_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = newer(checkpoint, tmp_path / "newer")
    monkeypatch.setattr("cappy_export.checkpoints.fast_tokenizer.PROBES", (("x", "y"),))
    right = PairTokenizer.encode

    def shifted(self: PairTokenizer, pairs: Any) -> Any:
        encoded = right(self, pairs)
        encoded.token_ids[0] += 1
        return encoded

    monkeypatch.setattr(PairTokenizer, "encode", shifted)
    assert "was saved by transformers 5, and transformers" in refusal(folder)


def added(content: str, number: int, *, special: bool = True) -> Change:
    entry = {"content": content, "id": number, "special": special, "normalized": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return lambda tokenizer: tokenizer["added_tokens"].append({**entry, **flags})


@pytest.mark.slow
def test_a_large_vocabulary_brings_no_warning_that_is_meant_for_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    written = write_unigram(tmp_path, 100_100, 512)
    written.save_pretrained(tmp_path)
    config = FAMILIES["bge-reranker-base"].config_of(written, is_tiny=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_weights({}, tmp_path, "safetensors")
    found = load_tokenizer(open_checkpoint(tmp_path), max_length=512)
    assert found.vocab_size > 100_000
    assert caplog.messages == []
    found.save_pretrained(tmp_path / "saved")
    assert "regex" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()


@pytest.mark.parametrize("special", [False, True])
def test_tokens_without_a_row_in_the_table_are_refused_with_numbers(
    checkpoint: Path, tmp_path: Path, special: bool
) -> None:
    """Also where no parity pair holds the token: the engine would fail on the first text that does."""
    folder = changed(checkpoint, tmp_path / "copy", added("<user>", 3245, special=special))
    message = refusal(folder)
    assert "makes ids up to 3245, and the model's table of words has 3245 rows (0 to 3244)" in message
    assert "<user>" in message
    assert "resize_token_embeddings" in message
    with pytest.raises(CheckpointError, match="makes ids up to 3245"):
        export(folder, tmp_path / "bundle")


def with_template(ids: list[int], type_id: int) -> Change:
    """Put a special token around pairs by a template of our own, with any id."""
    sequence = {name: {"Sequence": {"id": name, "type_id": type_id * (name == "B")}} for name in "AB"}
    token = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    post = {
        "type": "TemplateProcessing",
        "single": [token, sequence["A"]],
        "pair": [token, sequence["A"], sequence["B"]],
        "special_tokens": {"<s>": {"id": "<s>", "ids": ids, "tokens": ["<s>"]}},
    }
    return lambda tokenizer: tokenizer.update(post_processor=post)


def test_ids_that_only_the_template_makes_are_seen(checkpoint: Path, tmp_path: Path) -> None:
    folder = newer(checkpoint, tmp_path / "copy")
    edit(folder / "tokenizer.json", with_template([9999], 0))
    assert "makes ids up to 9999" in refusal(folder)


def test_token_types_without_a_row_in_the_table_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = newer(checkpoint, tmp_path / "copy", model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    edit(folder / "tokenizer.json", with_template([0], 1))
    assert "makes token types up to 1, and the model's table of types has 1 rows" in refusal(folder)


@pytest.mark.slow
def test_token_types_that_transformers_would_leave_out_are_refused(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "bert", "ms-marco-MiniLM-L6-v2", is_tiny=True)
    edit(
        folder / "tokenizer_config.json",
        lambda config: config.update(model_input_names=["input_ids", "attention_mask"]),
    )
    assert "its model_input_names leave token_type_ids out, so that transformers takes 0 for it" in refusal(folder)


@pytest.mark.parametrize(
    ("pad", "text"),
    [(3245, "has the pad_token_id 3245, and the model's table"), (2, "counts positions from the pad_token_id 2 of")],
)
def test_an_odd_padding_id_is_refused(checkpoint: Path, tmp_path: Path, pad: int, text: str) -> None:
    folder = changed(checkpoint, tmp_path / "copy", lambda config: config.update(pad_token_id=pad), name="config.json")
    assert text in refusal(folder)


CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
BROKEN: dict[str, Change] = {
    "a panic at loading": lambda tokenizer: tokenizer.update(normalizer=CHARSMAP),
    "a panic at encoding": lambda tokenizer: tokenizer.update(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "an Exception at loading": lambda tokenizer: tokenizer["model"].update(merges=[["zzz", "yyy"]]),
    "an Exception at encoding": lambda tokenizer: tokenizer.update(
        model={"type": "WordLevel", "vocab": tokenizer["model"]["vocab"], "unk_token": "none"}
    ),
    "another model": lambda tokenizer: tokenizer.update(model={"type": "Nothing"}),
    "not a tokenizer": lambda tokenizer: tokenizer.clear(),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_whatever_the_library_raises_is_a_checkpoint_error(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    """At export and at adapt, at loading or at the first text."""
    folder = newer(checkpoint, tmp_path / "copy")
    edit(folder / "tokenizer.json", BROKEN[kind])
    with pytest.raises(CheckpointError, match="copy"):
        export(folder, tmp_path / "bundle")
    with pytest.raises(CheckpointError, match="copy"):
        pair_tokenizer(open_checkpoint(folder), 512)


def test_a_tokenizer_that_fails_on_one_text_only_is_a_checkpoint_error(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `load_tokenizer` tries has letters only, and there is no token for what is unknown."""
    monkeypatch.setattr("cappy_export.checkpoints.fast_tokenizer.PROBES", ())
    monkeypatch.setattr("cappy_export.checkpoints.fast_tokenizer._require_own_ids", lambda *arguments: None)
    folder = newer(checkpoint, tmp_path / "copy")
    edit(folder / "tokenizer.json", BROKEN["an Exception at encoding"])
    edit(folder / "tokenizer.json", lambda tokenizer: tokenizer.update(pre_tokenizer={"type": "Whitespace"}))
    opened = open_checkpoint(folder)
    pairs = [("a", "b"), ("a", "unheard-of\x1b[2J")]
    with pytest.raises(CheckpointError, match=r"the tokenizer of copy fails on .*unheard-of\\x1b\[2J.*WordLevel"):
        score_with_torch(opened, pairs, max_length=512)


def test_a_model_that_fails_on_a_pair_is_a_checkpoint_error(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **others: object) -> None:
        raise IndexError("index out of range in self")

    monkeypatch.setattr("transformers.RobertaForSequenceClassification.forward", fail)
    with pytest.raises(CheckpointError, match="PyTorch cannot score with tiny: IndexError"):
        score_with_torch(open_checkpoint(checkpoint), [("a", "b")], max_length=512)
