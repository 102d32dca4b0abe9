"""Candidates from an LLM that runs here, against transformers used by hand, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from cappy_bench.candidates.decodings import DECODINGS, PAPER, Candidates, Decoding, Sample, derive_seed
from cappy_bench.candidates.llm import LocalLLM
from cappy_engine.errors import CheckpointError, DeviceUnavailable, SampleError
from tests.support.small_llms import (
    INSTRUCTIONS,
    KINDS,
    NEW,
    POSITIONS,
    by_hand,
    generated,
    open_small,
    token_by_token,
)


@pytest.fixture(scope="module")
def found(llms: dict[str, LocalLLM]) -> dict[str, list[Candidates]]:
    """17 candidates for each of INSTRUCTIONS, all in one batch."""
    return {kind: llm.sample(INSTRUCTIONS, PAPER, seed=3) for kind, llm in llms.items()}


def same(first: list[Candidates], second: list[Candidates]) -> bool:
    """The same texts, and log-likelihoods but for rounding."""
    one, other = ([sample for each in side for sample in each.samples] for side in (first, second))
    return [dataclasses.replace(sample, log_likelihood=None) for sample in one] == [
        dataclasses.replace(sample, log_likelihood=None) for sample in other
    ] and all(abs(a.log_likelihood - b.log_likelihood) < 1e-4 for a, b in zip(one, other, strict=True))  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_instruction_gets_17_candidates_some_cut_and_some_complete(
    kind: str, found: dict[str, list[Candidates]]
) -> None:
    assert len(found[kind]) == len(INSTRUCTIONS)
    for each in found[kind]:
        assert [sample.decoding for sample in each.samples] == [d.name for d in PAPER for _ in range(d.count)]
        assert not each.is_prompt_cut
    samples = [sample for each in found[kind] for sample in each.samples]
    assert {sample.is_cut for sample in samples} == {True, False}
    assert all((sample.tokens == NEW) if sample.is_cut else (1 <= (sample.tokens or 0) <= NEW) for sample in samples)
    assert len({sample.text for sample in samples}) > len(samples) / 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["beam", "greedy"])
def test_beams_and_greedy_are_those_of_transformers(
    kind: str, name: str, folders: dict[str, Path], llms: dict[str, LocalLLM]
) -> None:
    """One instruction at a time and without padding, though ours are generated together."""
    model, tokenizer = by_hand(folders[kind], kind)
    ours = llms[kind].sample(INSTRUCTIONS, [DECODINGS[name]], seed=0)
    for instruction, each in zip(INSTRUCTIONS, ours, strict=True):
        options = {"num_beams": 4 if name == "beam" else 1, "do_sample": False}
        (tokens,) = generated(model, tokenizer, kind, instruction, **options)
        response = tokens[: tokens.index(1) + 1] if 1 in tokens else tokens
        (sample,) = each.samples
        assert sample.text == tokenizer.decode(response, skip_special_tokens=True)
        assert (sample.tokens, sample.is_cut) == (len(response), 1 not in tokens)
        prompt = tokenizer(instruction)["input_ids"]
        assert sample.log_likelihood == pytest.approx(token_by_token(model, kind, prompt, response), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decoding", PAPER[1:], ids=lambda decoding: decoding.name)
def test_samples_are_those_of_transformers_with_the_decodings_numbers(
    kind: str, decoding: Decoding, folders: dict[str, Path], llms: dict[str, LocalLLM]
) -> None:
    model, tokenizer = by_hand(folders[kind], kind)
    (ours,) = llms[kind].sample(INSTRUCTIONS[:1], [decoding], seed=7)
    torch.manual_seed(derive_seed(7, decoding.name))
    numbers = {
        "sampling": {"top_k": 0, "top_p": 1.0, "temperature": 1.0},
        "temperature": {"top_k": 0, "top_p": 1.0, "temperature": 0.9},
        "top-k": {"top_k": 40, "top_p": 1.0, "temperature": 1.0},
        "top-p": {"top_k": 0, "top_p": 0.95, "temperature": 1.0},
    }[decoding.name]
    rows = generated(model, tokenizer, kind, INSTRUCTIONS[0], do_sample=True, num_return_sequences=4, **numbers)
    expected = [tokenizer.decode(row[: row.index(1)] if 1 in row else row, skip_special_tokens=True) for row in rows]
    assert [sample.text for sample in ours.samples] == expected


def test_plain_sampling_leaves_all_tokens_in_and_top_k_only_40(folders: dict[str, Path]) -> None:
    """transformers would leave 50 in by default. The first token's log p tells how many are more likely."""
    model, tokenizer = by_hand(folders["llama"], "llama")
    with torch.no_grad():
        log_p = model(**tokenizer("Count", return_tensors="pt")).logits[0, -1].log_softmax(-1).sort(descending=True)[0]
    llm = open_small(folders["llama"], max_new_tokens=1)
    wide = [dataclasses.replace(DECODINGS[name], count=300) for name in ("sampling", "top-k")]
    (each,) = llm.sample(["Count"], wide, seed=0)
    values = [sample.log_likelihood or 0.0 for sample in each.samples]
    assert min(values[:300]) < float(log_p[60])
    assert min(values[300:]) >= float(log_p[39]) - 1e-4
    assert len(set(values[300:])) > 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_the_same_seed_gives_the_same_candidates_and_leaves_torchs_own_alone(
    kind: str, llms: dict[str, LocalLLM], found: dict[str, list[Candidates]]
) -> None:
    torch.manual_seed(11)
    expected = torch.rand(2)
    torch.manual_seed(11)
    assert llms[kind].sample(INSTRUCTIONS, PAPER, seed=3) == found[kind]
    assert torch.equal(torch.rand(2), expected)
    assert llms[kind].sample(INSTRUCTIONS, PAPER[1:2], seed=4) != llms[kind].sample(INSTRUCTIONS, PAPER[1:2], seed=3)


def test_a_decoding_gives_the_same_beside_others_and_alone(
    llms: dict[str, LocalLLM], found: dict[str, list[Candidates]]
) -> None:
    alone = llms["t5"].sample(INSTRUCTIONS, [DECODINGS["top-p"]], seed=3)
    together = [tuple(sample for sample in each.samples if sample.decoding == "top-p") for each in found["t5"]]
    assert [each.samples for each in alone] == together


SHIPPED = {
    "do_sample": True, "top_k": 1, "top_p": 0.1, "temperature": 0.05, "repetition_penalty": 9.0, "num_beams": 3,
    "no_repeat_ngram_size": 2, "min_new_tokens": 9, "length_penalty": -4.0, "forced_eos_token_id": 1,
    "bad_words_ids": [[7]], "suppress_tokens": [5, 6, 8, 9], "begin_suppress_tokens": [1], "max_length": 3,
    "num_return_sequences": 2, "typical_p": 0.2, "renormalize_logits": True,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "version"), [("t5", "4.57.6"), ("gpt2", "4.57.6"), ("llama", "4.30.0")])
def test_generation_settings_of_the_checkpoint_change_nothing(
    kind: str, version: str, folders: dict[str, Path], found: dict[str, list[Candidates]], tmp_path: Path
) -> None:
    """transformers takes a checkpoint's settings for all that was left at its default, by the version that wrote it."""
    folder = shutil.copytree(folders[kind], tmp_path / kind)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **SHIPPED, "transformers_version": version}))
    config = json.loads((folder / "config.json").read_text())
    legacy = {"repetition_penalty": 3.0, "top_k": 2, "num_beams": 2, "forced_eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps({**config, **legacy}))
    assert open_small(folder).sample(INSTRUCTIONS, PAPER, seed=3) == found[kind]


def test_end_tokens_of_the_checkpoints_generation_settings_count(folders: dict[str, Path], tmp_path: Path) -> None:
    """Chat models end their turns with tokens that only generation_config.json names."""
    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [token for token in range(3, len(tokenizer)) if token % 2]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, *turns]}))
    (each,) = open_small(folder).sample(["Count"], [dataclasses.replace(DECODINGS["sampling"], count=50)], seed=0)
    assert {sample.is_cut for sample in each.samples} == {False}
    assert max(sample.tokens or 0 for sample in each.samples) < NEW


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_in_the_batch_change_no_greedy_candidate(kind: str, llms: dict[str, LocalLLM]) -> None:
    greedy = [DECODINGS["greedy"], DECODINGS["beam"]]
    alone = [llms[kind].sample([text], greedy, seed=0)[0] for text in INSTRUCTIONS]
    assert same(llms[kind].sample(INSTRUCTIONS, greedy, seed=0), alone)


def test_log_likelihoods_do_not_depend_on_the_decoding(folders: dict[str, Path]) -> None:
    """The same text by any decoding has the same log-likelihood: temperature and top-k are not in it."""
    llm = open_small(folders["llama"], max_new_tokens=1)
    wide = [dataclasses.replace(DECODINGS[name], count=100) for name in ("sampling", "temperature", "top-k", "top-p")]
    (each,) = llm.sample(["Count"], [*wide, DECODINGS["greedy"]], seed=0)
    values: dict[str, list[float]] = {}
    for sample in each.samples:
        if "\ufffd" not in sample.text:  # half a character: several tokens look like it
            values.setdefault(sample.text, []).append(sample.log_likelihood or 0.0)
    decodings = [{sample.decoding for sample in each.samples if sample.text == text} for text in values]
    assert max(map(len, decodings)) == 5
    assert all(max(found) - min(found) < 1e-5 for found in values.values())


@pytest.mark.parametrize(
    ("options", "error", "problem"),
    [
        ({"max_new_tokens": 0}, SampleError, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": POSITIONS}, SampleError, "room for prompts of 0 tokens"),
        (
            {"max_prompt_tokens": 60},
            SampleError,
            f"room for prompts of {POSITIONS - NEW} tokens in gpt2; max_prompt_tokens is 60",
        ),
        ({"revision": "main"}, CheckpointError, "a local folder; --revision is for hub ids"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: dict[str, Any], error: type[Exception], problem: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(error, match=problem):
        open_small(folders["gpt2"], **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(DeviceUnavailable, match="no CUDA device"):
        open_small(folders["gpt2"], device="cuda")


@pytest.mark.parametrize(
    ("dtype", "advice"), [("float32", "take its line out of PROMPTS"), ("bfloat16", "start anew with --dtype float32")]
)
def test_a_log_likelihood_that_is_no_number_names_the_instruction_and_what_helps(
    dtype: str, advice: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """The weights of one letter are spoilt, so that only the prompt with that letter fails."""
    folder = shutil.copytree(folders["t5"], tmp_path / "t5")
    weights = load_file(folder / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (odd, *_) = set(tokenizer("日")["input_ids"]) - set(tokenizer("Count")["input_ids"])
    weights["shared.weight"][odd] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    llm = open_small(folder, dtype=dtype)
    with pytest.raises(SampleError, match=f"t5 gives a log-likelihood of nan for instruction 2; {advice}"):
        llm.sample(["Count", "日"], [DECODINGS["greedy"]], seed=0)
    with pytest.raises(SampleError, match=f"nan for instruction 8; {advice}"):
        llm.sample(["Count", "日"], [DECODINGS["greedy"]], seed=0, first=7)


def test_facts_tell_a_folder_by_its_files(folders: dict[str, Path], llms: dict[str, LocalLLM], tmp_path: Path) -> None:
    facts = dict(llms["gpt2"].facts)
    assert math.log2(int(facts.pop("sha256"), 16)) > 200
    assert facts == {
        "model": "gpt2", "kind": "causal", "device": "cpu", "dtype": "float32", "attention": "sdpa",
        "max_new_tokens": NEW, "max_prompt_tokens": None, "is_chat": False,
    }  # fmt: skip
    folder = shutil.copytree(folders["gpt2"], tmp_path / "gpt2")
    assert open_small(folder).facts == llms["gpt2"].facts
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 2}))
    assert open_small(folder).facts != llms["gpt2"].facts


def test_bfloat16_gives_the_same_kind_of_candidates(folders: dict[str, Path], llms: dict[str, LocalLLM]) -> None:
    llm = open_small(folders["t5"], dtype="bfloat16")
    (low,), (high,) = (each.sample(["Count"], [DECODINGS["greedy"]], seed=0) for each in (llm, llms["t5"]))
    assert isinstance(low.samples[0], Sample)
    assert low.samples[0].log_likelihood != high.samples[0].log_likelihood
    assert llm.facts["dtype"] == "bfloat16"
