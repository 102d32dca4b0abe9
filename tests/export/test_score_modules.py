"""Scores that modules of sentence-transformers compute behind the model, as its CrossEncoder computes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling

from cappy_bench.make_checkpoint import make_family
from cappy_engine import Scorer
from cappy_engine.errors import CheckpointError
from cappy_export import ExportOptions, export
from cappy_export.checkpoints.checkpoint import digest_of_files, load_with_head, open_checkpoint
from cappy_export.proof.pairs import default_pairs
from cappy_export.proof.reference import score_checkpoint
from tests.support.checkpoints import edit
from tests.support.exported import made_once
from tests.support.hub import hub, hub_environment, run_open

PAIRS = [
    *default_pairs()[::20],
    ("Is it so? " * 90, "It is, and so on. " * 90),
    ("Is it?", "It is, and so on. " * 150),
    ("", ""),
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a tiny ModernBERT. It is read-only."""
    family = "gte-reranker-modernbert-base"
    return made_once(tmp_path_factory, family, lambda folder: make_family(folder, family, is_tiny=True))


@pytest.fixture(scope="module")
def ettin(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a tiny checkpoint in the form of ettin's rerankers. It is read-only."""
    return saved(encoder, tmp_path_factory.mktemp("ettin") / "ettin")


def saved(encoder: Path, folder: Path, *, pooling: str = "cls", has_bias: bool = False, last_bias: bool = True) -> Path:
    """What sentence-transformers saves of a CrossEncoder of these modules; no weight of the head is 0 or 1."""
    torch.manual_seed(7)
    model = Transformer(str(encoder))
    size = model.model.config.hidden_size
    head = [
        Dense(size, size, bias=has_bias, activation_function=torch.nn.GELU()),
        LayerNorm(size),
        Dense(size, 1, bias=last_bias, activation_function=torch.nn.Identity(), module_output_name="scores"),
    ]
    for module in head:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, 0.3, 0.5)
    modules = [model, Pooling(size, pooling), *head]
    CrossEncoder(modules=modules, device="cpu", activation_fn=torch.nn.Identity()).save_pretrained(str(folder))
    return folder


def their_scores(folder: Path, max_length: int) -> Any:
    theirs = CrossEncoder(str(folder), device="cpu", max_length=max_length)
    return theirs.predict(PAIRS, batch_size=1, show_progress_bar=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [{}, {"pooling": "mean"}, {"has_bias": True}, {"last_bias": False}],
    ids=["as-published", "mean", "bias", "no-last-bias"],
)
@pytest.mark.parametrize("norm_bias", [False, True])
def test_scores_are_those_of_sentence_transformers(
    encoder: Path, tmp_path: Path, change: dict[str, Any], norm_bias: bool
) -> None:
    """The reference of the parity gate, which knows no module, is held to them here."""
    own = shutil.copytree(encoder, tmp_path / "encoder")
    edit(own / "config.json", lambda config: config.update(norm_bias=norm_bias))
    folder = saved(own, tmp_path / "saved", **change)
    if norm_bias:  # not all zeros, as they are saved
        weights = load_file(folder / "model.safetensors")
        weights = {name: value + 0.1 if name.endswith("norm.bias") else value for name, value in weights.items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    wanted = their_scores(folder, 256)
    assert np.std(wanted) > 0.05
    np.testing.assert_allclose(score_checkpoint(folder, PAIRS, max_length=256), wanted, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_a_bundle_scores_as_sentence_transformers(ettin: Path, tmp_path: Path) -> None:
    manifest = export(ettin, tmp_path / "bundle", ExportOptions(precisions=("fp32", "int8"), max_length=1024))
    assert all(graph["unpadded"] for graph in manifest["graphs"].values())
    assert manifest["score"] == {
        "labels": 1,
        "activation": "identity",
        "told_by": "config_sentence_transformers.activation_fn",
    }
    with Scorer.open(tmp_path / "bundle", precision="fp32", device="cpu") as scorer:
        np.testing.assert_allclose(scorer.score(PAIRS), their_scores(ettin, 1024), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_what_make_checkpoint_makes_is_what_sentence_transformers_saves(ettin: Path, tmp_path: Path) -> None:
    made = make_family(tmp_path / "made", "ettin-reranker-17m-v1", is_tiny=True)
    for file in (
        "modules.json",
        "sentence_bert_config.json",
        *(f"{path.name}/config.json" for path in made.glob("*_*/")),
    ):
        assert json.loads((made / file).read_text()) == json.loads((ettin / file).read_text()), file
    wanted = their_scores(made, 256)
    assert np.std(wanted) > 0.05
    np.testing.assert_allclose(score_checkpoint(made, PAIRS, max_length=256), wanted, rtol=0, atol=2e-5)


def test_the_files_of_modules_are_part_of_the_checkpoint(ettin: Path, tmp_path: Path) -> None:
    files = open_checkpoint(ettin).files
    assert {"1_Pooling/config.json", "2_Dense/model.safetensors", "3_LayerNorm/config.json"} < set(files)
    other = shutil.copytree(ettin, tmp_path / "other")
    weights = load_file(other / "4_Dense" / "model.safetensors")
    save_file({**weights, "linear.bias": weights["linear.bias"] + 1}, other / "4_Dense" / "model.safetensors")
    assert digest_of_files(open_checkpoint(other).files) != digest_of_files(files)
    np.testing.assert_allclose(
        score_checkpoint(other, PAIRS[:3], max_length=64), score_checkpoint(ettin, PAIRS[:3], max_length=64) + 1, 1e-5
    )


@pytest.mark.slow
def test_the_files_of_modules_come_from_the_hub(ettin: Path, preloaded: Path, tmp_path: Path) -> None:
    asked: list[str] = []
    with hub({"someone/ettin": ettin}, asked) as endpoint:
        environment = hub_environment(endpoint, tmp_path / "home")
        ((_, weights, _),) = run_open(preloaded / "python", ("someone/ettin", None), environment=environment)
    fetched = {path.partition("/resolve/")[2].partition("/")[2] for path in asked} - {""}
    assert weights == ["model.safetensors"]
    assert fetched == set(open_checkpoint(ettin).files)


def test_a_training_begins_with_the_head(ettin: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(ettin, needs_head=False)
    model, new = load_with_head(opened)
    assert (opened.has_head, new) == (True, [])
    weights = load_file(ettin / "2_Dense" / "model.safetensors")
    assert torch.equal(model.head.dense.weight, weights["linear.weight"])
    folder = shutil.copytree(ettin, tmp_path / "copy")
    rewritten("modules.json", lambda modules: modules[:2])(folder)  # an encoder, then
    assert len(load_with_head(open_checkpoint(folder, needs_head=False))[1]) == 4


def changed(file: str, **keys: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / file, lambda config: config.update(keys))


def rewritten(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / file).write_text(json.dumps(change(json.loads((folder / file).read_text()))))

    return write


def renamed(file: str, other: str) -> Callable[[Path], None]:
    def rename(folder: Path) -> None:
        (folder / file).rename(folder / other)

    return rename


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            changed("1_Pooling/config.json", pooling_mode="max"),
            "1_Pooling/config.json: pooling_mode is 'max'; exported",
        ),
        (changed("1_Pooling/config.json", pooling_mode=["cls", "mean"]), "pooling_mode is .*; exported is 'cls' or"),
        (changed("1_Pooling/config.json", layers=3), "must have the keys"),
        (changed("2_Dense/config.json", activation_function="torch.nn.Tanh"), "activation_function is 'torch.nn.Tanh'"),
        (changed("2_Dense/config.json", bias=1), "bias is 1; exported is False or True"),
        (changed("2_Dense/config.json", bias=True), "must have linear.bias, linear.weight, found linear.weight"),
        (changed("2_Dense/config.json", module_input_name="token_embeddings"), "module_input_name is"),
        (changed("4_Dense/config.json", module_output_name="sentence_embedding"), "module_output_name is"),
        (changed("4_Dense/config.json", out_features=3), "out_features is 3; exported is 1"),
        (changed("4_Dense/config.json", activation_function="torch.nn.modules.activation.Sigmoid"), "exported is 'tor"),
        (changed("config.json", norm_eps=1e-12), "norm_eps is 1e-12"),
        (changed("config.json", model_type="bert"), "behind a model of the type bert"),
        (changed("sentence_bert_config.json", do_lower_case=True), "do_lower_case is True, which only sentence-transf"),
        (changed("sentence_bert_config.json", max_seq_length=128), "max_seq_length is 128.*as model_max_length"),
        (changed("sentence_bert_config.json", processing_kwargs={"text": {"max_length": 64}}), "processing_kwargs is"),
        (changed("sentence_bert_config.json", processor_kwargs={"do_lower_case": False}), "processor_kwargs is"),
        (
            changed("sentence_bert_config.json", tokenizer_args={"model_max_length": 32}),
            "put it into the token",
        ),
        (
            changed("sentence_bert_config.json", config_kwargs={"hidden_act": "relu"}),
            "config_kwargs is .*into con",
        ),
        (changed("sentence_bert_config.json", something_newer=[1]), r"something_newer is \[1\]"),
        *(
            (changed("sentence_bert_config.json", modality_config=wrong), "modality_config must be an object, found")
            for wrong in (["text"], 5, "text")
        ),
        (changed("sentence_bert_config.json", modality_config={"image": {}}), "has image; a bundle scores texts alone"),
        (
            renamed("sentence_bert_config.json", "sentence_roberta_config.json"),
            "only sentence_bert_config.json",
        ),
        (
            changed("sentence_bert_config.json", modality_config={"text": {"method": "f", "method_output_name": "x"}}),
            "the text's output is",
        ),
        (rewritten("modules.json", lambda modules: modules[:2]), "score comes from Pooling behind the model"),
        (rewritten("modules.json", lambda modules: modules + modules[1:2]), "Dense, Pooling behind the model"),
        (rewritten("modules.json", lambda modules: modules[1:]), "first module must be a Transformer beside it"),
        (rewritten("modules.json", lambda modules: []), "must hold a list of modules"),
        (
            rewritten("modules.json", lambda modules: [*modules[:4], {**modules[4], "type": "evil.Dense"}]),
            "score comes from Pooling, Dense, LayerNorm, evil.Dense behind",
        ),
        (
            rewritten("modules.json", lambda modules: [*modules[:4], {**modules[4], "path": "../4_Dense"}]),
            "a module's path must be a folder beside it",
        ),
        (
            rewritten("modules.json", lambda modules: [*modules[:4], {**modules[4], "kwargs": ["task"]}]),
            "its kwargs must be empty",
        ),
    ],
)
def test_a_head_that_is_not_known_exactly_is_refused(
    ettin: Path, tmp_path: Path, damage: Callable[[Path], None], told: str
) -> None:
    folder = shutil.copytree(ettin, tmp_path / "copy")
    damage(folder)
    with pytest.raises(CheckpointError, match=told):
        score_checkpoint(folder, PAIRS[:1], max_length=64)


def test_a_chat_template_that_sentence_transformers_uses_is_refused(encoder: Path, tmp_path: Path) -> None:
    """It saves that it writes pairs as messages, and then scores them otherwise than transformers does."""
    folder = shutil.copytree(encoder, tmp_path / "copy")
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    CrossEncoder(str(folder), device="cpu").save_pretrained(str(folder))
    with pytest.raises(CheckpointError, match="modality_config has message: sentence-transformers writes a pair as m"):
        score_checkpoint(folder, PAIRS[:1], max_length=64)


def test_weights_that_are_missing_or_of_another_head_are_told(ettin: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(ettin, tmp_path / "copy")
    norm = load_file(folder / "3_LayerNorm" / "model.safetensors")
    save_file({name: value[:16].clone() for name, value in norm.items()}, folder / "3_LayerNorm" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"3_LayerNorm/model.safetensors has \(16,\) as norm.bias"):
        score_checkpoint(folder, PAIRS[:1], max_length=64)
    (folder / "3_LayerNorm" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"3_LayerNorm/model.safetensors is missing; a module"):
        open_checkpoint(folder)
