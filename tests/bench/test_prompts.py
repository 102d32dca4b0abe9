"""Instructions become prompts, and responses become texts, as the tokenizer and its template have it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from cappy_bench.candidates.decodings import DECODINGS, PAPER, derive_seed
from cappy_bench.candidates.llm import LocalLLM
from cappy_bench.candidates.prompts import Prompt, PromptRules, encode_prompt, response_text
from cappy_engine.errors import SampleError
from tests.support.small_llms import KINDS, NEW, POSITIONS, by_hand, generated, make_llm, open_small


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


def test_a_prompt_may_have_as_many_tokens_as_the_limit_or_the_model_takes(folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["t5"])
    tokens = tokenizer("Count the dogs")["input_ids"]

    def encoded(most: int | None, room: int | None) -> Prompt:
        rules = PromptRules(is_chat=False, max_tokens=most, room=room)
        return encode_prompt(tokenizer, "Count the dogs", rules, place=1)

    assert encoded(len(tokens), None) == encoded(None, len(tokens)) == Prompt(tokens)
    assert encoded(len(tokens) - 1, None).is_cut
    with pytest.raises(SampleError, match=rf"instruction 1 has {len(tokens)} tokens and the model takes"):
        encoded(None, len(tokens) - 1)
    with pytest.raises(SampleError, match="max_prompt_tokens 1 leaves no text of instruction 1"):
        encoded(1, None)  # the end of the sequence is one


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
    around = len(encode_prompt(tokenizer, "", PromptRules(is_chat=True, max_tokens=None, room=None), place=1).tokens)
    for most in (6, around):
        tight = open_small(folder, is_chat=True, max_prompt_tokens=most)
        with pytest.raises(SampleError, match=f"max_prompt_tokens {most} leaves no text of instruction 1"):
            tight.check([text], PAPER)


def test_an_instruction_without_tokens_is_refused(llms: dict[str, LocalLLM]) -> None:
    with pytest.raises(SampleError, match="instruction 2 gives no tokens"):
        llms["gpt2"].check(["a", ""], PAPER)
    llms["t5"].check([""], PAPER)  # has the end of the sequence
