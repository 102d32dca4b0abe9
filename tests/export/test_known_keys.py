"""Keys of a config: honoured, translated or refused, never lost; and values that they may have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints.checkpoint import load_model, open_checkpoint
from cappy_export.checkpoints.config import read_config
from cappy_export.checkpoints.known_keys import kept_keys
from tests.support.checkpoints import copy, edit

MODERN = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "local_attention": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
NEWER = {
    "architectures": ["ModernBertForSequenceClassification"],
    "model_type": "modernbert",
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "dtype": "float32",
    "transformers_version": "5.1.0",
    "global_attn_every_n_layers": 3,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_theta": 160000.0, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 160000.0, "rope_type": "default"},
    },
    **MODERN,
}
"""What transformers 5 writes for a ModernBERT with one theta for all layers, as mmBERT has it."""


def kept(**config: Any) -> dict[str, Any]:
    return kept_keys(config, Path("config.json"))


def write(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    return folder


def read_newer(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    (tmp_path / "config.json").write_text(json.dumps(NEWER | changes))
    return read_config(tmp_path, "newer")


def test_a_modernbert_of_transformers_5_has_the_scores_of_its_own_thetas(tmp_path: Path) -> None:
    torch.manual_seed(0)
    right = ModernBertConfig(
        **MODERN, num_labels=1, global_rope_theta=160000.0, local_rope_theta=160000.0, global_attn_every_n_layers=3
    )
    expected = ModernBertForSequenceClassification._from_config(right, attn_implementation="eager").eval()
    for parameter in expected.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, 0, 0.5)
    found = load_model(open_checkpoint(write(tmp_path / "newer", NEWER, expected.state_dict())))
    ids = torch.randint(3, 50, (4, 40))
    with torch.inference_mode():
        scores = expected(input_ids=ids).logits
        assert scores.std() > 0.05
        assert torch.equal(found(input_ids=ids).logits, scores)
        for layer in found.model.layers:
            layer.attn.rotary_emb.inv_freq.fill_(0.1)
        assert not torch.equal(found(input_ids=ids).logits, scores), "thetas do nothing: this test proves nothing"


def test_a_translated_config_has_the_words_of_transformers_4(tmp_path: Path) -> None:
    read = read_newer(tmp_path)
    assert (read["global_rope_theta"], read["local_rope_theta"]) == (160000.0, 160000.0)
    assert read["global_attn_every_n_layers"] == 3
    every_second = {"layer_types": ["full_attention", "sliding_attention"] * 2, "global_attn_every_n_layers": 2}
    assert read_newer(tmp_path, **every_second)["global_attn_every_n_layers"] == 2


@pytest.mark.parametrize("positions", ["absolute", "sans_pos"])  # ModernBERT's own and mmBERT's
def test_keys_of_modernberts_authors_that_nothing_reads_are_left_out(tmp_path: Path, positions: str) -> None:
    older = {"rope_parameters": None, "layer_types": None}
    read = read_newer(tmp_path, **older, layer_norm_eps=1e-5, position_embedding_type=positions)
    assert not {"layer_norm_eps", "position_embedding_type", "global_rope_theta"} & set(read)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "'rope_parameters'.*cannot compute"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4.0}}}, "'rope_parameters'.*yarn"),
        ({"rope_parameters": {"full_attention": {"rope_theta": "big"}}}, "'rope_parameters'"),
        ({"rope_parameters": [1]}, "'rope_parameters'"),
        ({"global_rope_theta": 10000.0}, "contradicts itself: 'global_rope_theta' is 10000.0, and 160000.0"),
        ({"layer_types": ["sliding_attention"] * 4}, "'layer_types'.*cannot compute"),
        ({"layer_types": ["full_attention"] * 3}, "'layer_types'"),
        ({"layer_types": "full_attention"}, "'layer_types'"),
        ({"num_hidden_layers": 5}, "'layer_types'"),
        ({"global_attn_every_n_layers": 2}, "'layer_types'"),
        (
            {"rope_theta": 500.0},
            r"written by transformers 5\.1\.0.*ignores in \w+: rope_theta\. They may change scores: save",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "'rope_scaling' must be"),
        ({"layer_norm_eps": 1e-3}, r"ignores in \w+: layer_norm_eps\."),
        ({"position_embedding_type": "rotary"}, r"ignores in \w+: position_embedding_type\."),
    ],
)
def test_what_transformers_4_cannot_say_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_newer(tmp_path, **changes)


def test_deberta_keeps_the_keys_that_only_its_code_reads(tmp_path: Path) -> None:
    """`share_att_key` and its kin are no arguments of the config class; without them the weights do not fit."""
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"share_att_key": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm", "relative_attention": True}
    shape = {**sizes, "intermediate_size": 16, "pos_att_type": ["p2c", "c2p"], **special}
    model = DebertaV2ForSequenceClassification._from_config(
        DebertaV2Config(**shape, num_labels=1), attn_implementation="eager"
    )
    names = {"model_type": "deberta-v2", "architectures": ["DebertaV2ForSequenceClassification"], "num_labels": 1}
    folder = write(tmp_path / "deberta", {**names, **shape, "pos_att_type": "p2c|c2p"}, model.state_dict())
    found = load_model(open_checkpoint(folder)).eval()
    assert all(getattr(found.config, key) == value for key, value in special.items())
    ids = torch.arange(20)[None]
    assert torch.equal(found(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alibi", True),
        ("rope_parameters", {"rope_theta": 1e4}),
        ("embedding_size", 16),
        ("pruned_heads", {"0": [1]}),
        ("gap_size", 2),
        ("is_causal", True),
        ("use_rms_norm", False),
    ],
)
def test_a_key_that_would_be_lost_is_refused(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"ignores in bert: {key}\. They may change scores: save"):
        kept(model_type="bert", **{key: value})


def test_what_cannot_change_scores_is_left_out() -> None:
    harmless = {
        "_name_or_path": "x", "transformers_version": "5.0", "dtype": "bfloat16", "use_cache": False, "gap_size": 0,
        "finetuning_task": "sts", "gradient_checkpointing": True, "do_sample": False, "is_causal": False,
        "unknown": None, "pruned_heads": {}, "layers_to_keep": [], "directionality": "bidi",
    }  # fmt: skip
    assert kept(model_type="bert", hidden_size=64, **harmless) == {"model_type": "bert", "hidden_size": 64}


def test_another_name_of_a_key_must_have_the_same_value() -> None:
    assert kept(model_type="distilbert", dim=64, hidden_size=64) == {"model_type": "distilbert", "dim": 64}
    for config in ({"dim": 64, "hidden_size": 32}, {"hidden_size": 32}):
        with pytest.raises(CheckpointError, match=r"ignores in \w+: hidden_size\."):
            kept(model_type="distilbert", **config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", "wide", "must be a whole number, found 'wide'"),
        ("hidden_size", 64.0, r"must be a whole number, 1 or more, found 64\.0"),
        ("hidden_size", True, "must be a whole number"),
        ("hidden_size", None, "must be a whole number, found None"),
        ("hidden_size", -64, "must be a whole number, 1 or more"),
        ("num_hidden_layers", 0, "must be a whole number, 1 or more"),
        ("vocab_size", 10**30, r"must be a finite number below 2\*\*31"),
        ("hidden_size", {"a": 1}, "must be a number, a string or a list of them"),
        ("hidden_size", [[64]], "must be a number, a string or a list of them"),
        ("layer_norm_eps", float("nan"), "must be a finite number"),
        ("layer_norm_eps", 0, "must be a number above 0"),
        ("layer_norm_eps", "1e-12", "must be a number, found '1e-12'"),
        ("hidden_dropout_prob", float("inf"), "must be a finite number"),
        ("hidden_dropout_prob", -0.1, "must be a number, 0 or more"),
        ("hidden_act", "evil\x1b[2J", r"must be an activation that transformers knows, found 'evil\\x1b\[2J'"),
        ("hidden_act", 5, "must be a string"),
        ("position_embedding_type", "rotary", "must be a value that bert of transformers .* knows, found 'rotary'"),
        ("problem_type", "foo", "must be a value that bert"),
        ("is_decoder", "no", "must be true or false"),
        ("pad_token_id", "0", "must be the id of a token, or null"),
        ("pad_token_id", -1, "must be the id of a token, or null"),
        ("pad_token_id", 1.0, "must be the id of a token, or null"),
    ],
)
def test_a_value_that_the_key_cannot_have_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: '{key}' {message}"):
        kept(model_type="bert", **{key: value})


def test_values_of_published_configs_are_taken() -> None:
    assert kept(model_type="bert", position_embedding_type="relative_key_query")
    assert kept(model_type="albert", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0, net_structure_type=0)
    assert kept(model_type="electra", summary_type="first", summary_activation=None, type_vocab_size=2)
    assert kept(model_type="deberta-v2", max_relative_positions=-1, type_vocab_size=0, pooler_dropout=0.1)
    assert kept(model_type="deberta-v2", conv_act="gelu", conv_kernel_size=3, attention_head_size=8)
    assert kept(model_type="xlm-roberta", bos_token_id=None, classifier_dropout=None, problem_type="regression")


def test_a_model_of_another_class_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    edit(folder / "config.json", lambda config: config.update(architectures=["MyRobertaForSequenceClassification"]))
    with pytest.raises(CheckpointError, match=r"MyRoberta.*transformers has RobertaForSequenceClassification"):
        open_checkpoint(folder)


def test_what_tinybert_and_a_choice_of_attention_left_behind_is_left_out() -> None:
    left = {"emb_size": 32, "pre_trained": "", "training": "", "cell": {}, "structure": []}
    assert kept(model_type="bert", hidden_size=32, **left) == {"model_type": "bert", "hidden_size": 32}
    for wrong in ({"emb_size": 64}, {"pre_trained": "x"}, {"training": "x"}):
        with pytest.raises(CheckpointError, match=f"ignores in bert: {next(iter(wrong))}"):
            kept(model_type="bert", hidden_size=32, **wrong)


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_a_choice_of_attention_in_transformers_itself_changes_no_score(
    key: str, checkpoint: Path, tmp_path: Path
) -> None:
    chosen = copy(checkpoint, tmp_path / "chosen")
    edit(chosen / "config.json", lambda config: config.update({key: "sdpa"}))
    assert read_config(chosen, "chosen") == read_config(checkpoint, "checkpoint")
