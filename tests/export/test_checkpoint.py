"""Checkpoints: what is read, what is refused, and what is said about it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints.checkpoint import load_model, load_tokenizer, open_checkpoint
from cappy_export.checkpoints.config import max_positions
from cappy_export.checkpoints.weights import read_weights

FILES = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin", "msgpack": "flax_model.msgpack"}


def copy(checkpoint: Path, folder: Path, *, weights: str | None = "safetensors") -> Path:
    """A copy of the checkpoint with one format of weights, or none."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(*FILES.values()))
    if weights is not None:
        shutil.copyfile(checkpoint / FILES[weights], folder / FILES[weights])
    return folder


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_all_formats_give_the_same_bytes(checkpoint: Path) -> None:
    weights = {name: read_weights([checkpoint / file], name) for name, file in FILES.items()}
    assert "jax" not in sys.modules
    assert "flax" not in sys.modules
    expected = load_file(checkpoint / "model.safetensors")
    for found in weights.values():
        assert set(found) == set(expected)
        assert all(found[key].numpy().tobytes() == expected[key].numpy().tobytes() for key in expected)


def test_safetensors_come_before_bin_before_msgpack(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    for name, file in FILES.items():
        opened = open_checkpoint(folder)
        assert (opened.format, opened.weight_files) == (name, (file,))
        (folder / file).unlink()
    with pytest.raises(
        CheckpointError, match=r"no weights.*model\.safetensors, pytorch_model\.bin, flax_model\.msgpack"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read_through_their_index(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    folder = copy(checkpoint, tmp_path / "copy", weights=None)
    weights = load_file(checkpoint / "model.safetensors")
    keys = sorted(weights)
    stem, ending = FILES[kind].rsplit(".", 1)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((keys[: len(keys) // 2], keys[len(keys) // 2 :]), start=1):
        name = f"{stem}-{number:05}-of-00002.{ending}"
        shard = {key: weights[key] for key in part}
        save_file(shard, folder / name) if kind == "safetensors" else torch.save(shard, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / f"{FILES[kind]}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    model = load_model(open_checkpoint(folder))
    assert all(torch.equal(model.state_dict()[key], weights[key]) for key in keys)


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "/etc/passwd", "missing.safetensors"])
def test_an_index_cannot_name_files_elsewhere(checkpoint: Path, tmp_path: Path, shard: str) -> None:
    folder = copy(checkpoint, tmp_path / "copy", weights=None)
    shutil.copyfile(checkpoint / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="not a file beside it"):
        open_checkpoint(folder)


def test_every_missing_unexpected_and_misshapen_key_is_in_one_error(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.dense.bias"], weights["classifier.out_proj.weight"]
    weights["lm_head.bias"] = torch.zeros(3)
    weights["classifier.dense.weight"] = torch.zeros(2, 2)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_model(open_checkpoint(folder))
    for text in (
        "2 missing: classifier.dense.bias, classifier.out_proj.weight",
        "1 unexpected: lm_head.bias",
        "1 of another shape: classifier.dense.weight (2, 2) instead of (32, 32)",
    ):
        assert text in str(caught.value)


def test_old_names_and_buffers_are_understood(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy", weights=None)
    weights = load_file(checkpoint / "model.safetensors")
    old = {key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
           for key, value in weights.items()}  # fmt: skip
    torch.save(old | {"roberta.embeddings.position_ids": torch.arange(514)[None]}, folder / "pytorch_model.bin")
    model = load_model(open_checkpoint(folder))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())


def test_half_precision_weights_become_float32(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy", weights=None)
    weights = {key: value.bfloat16() for key, value in load_file(checkpoint / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    edit(folder / "config.json", lambda config: config.update(torch_dtype="bfloat16"))
    model = load_model(open_checkpoint(folder))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(torch.equal(model.state_dict()[key], value.float()) for key, value in weights.items())


def test_the_model_is_the_one_that_transformers_loads(checkpoint: Path) -> None:
    expected = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    found = load_model(open_checkpoint(checkpoint))
    assert type(found) is type(expected)
    assert not found.training
    assert all(torch.equal(found.state_dict()[key], value) for key, value in expected.state_dict().items())


def test_nan_weights_are_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    weights["classifier.dense.bias"][3] = float("nan")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"NaN or infinite weights in classifier\.dense\.bias"):
        load_model(open_checkpoint(folder))


class Bomb:
    """What a hostile pickle holds: an object that runs a command when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.mark}",))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(checkpoint: Path, tmp_path: Path, legacy: bool) -> None:
    folder = copy(checkpoint, tmp_path / "copy", weights=None)
    mark = tmp_path / "it-ran"
    torch.save({"weight": Bomb(mark)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="could run code"):
        load_model(open_checkpoint(folder))
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "the bomb is a dud, and this test proves nothing"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_map", {"AutoConfig": "evil--config.Config"}),
        ("_attn_implementation_internal", "evil/kernels"),
        ("attn_implementation", "evil/kernels"),
        ("_attn_implementation", "evil/kernels"),
        ("kernel_config", {"Linear": "evil/kernels"}),
        ("quantization_config", {"quant_method": "evil"}),
        ("text_config", {"auto_map": {"AutoModel": "evil--model.Model"}}),
    ],
)
def test_config_keys_that_fetch_or_run_code_are_refused(checkpoint: Path, tmp_path: Path, key: str, value: Any) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    edit(folder / "config.json", lambda config: config.update({key: value}))
    with pytest.raises(CheckpointError, match="can make transformers fetch or run code"):
        open_checkpoint(folder)


def test_a_tokenizer_config_with_code_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    edit(
        folder / "tokenizer_config.json", lambda config: config.update(auto_map={"AutoTokenizer": ["evil--t.T", None]})
    )
    with pytest.raises(CheckpointError, match="can make transformers fetch or run code"):
        load_tokenizer(open_checkpoint(folder), max_length=512)


def test_a_harmless_unknown_key_is_dropped_and_said(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    edit(folder / "config.json", lambda config: config.update(wandb_run="abc", _attn_implementation_autoset=True))
    opened = open_checkpoint(folder)
    assert "wandb_run" not in opened.config
    assert "wandb_run" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}, "has 2 labels; needed is one"),
        ({"id2label": None}, "has 2 labels; needed is one"),
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
        ({"hidden_size": "wide"}, "describes no model"),
        ({"problem_type": "foo"}, "describes no model"),
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


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_weights_file_is_named(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    folder = copy(checkpoint, tmp_path / "copy", weights=kind)
    content = (folder / FILES[kind]).read_bytes()
    (folder / FILES[kind]).write_bytes(content[: len(content) // 3])
    with pytest.raises(CheckpointError, match=FILES[kind]):
        load_model(open_checkpoint(folder))


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


def test_a_weight_that_occurs_twice_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy", weights=None)
    weights = load_file(checkpoint / "model.safetensors")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file(weights, folder / names[0])
    save_file({"classifier.dense.bias": weights["classifier.dense.bias"] + 1}, folder / names[1])
    index = {"weight_map": dict.fromkeys(weights, names[0]) | {"classifier.dense.bias": names[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"classifier\.dense\.bias for the second time"):
        load_model(open_checkpoint(folder))


def test_a_checkpoint_without_tokenizer_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        load_tokenizer(open_checkpoint(folder), max_length=512)


def test_a_tokenizer_that_truncates_on_the_left_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    edit(folder / "tokenizer_config.json", lambda config: config.update(truncation_side="left"))
    with pytest.raises(CheckpointError, match="truncates and pads on the right"):
        load_tokenizer(open_checkpoint(folder), max_length=512)


def test_roberta_has_two_positions_less_than_its_table(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    assert max_positions(opened.config) == 512
    assert load_tokenizer(opened, max_length=100_000).model_max_length == 512
    assert load_tokenizer(opened, max_length=64).model_max_length == 64


@contextmanager
def hub(repositories: dict[str, Path], asked: list[str]) -> Iterator[str]:
    """A hub on this machine, as far as its client needs one: lists and serves the files of `repositories`."""
    commit = "0123456789abcdef0123456789abcdef01234567"

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            asked.append(self.path)
            for name, folder in repositories.items():
                if self.path.startswith(f"/api/models/{name}"):
                    files = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
                    return self.answer(json.dumps({"id": name, "sha": commit, "siblings": files}).encode())
                if self.path.startswith(f"/{name}/resolve/{commit}/"):
                    return self.answer((folder / self.path.rsplit("/", 1)[1]).read_bytes())
            return self.answer(b"Repository not found", status=404)

        def answer(self, body: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hash(body):x}"')
            self.send_header("X-Repo-Commit", commit)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def hub_environment(endpoint: str, home: Path, *, offline: bool = False) -> dict[str, str]:
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline)), "NO_PROXY": "127.0.0.1"}
    return {**os.environ, **own}


def run_export(source: str, bundle: Path, endpoint: str, home: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cappy_engine", "export", source, str(bundle)]
    environment = hub_environment(endpoint, home)
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def run_open(*arguments: str | None, environment: dict[str, str]) -> Any:
    """What `open_checkpoint` says in a process of its own, since the hub's client reads its environment once:
    [commit, weight files, files] for each of several revisions, or the error's text.
    """
    code = """
import json, sys
from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints.checkpoint import open_checkpoint
def opened(source, revision):
    try:
        found = open_checkpoint(source, revision=revision)
    except CheckpointError as error:
        return str(error)
    return [found.revision, found.weight_files, sorted(path.name for path in found.folder.iterdir())]
source, *revisions = json.loads(sys.argv[1])
print(json.dumps([opened(source, revision) for revision in revisions]))
"""
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_hub_id_downloads_one_format_and_is_recorded_with_its_commit(checkpoint: Path, tmp_path: Path) -> None:
    asked: list[str] = []
    (repository := tmp_path / "repository").mkdir()
    for path in checkpoint.iterdir():
        if path.name != "model.safetensors":
            shutil.copyfile(path, repository / path.name)
    (repository / "modeling_evil.py").write_text("raise SystemExit")
    with hub({"someone/cappy-tiny": repository}, asked) as endpoint:
        done = run_export("someone/cappy-tiny", tmp_path / "bundle", endpoint, tmp_path / "home")
        assert done.returncode == 0, done.stderr
        missing = run_export("someone/else", tmp_path / "other", endpoint, tmp_path / "home")
    source = json.loads((tmp_path / "bundle" / "manifest.json").read_text())["source"]
    assert (source["name"], source["format"]) == ("someone/cappy-tiny", "bin")
    assert source["revision"] == "0123456789abcdef0123456789abcdef01234567"
    fetched = {path.rsplit("/", 1)[1] for path in asked if "/resolve/" in path}
    assert "pytorch_model.bin" in fetched
    assert not fetched & {"flax_model.msgpack", "modeling_evil.py"}
    assert missing.returncode == 1
    assert "neither a local folder nor a hub checkpoint" in missing.stderr


@pytest.mark.slow
def test_offline_a_downloaded_checkpoint_is_used_with_its_commit(checkpoint: Path, tmp_path: Path) -> None:
    commit, home = "0123456789abcdef0123456789abcdef01234567", tmp_path / "home"
    with hub({"someone/cappy-tiny": checkpoint}, []) as endpoint:
        (online,) = run_open("someone/cappy-tiny", None, environment=hub_environment(endpoint, home))
    offline = hub_environment(endpoint, home, offline=True)
    found = run_open("someone/cappy-tiny", None, commit, "v2", environment=offline)
    assert found[:2] == [online, online]
    assert online[:2] == [commit, ["model.safetensors"]]
    assert "someone/cappy-tiny at revision v2 is not downloaded, and HF_HUB_OFFLINE is set" in found[2]


@pytest.mark.slow
def test_offline_a_checkpoint_that_is_not_downloaded_is_an_error_that_says_so(tmp_path: Path) -> None:
    offline = hub_environment("http://127.0.0.1:9", tmp_path, offline=True)
    (found,) = run_open("someone/else", None, environment=offline)
    assert "someone/else is not downloaded, and HF_HUB_OFFLINE is set; unset it, download it first" in found
