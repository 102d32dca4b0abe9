"""Candidates from an LLM that runs here, against transformers used by hand, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from cappy_bench.candidates.checkpoint import load_llm, load_llm_config, open_llm_checkpoint
from cappy_bench.candidates.decodings import DECODINGS, PAPER, Candidates, Decoding, Sample, derive_seed
from cappy_bench.candidates.likelihoods import log_likelihoods
from cappy_bench.candidates.llm import LocalLLM, open_llm
from cappy_bench.candidates.options import LLMOptions
from cappy_bench.candidates.prompts import PromptRules, encode_prompt, response_text
from cappy_engine.errors import CheckpointError, DeviceUnavailable, InstallationError, SampleError
from tests.support.places import ROOT
from tests.support.small_llms import POSITIONS, make_llm

KINDS = ("t5", "gpt2", "llama")
INSTRUCTIONS = ["Which colour has the sky?", "\nCount the dogs and the cats: there are ", "Ü"]
NEW = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make_llm(tmp_path_factory.mktemp("llms") / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def llms(folders: dict[str, Path]) -> dict[str, LocalLLM]:
    return {kind: open_small(folder) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def found(llms: dict[str, LocalLLM]) -> dict[str, list[Candidates]]:
    """17 candidates for each of INSTRUCTIONS, all in one batch."""
    return {kind: llm.sample(INSTRUCTIONS, PAPER, seed=3) for kind, llm in llms.items()}


def open_small(folder: Path, *, max_new_tokens: int = NEW, **options: Any) -> LocalLLM:
    return open_llm(folder, LLMOptions(**{"device": "cpu", **options}), max_new_tokens=max_new_tokens)


def by_hand(folder: Path, kind: str) -> tuple[Any, Any]:
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    return auto.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def generated(model: Any, tokenizer: Any, kind: str, instruction: str, **options: Any) -> list[list[int]]:
    """What transformers' `generate` gives for one instruction: the tokens behind the prompt."""
    tokens = tokenizer(instruction, return_tensors="pt")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    inputs = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    rows = model.generate(**inputs, max_new_tokens=NEW, pad_token_id=pad, **options)
    return [row[1:] if kind == "t5" else row[tokens["input_ids"].shape[1] :] for row in rows.tolist()]


def token_by_token(model: Any, kind: str, prompt: list[int], response: list[int]) -> float:
    """log p of a response: one forward pass for each of its tokens, in double precision where it is summed."""
    total = 0.0
    for place, token in enumerate(response):
        with torch.no_grad():
            if kind == "t5":
                start = torch.tensor([[model.config.decoder_start_token_id, *response[:place]]])
                logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=start).logits
            else:
                logits = model(input_ids=torch.tensor([[*prompt, *response[:place]]])).logits
        total += float(logits[0, -1].double().log_softmax(-1)[token])
    return total


def same(first: list[Candidates], second: list[Candidates]) -> bool:
    """The same texts, and log-likelihoods but for rounding."""
    one, other = ([sample for each in side for sample in each.samples] for side in (first, second))
    return [dataclasses.replace(sample, log_likelihood=None) for sample in one] == [
        dataclasses.replace(sample, log_likelihood=None) for sample in other
    ] and all(abs(a.log_likelihood - b.log_likelihood) < 1e-4 for a, b in zip(one, other, strict=True))  # type: ignore[operator]


# Candidates


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


# Log-likelihoods


def test_a_t5s_log_likelihood_is_its_loss_times_tokens(folders: dict[str, Path]) -> None:
    model, tokenizer = by_hand(folders["t5"], "t5")
    prompts = [tokenizer(text)["input_ids"] for text in INSTRUCTIONS]
    responses = [tokenizer(text)["input_ids"] for text in ("blue", "four dogs, three cats and one bird", "")]
    ours = log_likelihoods(model, prompts, responses, pad_id=0, decoder_start_id=0)
    for prompt, response, value in zip(prompts, responses, ours, strict=True):
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([response])).loss
        assert value == pytest.approx(-float(loss) * len(response), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [1, 40_000, 2**27], ids=["one by one", "some at a time", "all at once"])
def test_log_likelihoods_are_those_of_a_loop_over_tokens_however_padded(
    kind: str, most: int, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding tokens within a response count; so does one that is the end token."""
    model, _ = by_hand(folders[kind], kind)
    monkeypatch.setattr("cappy_bench.candidates.likelihoods.LOGITS_PER_PASS", most)
    prompts = [[9, 20, 33], [5], [40, 41, 42, 43, 44, 45, 46], [9, 20, 33], [7, 8]]
    responses = [[50, 0, 51, 1], [1], [60], [20] * NEW, [0, 0]]
    ours = log_likelihoods(model, prompts, responses, pad_id=0, decoder_start_id=0 if kind == "t5" else None)
    expected = [token_by_token(model, kind, *each) for each in zip(prompts, responses, strict=True)]
    assert ours == pytest.approx(expected, abs=2e-4)


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


# Texts


def test_a_causal_response_keeps_its_first_space(folders: dict[str, Path], tmp_path: Path) -> None:
    """Also with SentencePiece, whose decoder drops the first space of what it is given."""
    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(folders["t5"] / file, folder / file)
    document = json.loads((folder / "tokenizer.json").read_text())
    document["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(document))
    model, tokenizer = by_hand(folder, "llama")
    (each,) = open_small(folder).sample(["the sky is"], [dataclasses.replace(DECODINGS["sampling"], count=40)], seed=0)
    torch.manual_seed(derive_seed(0, "sampling"))
    rows = generated(model, tokenizer, "llama", "the sky is", do_sample=True, top_k=0, num_return_sequences=40)
    prompt = tokenizer("the sky is")["input_ids"]
    whole = [tokenizer.decode([*prompt, *row[: [*row, 1].index(1)]], skip_special_tokens=True) for row in rows]
    assert ["the sky is" + sample.text for sample in each.samples] == whole
    assert any(sample.text.startswith(" ") for sample in each.samples)
    assert any(sample.text and not sample.text.startswith(" ") for sample in each.samples)


def test_spaces_before_punctuation_are_not_cleaned_up(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "clean_up_tokenization_spaces": True}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("a , b .")["input_ids"]
    assert tokenizer.decode(tokens) == "a, b."
    assert response_text(tokenizer, tokens, behind=[]) == "a , b ."


# Prompts


def test_a_chat_gets_the_tokenizers_template(tmp_path: Path) -> None:
    folder = make_llm(tmp_path / "chat", "llama", is_chat=True)
    (chat,) = open_small(folder, is_chat=True).sample([" Count\n"], [DECODINGS["beam"]], seed=0)
    (plain,) = open_small(folder).sample(["USER: Count\n</s>BOT:"], [DECODINGS["beam"]], seed=0)
    assert chat == plain


def test_a_chat_without_a_template_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(SampleError, match="tokenizer of llama has no chat template"):
        open_small(folders["llama"], is_chat=True)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('no users here') }}", "no users here"),
        ("{% for %}", "Expected"),
        ("{{ messages[0]['content'] + 1 }}", "str"),
        ({"tools": "{{ messages }}"}, "default"),
    ],
    ids=["raises", "syntax", "type", "no default"],
)
def test_a_chat_template_that_fails_is_an_error_that_shows_the_instruction(
    template: Any, problem: str, folders: dict[str, Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["llama"])
    tokenizer.chat_template = template
    with pytest.raises(SampleError, match=f"chat template fails on the instruction 'Count': .*{problem}.*take the"):
        encode_prompt(tokenizer, "Count", PromptRules(is_chat=True, max_tokens=None, room=None), place=1)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_prompt_for_which_there_are_no_positions_is_refused_by_place_and_lengths(
    kind: str, llms: dict[str, LocalLLM]
) -> None:
    text = "zq" * 40
    with pytest.raises(
        SampleError, match=rf"instruction 2 has \d+ tokens and the model takes {POSITIONS - NEW} beside"
    ):
        llms[kind].check(["Count", text], PAPER)
    with pytest.raises(SampleError, match="instruction 2 has"):
        llms[kind].sample(["Count", text], PAPER, seed=0)


def test_a_t5_has_no_longest_prompt(llms: dict[str, LocalLLM]) -> None:
    (each,) = llms["t5"].sample(["Count the dogs " * 60], [DECODINGS["greedy"]], seed=0)
    assert not each.is_prompt_cut


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_prompt_is_cut_on_the_right_where_a_limit_is_given(kind: str, folders: dict[str, Path]) -> None:
    llm, text = open_small(folders[kind], max_prompt_tokens=20), "Count the dogs and the cats. " * 20
    long, short = llm.sample([text, "Count"], [DECODINGS["beam"]], seed=0)
    assert (long.is_prompt_cut, short.is_prompt_cut) == (True, False)
    model, tokenizer = by_hand(folders[kind], kind)
    kept = tokenizer(text)["input_ids"][:20]
    if kind == "t5":
        kept[-1] = 1  # the end of the sequence stays
    (row,) = model.generate(input_ids=torch.tensor([kept]), num_beams=4, max_new_tokens=NEW, pad_token_id=0).tolist()
    response = row[1:] if kind == "t5" else row[20:]
    assert long.samples[0].text == tokenizer.decode(response[: [*response, 1].index(1)], skip_special_tokens=True)


def test_a_long_chat_is_cut_within_the_message(tmp_path: Path) -> None:
    folder = make_llm(tmp_path / "chat", "llama", is_chat=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Count the dogs and the cats. " * 20
    prompt = encode_prompt(tokenizer, text, PromptRules(is_chat=True, max_tokens=20, room=None), place=1)
    shown = tokenizer.decode(prompt.tokens)
    assert prompt.is_cut
    assert len(prompt.tokens) == 20
    assert shown.startswith("USER:Count the dogs")
    assert shown.endswith("</s>BOT:")
    assert text.startswith(shown.removeprefix("USER:").removesuffix("</s>BOT:"))
    tight = open_small(folder, is_chat=True, max_prompt_tokens=6)
    with pytest.raises(SampleError, match="max_prompt_tokens 6 leaves no text of instruction 1"):
        tight.check([text], PAPER)


def test_an_instruction_without_tokens_is_refused(llms: dict[str, LocalLLM]) -> None:
    with pytest.raises(SampleError, match="instruction 2 gives no tokens"):
        llms["gpt2"].check(["a", ""], PAPER)
    llms["t5"].check([""], PAPER)  # has the end of the sequence


@pytest.mark.parametrize(
    ("options", "error", "problem"),
    [
        ({"max_new_tokens": 0}, SampleError, "max_new_tokens must be at least 1, got 0"),
        ({"max_prompt_tokens": 0}, SampleError, "max_prompt_tokens must be at least 1, got 0"),
        ({"max_new_tokens": POSITIONS}, SampleError, "room for prompts of 0 tokens"),
        (
            {"max_prompt_tokens": 60},
            SampleError,
            f"room for prompts of {POSITIONS - NEW} tokens in gpt2; max_prompt_tokens is 60",
        ),
        ({"device": "tpu"}, SampleError, "unknown device 'tpu'; choose from auto, cpu, cuda"),
        ({"dtype": "float16"}, SampleError, "unknown dtype 'float16'; choose from auto, float32, bfloat16"),
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


def test_several_gpus_need_accelerate_and_the_error_says_how_to_install_it(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_llm_checkpoint(folders["gpt2"])
    config = load_llm_config(checkpoint)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(InstallationError, match=r"several GPUs .*'accelerate'; .*'\.\[cpu,export,train\]'"):
        load_llm(checkpoint, config, device="cuda", dtype=torch.float32)


# Checkpoints


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
        ({"adapter_config.json": {"base_model_name_or_path": "a/b"}}, "is an adapter"),
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


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint: it does not exist"):
        open_small(tmp_path / "none")


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


@pytest.mark.slow
def test_a_hub_model_that_was_downloaded_before_works_offline(folders: dict[str, Path], tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--small"
    shutil.copytree(folders["t5"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = (
        "import json\nfrom cappy_bench.candidates.llm import open_llm\n"
        "from cappy_bench.candidates.decodings import DECODINGS\n"
        "from cappy_bench.candidates.options import LLMOptions\n"
        "llm = open_llm('someone/small', LLMOptions(device='cpu'), max_new_tokens=8)\n"
        "(each,) = llm.sample(['Count'], [DECODINGS['beam']], seed=0)\n"
        "print(json.dumps([dict(llm.facts), each.samples[0].text]))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    facts, text = json.loads(done.stdout)
    assert (facts["model"], facts["commit"]) == ("someone/small", commit)
    assert "sha256" not in facts
    assert text == open_small(folders["t5"]).sample(["Count"], [DECODINGS["beam"]], seed=0)[0].samples[0].text
