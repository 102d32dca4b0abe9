"""Which folders are generative checkpoints, and that nothing of them is run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cappy_bench.candidates.checkpoint import load_llm, load_llm_config, open_llm_checkpoint
from cappy_bench.candidates.decodings import DECODINGS, PAPER
from cappy_engine.errors import CheckpointError, InstallationError
from tests.support.places import ROOT
from tests.support.small_llms import INSTRUCTIONS, by_hand, open_small


def test_several_gpus_need_accelerate_and_the_error_says_how_to_install_it(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_llm_checkpoint(folders["gpt2"])
    config = load_llm_config(checkpoint)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(InstallationError, match=r"several GPUs .*'accelerate'; .*'\.\[cpu,export,train\]'"):
        load_llm(checkpoint, config, device="cuda", dtype=torch.float32)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "hostile",
    [
        {"_attn_implementation_internal": "someone/kernel"},
        {"attn_implementation": "someone/kernel"},
        {"auto_map": {"AutoModelForCausalLM": "code.Model"}},
        {"text_config": {"_attn_implementation_internal": "someone/kernel"}},
        {"parts": [{"auto_map": {"AutoTokenizer": ["code.T", None]}}]},
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_that_could_run_code_is_refused(
    file: str, hostile: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **hostile}))
    with pytest.raises(CheckpointError, match=f"{file} has .*which can make transformers fetch or run code"):
        open_small(folder)


def test_code_beside_the_weights_is_not_run(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    (folder / "custom_generate").mkdir()
    for path in (folder / "custom_generate" / "generate.py", folder / "modeling_llama.py"):
        path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef generate(*a, **k): raise SystemExit\n")
    open_small(folder).sample(["Count"], [DECODINGS["greedy"]], seed=0)
    assert not (tmp_path / "ran").exists()


def test_a_bin_is_loaded_if_it_holds_tensors_only(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["gpt2"], tmp_path / "gpt2")
    model, _ = by_hand(folder, "gpt2")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    ours = open_small(folder).sample(INSTRUCTIONS, PAPER[:1], seed=0)
    assert ours == open_small(folders["gpt2"]).sample(INSTRUCTIONS, PAPER[:1], seed=0)

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path(tmp_path / "ran").touch, ()

    torch.save({"lm_head.weight": Hostile()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="gpt2 cannot be loaded"):
        open_small(folder)
    assert not (tmp_path / "ran").exists()


def test_weights_that_do_not_fit_are_refused_rather_than_made_up(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["gpt2"], tmp_path / "gpt2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_layer": 3}))
    with pytest.raises(CheckpointError, match=r"the weights of gpt2 do not fit config\.json: 12 missing"):
        open_small(folder)
    (folder / "config.json").write_text(json.dumps({**config, "n_positions": 65}))
    with pytest.raises(CheckpointError, match="gpt2"):
        open_small(folder)


def test_weights_that_the_config_ties_need_not_be_there_twice(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["gpt2"], tmp_path / "gpt2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tied = AutoModelForCausalLM.from_pretrained(folder)
    tied.save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    (each,) = open_small(folder).sample(["Count"], [DECODINGS["greedy"]], seed=0)
    assert each.samples[0].log_likelihood is not None


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"model.safetensors": None}, "has no weights: needed is one of model.safetensors, pytorch_model.bin \\(or"),
        ({"config.json": None}, "has no config.json"),
        ({"config.json": {"model_type": "wizard"}}, "model type 'wizard', which this transformers does not know"),
        ({"config.json": {"model_type": "vit"}}, "generates no text"),
        ({"config.json": {"model_type": "encoder-decoder"}}, "describes no model that could be sampled from"),
        ({"adapter_config.json": {"base_model_name_or_path": "a/b"}}, "holds an adapter"),
        ({"tokenizer.json": None}, "has no usable tokenizer"),
        (
            {"model.safetensors": None, "model.safetensors.index.json": {"weight_map": {"a": "../model.safetensors"}}},
            "which is not a file beside it",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_llm_is_refused(
    files: dict[str, Any], problem: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["gpt2"], tmp_path / "gpt2")
    for name, content in files.items():
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=problem):
        open_small(folder)


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint: it does not exist"):
        open_small(tmp_path / "none")


@pytest.mark.slow
def test_a_hub_model_that_was_downloaded_before_works_offline(
    folders: dict[str, Path], preloaded: Path, tmp_path: Path
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--small"
    shutil.copytree(folders["t5"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = (
        "import json\nfrom cappy_bench.candidates.llm import open_llm\n"
        "from cappy_bench.candidates.decodings import DECODINGS\n"
        "from cappy_bench.candidates.sample_options import LLMOptions\n"
        "llm = open_llm('someone/small', LLMOptions(device='cpu'), max_new_tokens=8)\n"
        "(each,) = llm.sample(['Count'], [DECODINGS['beam']], seed=0)\n"
        "print(json.dumps([dict(llm.facts), each.samples[0].text]))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run(
        [preloaded / "python", "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    facts, text = json.loads(done.stdout)
    assert (facts["model"], facts["commit"]) == ("someone/small", commit)
    assert "sha256" not in facts
    assert text == open_small(folders["t5"]).sample(["Count"], [DECODINGS["beam"]], seed=0)[0].samples[0].text
