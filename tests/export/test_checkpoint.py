"""Checkpoints: configs and tokenizers that are read, and that are refused with a reason."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints.checkpoint import load_model, open_checkpoint
from cappy_export.checkpoints.config import max_positions
from cappy_export.checkpoints.fast_tokenizer import load_tokenizer
from tests.support.checkpoints import copy, edit


def test_the_model_is_the_one_that_transformers_loads(checkpoint: Path) -> None:
    expected = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    found = load_model(open_checkpoint(checkpoint))
    assert type(found) is type(expected)
    assert not found.training
    assert all(torch.equal(found.state_dict()[key], value) for key, value in expected.state_dict().items())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_map", {"AutoConfig": "evil--config.Config"}),
        ("_attn_implementation_internal", "evil/kernels"),
        ("attn_implementation", "evil/kernels"),
        ("_attn_implementation", "evil/kernels"),
        ("_attn_implementation", "flash_attention_2"),
        ("kernel_config", {"Linear": "evil/kernels"}),
        ("quantization_config", {"quant_method": "evil"}),
        ("text_config", {"auto_map": {"AutoModel": "evil--model.Model"}}),
        ("layers", [{"auto_map": {"AutoModel": "evil--model.Model"}}]),
    ],
)
def test_config_keys_that_fetch_or_run_code_are_refused(checkpoint: Path, tmp_path: Path, key: str, value: Any) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    edit(folder / "config.json", lambda config: config.update({key: value}))
    with pytest.raises(CheckpointError, match="can make transformers fetch or run code"):
        open_checkpoint(folder)


def test_quantised_weights_are_refused_with_what_to_give_instead(checkpoint: Path, tmp_path: Path) -> None:
    """Without the key, the weights would still be quantised."""
    folder = copy(checkpoint, tmp_path / "copy")
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit(folder / "config.json", lambda config: config.update(quantization_config=quantised))
    with pytest.raises(
        CheckpointError, match=r"'quantization_config'.*the weights are quantised.*dequantize\(\)"
    ) as caught:
        open_checkpoint(folder)
    assert "remove the key" not in str(caught.value)


def test_a_model_with_code_of_its_own_is_refused_in_one_step(checkpoint: Path, tmp_path: Path) -> None:
    """Without the key, transformers would still not know the model."""
    folder = copy(checkpoint, tmp_path / "copy")
    change = {"auto_map": {"AutoConfig": "configuration.NewConfig"}, "model_type": "new"}
    edit(folder / "config.json", lambda config: config.update(change))
    with pytest.raises(CheckpointError, match=r"type 'new', which .* not know; its own code \(auto_map\) is never run"):
        open_checkpoint(folder)


def test_a_tokenizer_config_with_code_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    edit(
        folder / "tokenizer_config.json", lambda config: config.update(auto_map={"AutoTokenizer": ["evil--t.T", None]})
    )
    with pytest.raises(CheckpointError, match="can make transformers fetch or run code"):
        load_tokenizer(open_checkpoint(folder), max_length=512)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}},
            r"has 2 labels \(no, yes\), so it sorts",
        ),
        ({"id2label": None}, "has 2 labels, so it sorts pairs into classes"),
        ({"architectures": ["RobertaForMaskedLM"]}, "no regression head: RobertaForMaskedLM"),
        ({"architectures": None}, "no regression head: no architecture"),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            "generative",
        ),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "generative.*GPT2LMHeadModel"),
        ({"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"]}, "generative"),
        ({"is_decoder": True}, "generative"),
        ({"model_type": "unheard-of"}, "'unheard-of', which this transformers does not know"),
        ({"model_type": None}, "names the model type None"),
        ({"hidden_size": {"a": 1}}, "'hidden_size' must be a number"),
        ({"hidden_size": 33}, "describes no model"),
        ({"architectures": 5}, "no regression head: 5"),
        ({"num_labels": "1", "id2label": None}, "has '1' labels"),
        ({"pad_token_id": None}, "'pad_token_id' is null, and roberta counts positions from it"),
    ],
)
def test_what_cannot_give_one_score_is_refused(
    checkpoint: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    edit(folder / "config.json", lambda config: config.update(change))
    with pytest.raises(CheckpointError, match=message):
        load_model(open_checkpoint(folder))


def test_num_labels_one_without_id2label_is_enough(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    edit(
        folder / "config.json",
        lambda config: (config.pop("id2label"), config.pop("label2id"), config.update(num_labels=1)),
    )
    assert load_model(open_checkpoint(folder)).config.num_labels == 1


def test_folders_and_files_that_are_no_checkpoint_say_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"no config\.json; found notes\.txt"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="not a folder"):
        open_checkpoint(tmp_path / "notes.txt")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="must hold a JSON object"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(tmp_path)


def test_a_config_that_is_too_large_for_one_is_not_read(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    os.truncate(folder / "config.json", 2**36)  # sparse
    with pytest.raises(CheckpointError, match=r"config\.json must be a file of at most 67108864 bytes"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_only_regular_files_are_opened(checkpoint: Path, tmp_path: Path, name: str) -> None:
    """A FIFO would wait for ever for somebody to write into it."""
    folder = copy(checkpoint, tmp_path / "copy")
    for file in (name, "vocab.json"):
        (folder / file).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=rf"{name}|no usable tokenizer"):
        load_tokenizer(open_checkpoint(folder), max_length=512)


def test_a_tokenizer_config_cannot_name_files_or_other_classes(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    edit(
        folder / "tokenizer_config.json",
        lambda config: config.update(fast_tokenizer_files=["../evil/tokenizer.1.0.json"]),
    )
    tokenizer = load_tokenizer(open_checkpoint(folder), max_length=512)
    assert "fast_tokenizer_files" not in tokenizer.init_kwargs
    edit(folder / "tokenizer_config.json", lambda config: config.update(tokenizer_class="Trainer"))
    with pytest.raises(CheckpointError, match="names the tokenizer class 'Trainer'"):
        load_tokenizer(open_checkpoint(folder), max_length=512)


def test_every_file_that_is_read_is_in_the_digests(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy", weights=None)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    for name in ("model-1.safetensors", "model-2.safetensors"):
        shutil.copyfile(checkpoint / "model.safetensors", folder / name)
    for name, content in (("model.safetensors.index.json", index), ("modules.json", []), ("added_tokens.json", {})):
        (folder / name).write_text(json.dumps(content))
    (folder / "config_sentence_transformers.json").write_text("{}")
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert {"README.md"} | open_checkpoint(folder).files.keys() >= digests.keys()
    assert open_checkpoint(folder).files.items() <= digests.items()


@pytest.mark.parametrize("also", [(), ("tokenizer_config.json", "special_tokens_map.json")])
def test_a_checkpoint_without_tokenizer_is_refused(checkpoint: Path, tmp_path: Path, also: tuple[str, ...]) -> None:
    """A Trainer that was given no tokenizer saves none."""
    folder = copy(checkpoint, tmp_path / "copy")
    for name in ("tokenizer.json", "vocab.json", "merges.txt", *also):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"^copy has no tokenizer: .* found config\.json.*save_pretrained"):
        load_tokenizer(open_checkpoint(folder), max_length=512)


def test_a_vocabulary_without_its_merges_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    for name in ("tokenizer.json", "merges.txt"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"^copy has a vocab\.json without its merges\.txt; save the tokenizer.*"):
        load_tokenizer(open_checkpoint(folder), max_length=512)


def test_a_sentencepiece_model_alone_needs_its_package(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cappy_export.checkpoints.fast_tokenizer.is_sentencepiece_available", lambda: False)
    folder = copy(checkpoint, tmp_path / "copy")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink()
    (folder / "sentencepiece.bpe.model").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"of copy is in sentencepiece\.bpe\.model alone.*pip install sentencepiece"
    ):
        load_tokenizer(open_checkpoint(folder), max_length=512)


@pytest.mark.parametrize("left_out", [(), ("config.json", "model.safetensors"), ("model.safetensors",)])
def test_an_adapter_is_refused_also_beside_its_model(
    checkpoint: Path, tmp_path: Path, left_out: tuple[str, ...]
) -> None:
    """transformers would put it onto the model, so that the model's weights alone are another model."""
    folder = copy(checkpoint, tmp_path / "copy")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": "SEQ_CLS"}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    for name in left_out:
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"^copy holds an adapter of PEFT.*merge_and_unload"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named(checkpoint: Path, tmp_path: Path, name: str) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 17\n")
    with pytest.raises(CheckpointError, match=rf"{name} of copy is a pointer of Git LFS.*git lfs pull"):
        open_checkpoint(folder)


@pytest.mark.parametrize("side", ["truncation_side", "padding_side"])
def test_a_tokenizer_that_truncates_or_pads_on_the_left_is_refused(checkpoint: Path, tmp_path: Path, side: str) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    edit(folder / "tokenizer_config.json", lambda config: config.update({side: "left"}))
    with pytest.raises(CheckpointError, match="truncates and pads on the right"):
        load_tokenizer(open_checkpoint(folder), max_length=512)


def test_roberta_has_two_positions_less_than_its_table(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    assert max_positions(opened.config) == 512
    assert max_positions({**opened.config, "pad_token_id": 5}) == 508
    assert load_tokenizer(opened, max_length=100_000).model_max_length == 512
    assert load_tokenizer(opened, max_length=64).model_max_length == 64


def test_a_limit_under_its_older_name_counts(checkpoint: Path, tmp_path: Path) -> None:
    """Early tokenizer_config.json call it max_len, and transformers reads that."""
    folder = copy(checkpoint, tmp_path / "copy")
    path = folder / "tokenizer_config.json"
    edit(path, lambda config: config.update(max_len=config.pop("model_max_length") // 4))
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 128
    assert load_tokenizer(open_checkpoint(folder), max_length=512).model_max_length == 128


@pytest.mark.parametrize("name", ["model_max_length", "max_len"])
@pytest.mark.parametrize("limit", [float("nan"), "128", 0, -1, True, [128]])
def test_a_limit_that_is_no_number_of_tokens_is_refused(
    checkpoint: Path, tmp_path: Path, name: str, limit: object
) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    path = folder / "tokenizer_config.json"
    edit(path, lambda config: (config.pop("model_max_length"), config.update({name: limit})))
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: '{name}' must be a number of tokens, or null"):
        load_tokenizer(open_checkpoint(folder), max_length=512)


@pytest.mark.parametrize("limit", [float("inf"), 10**30, 1e30, None])
def test_a_limit_that_says_nothing_leaves_the_models_own(checkpoint: Path, tmp_path: Path, limit: object) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    edit(folder / "tokenizer_config.json", lambda config: config.update(model_max_length=limit))
    assert load_tokenizer(open_checkpoint(folder), max_length=10**6).model_max_length == 512


@pytest.mark.parametrize("longest", [6, 7])
def test_pairs_too_short_for_a_bundle_are_refused_before_any_work(checkpoint: Path, longest: int) -> None:
    with pytest.raises(CheckpointError, match=f"max_length {longest} leaves a pair no text; at least 8 is needed"):
        load_tokenizer(open_checkpoint(checkpoint), max_length=longest)
