"""Settings of tokenizer_config.json, and files beside it, by which other tools make other tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import CrossEncoder

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


def test_a_tokenizer_that_cuts_at_random_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    random = copy(checkpoint, tmp_path / "random")
    edit(random / "tokenizer.json", lambda content: content["model"].update(dropout=0.5))
    assert "has a dropout of 0.5: it cuts a text in other tokens each time" in refusal(random)


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
