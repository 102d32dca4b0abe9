"""Settings of tokenizer_config.json, and files beside it, by which other tools make other tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import CrossEncoder
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints.checkpoint import open_checkpoint
from cappy_export.checkpoints.fast_tokenizer import doubts_of, load_tokenizer
from tests.support.checkpoints import copy, edit


def changed(checkpoint: Path, folder: Path, **keys: Any) -> Path:
    """A copy of the checkpoint with other keys in its tokenizer_config.json."""
    copied = copy(checkpoint, folder)
    edit(copied / "tokenizer_config.json", lambda config: config.update(keys))
    return copied


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(open_checkpoint(folder), max_length=512)
    return str(caught.value)


def test_a_tokenizer_that_is_made_of_other_files_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """By from_slow transformers makes it of vocab.json, though tokenizer.json has other tokens."""
    slow = changed(checkpoint, tmp_path / "slow", from_slow=True)
    assert "from_slow is True, by which transformers makes the tokenizer of vocab.txt and its like" in refusal(slow)


def test_the_class_in_config_json_counts_where_the_tokenizers_file_names_none(checkpoint: Path, tmp_path: Path) -> None:
    copied = copy(checkpoint, tmp_path / "copied")
    edit(copied / "tokenizer_config.json", lambda config: config.pop("tokenizer_class"))
    edit(copied / "config.json", lambda config: config.update(tokenizer_class="PreTrainedTokenizerFast"))
    found = load_tokenizer(open_checkpoint(copied), max_length=512)
    assert type(found) is type(AutoTokenizer.from_pretrained(copied)) is PreTrainedTokenizerFast


def test_a_tokenizer_that_cuts_at_random_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    random = copy(checkpoint, tmp_path / "random")
    edit(random / "tokenizer.json", lambda content: content["model"].update(dropout=0.5))
    assert "has a dropout of 0.5: it cuts a text in other tokens each time" in refusal(random)


@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file", "split_special_tokens"])
def test_a_special_tokens_map_with_other_keys_is_refused(checkpoint: Path, tmp_path: Path, key: str) -> None:
    """transformers takes them for arguments: the bundle would hold any file of the user that is named there."""
    copied = copy(checkpoint, tmp_path / "copied")
    (tmp_path / "private").write_text("<unk>\na line of a private file\n")
    edit(copied / "special_tokens_map.json", lambda found: found.update({key: str(tmp_path / "private")}))
    edit(copied / "tokenizer_config.json", lambda config: config.pop("added_tokens_decoder", None))
    assert f"special_tokens_map.json: '{key}' is not a special token; remove the key" in refusal(copied)


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json", "special_tokens_map.json"])
def test_a_tokenizer_file_that_is_a_link_out_of_the_checkpoint_is_refused(
    checkpoint: Path, tmp_path: Path, name: str
) -> None:
    copied = copy(checkpoint, tmp_path / "copied")
    private = (copied / name).rename(tmp_path / "private")
    (copied / name).symlink_to(private)
    assert f"{name} of copied is a link to {private}, outside of the checkpoint; copy the file there" in refusal(copied)


def test_named_special_tokens_are_taken_where_transformers_saved_them(checkpoint: Path, tmp_path: Path) -> None:
    copied = copy(checkpoint, tmp_path / "copied")
    named = AutoTokenizer.from_pretrained(copied, extra_special_tokens={"doc_start": "<mask>"})
    named.save_pretrained(copied)
    assert "doc_start" in (copied / "special_tokens_map.json").read_text()
    found = load_tokenizer(open_checkpoint(copied), max_length=512)
    assert found("a", "b")["input_ids"] == named("a", "b")["input_ids"]


def test_links_within_a_checkpoint_and_the_hubs_cache_are_followed(checkpoint: Path, tmp_path: Path) -> None:
    tmp_path = tmp_path / "models--a--b"
    copied = copy(checkpoint, tmp_path / "snapshots" / "0123abc")
    (copied / "tokenizer.json").rename(copied / "other.json")
    (copied / "tokenizer.json").symlink_to("other.json")
    (tmp_path / "blobs").mkdir()
    (copied / "vocab.json").rename(tmp_path / "blobs" / "4567")
    (copied / "vocab.json").symlink_to(Path("..", "..", "blobs", "4567"))
    (tmp_path.parent / "blobs" / "ab").mkdir(parents=True)  # shared by repositories from huggingface_hub 2 on
    (copied / "merges.txt").rename(tmp_path.parent / "blobs" / "ab" / "89")
    (copied / "merges.txt").symlink_to(Path("..", "..", "..", "blobs", "ab", "89"))
    assert load_tokenizer(open_checkpoint(copied), max_length=512).pad_token == "<pad>"


def test_a_chat_template_is_noted(checkpoint: Path, tmp_path: Path) -> None:
    """transformers scores texts as they are; sentence-transformers writes them into the template.

    It does not where it saved a CrossEncoder for texts.
    """
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    in_config = changed(checkpoint, tmp_path / "config", chat_template=template)
    beside, saved = (copy(checkpoint, tmp_path / name) for name in ("beside", "saved"))
    CrossEncoder(str(saved), device="cpu").save_pretrained(str(saved))
    for folder in (beside, saved):
        (folder / "chat_template.jinja").write_text(template)
    for folder in (in_config, beside):
        opened = open_checkpoint(folder)
        (doubt,) = doubts_of(opened, load_tokenizer(opened, max_length=512))
        assert f"note: {folder.name} has a chat template" in doubt
    opened = open_checkpoint(saved)
    assert doubts_of(opened, load_tokenizer(opened, max_length=512)) == []
