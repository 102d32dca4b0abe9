"""Training pairs from an LLM's samples: their labels against rouge-score itself and an LCS written by hand."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from cappy_engine.errors import AdaptError
from cappy_export.adaptation.rouge import rouge_l
from cappy_export.adaptation.samples import Sampled, examples_from_samples, read_samples

GOOD = {"instruction": "Is the sky blue?", "references": ["Yes"], "samples": ["yes.", "No"]}

words = st.sampled_from(
    "The dogs were running, quickly runs run! DOG flies flying über 42 generalisations 是 -".split()
)
short_words = st.sampled_from(["a", "bc", "def", "7"])  # the stemmer leaves words of up to three letters alone


def sentences(words: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(words, max_size=8).map(" ".join)


def sampled_of(references: list[list[str]]) -> list[Sampled]:
    return [Sampled(f"q{number}", tuple(texts), ()) for number, texts in enumerate(references)]


def labels_of(sampled: list[Sampled], **options: int) -> dict[tuple[str, str], float]:
    examples = examples_from_samples(sampled, **options)
    return dict(zip(examples.pairs, examples.labels.tolist(), strict=True))


def common(first: list[str], second: list[str]) -> int:
    """The length of the longest common subsequence."""
    if not first or not second:
        return 0
    if first[0] == second[0]:
        return 1 + common(first[1:], second[1:])
    return max(common(first[1:], second), common(first, second[1:]))


# Labels


@settings(deadline=None)
@given(references=st.lists(sentences(words), min_size=1, max_size=3), sample=sentences(words) | st.text())
def test_a_sample_gets_the_best_rouge_l_over_references(references: list[str], sample: str) -> None:
    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    best = max(float(rouge.score(reference, sample)["rougeL"].fmeasure) for reference in references)
    labels = labels_of([Sampled("q", tuple(references), (sample,))])
    assert labels[("q", sample)] == np.float32(1 if sample in references else best)


@settings(deadline=None)
@given(reference=st.lists(short_words, max_size=6), sample=st.lists(short_words, max_size=6))
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(reference: list[str], sample: list[str]) -> None:
    length = common(reference, sample)
    expected = 2 * length / (len(reference) + len(sample)) if length else 0.0
    labels = labels_of([Sampled("q", (" ".join(reference),), (" ".join(sample) + ".",))])  # the stop: no reference
    assert labels[("q", " ".join(sample) + ".")] == pytest.approx(expected, abs=1e-6)


def test_case_punctuation_and_endings_make_no_difference() -> None:
    assert labels_of([Sampled("q", ("The dogs jumped",), ("the DOG jumps!",))])[("q", "the DOG jumps!")] == 1


def test_references_get_1_and_those_of_others_0_whatever_the_samples_say() -> None:
    sampled = [Sampled("p", ("yes", "yes yes"), ("yes", "yes", "yes no")), Sampled("q", ("no",), ())]
    examples = examples_from_samples(sampled, negatives=5)
    assert examples.pairs == [("p", "yes"), ("p", "yes yes"), ("p", "no"), ("p", "yes no"), *examples.pairs[4:]]
    assert examples.labels.tolist() == [1, 1, 0, np.float32(2 / 3), 1, 0, 0]
    assert set(examples.pairs[4:]) == {("q", "no"), ("q", "yes"), ("q", "yes yes")}
    assert examples.groups.tolist() == [0, 0, 0, 0, 1, 1, 1]


@settings(deadline=None)
@given(
    references=st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=4), min_size=1, max_size=6),
    negatives=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_negatives_are_references_of_other_examples_as_many_as_asked_for_and_there_are(
    references: list[list[str]], negatives: int, seed: int
) -> None:
    labels = labels_of(sampled_of(references), negatives=negatives, seed=seed)
    for number, own in enumerate(references):
        found = {response: label for (instruction, response), label in labels.items() if instruction == f"q{number}"}
        others = {text for texts in references for text in texts} - set(own)
        assert {text for text, label in found.items() if label == 1} == set(own)
        assert found.keys() - set(own) <= others
        assert len(found.keys() - set(own)) == min(negatives, len(others))


def test_negatives_are_drawn_by_the_seed_alone() -> None:
    sampled = sampled_of([[str(number)] for number in range(50)])
    drawn = [examples_from_samples(sampled, seed=seed).pairs for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({response for _, response in drawn[0][1::2]}) > 20  # not the same few for all


def test_references_of_an_instruction_on_two_lines_all_get_1() -> None:
    sampled = [Sampled("q", ("red",), ()), Sampled("q", ("blue",), ()), Sampled("p", ("no",), ())]
    for seed in range(10):
        labels = labels_of(sampled, seed=seed)
        assert (labels[("q", "red")], labels[("q", "blue")]) == (1, 1)


def test_a_response_has_one_label_in_whatever_order_the_lines_come() -> None:
    lines = [Sampled("Name a colour.", ("red",), ("blue", "green")), Sampled("Name a colour.", ("blue",), ())]
    wanted = {("Name a colour.", "red"): 1, ("Name a colour.", "blue"): 1, ("Name a colour.", "green"): 0}
    assert labels_of(lines) == labels_of(lines[::-1]) == wanted
    # A sample that is another example's reference is drawn as a negative, too.
    lines = [Sampled("Is 2 even?", ("Yes",), ("Yes.",)), Sampled("Is 4 even?", ("Yes.",), ())]
    for seed in range(5):
        assert labels_of(lines, seed=seed)["Is 2 even?", "Yes."] == 1


def test_references_without_words_are_counted_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="cappy_export.adaptation.samples")
    labels = labels_of([Sampled("q", ("是", "да!"), ("是的",)), Sampled("p", ("yes", "?"), ())])
    assert labels[("q", "是的")] == 0
    messages = [record.getMessage() for record in caplog.records if record.name == "cappy_export.adaptation.samples"]
    assert messages == ["ROUGE-L sees no word (a to z, digits) in 3 references: samples for them get label 0"]
    caplog.clear()
    labels_of([Sampled("q", ("yes 是",), ("是",))])
    assert not [record for record in caplog.records if record.name == "cappy_export.adaptation.samples"]


# Reading


def test_samples_are_read_in_order_with_blank_lines_left_out(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    other = {"instruction": "", "references": ["", "é\n"], "samples": [], "id": 3}
    path.write_text("\ufeff" + json.dumps(GOOD) + "\n \n" + json.dumps(other), encoding="utf-8")
    assert read_samples(path) == [Sampled("Is the sky blue?", ("Yes",), ("yes.", "No")), Sampled("", ("", "é\n"), ())]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"references": []}, "has no references; an example needs at least one right answer"),
        ({"references": "Yes"}, "needs 'references', a list of strings; found 'Yes'"),
        ({"references": None}, "needs 'references', a list of strings; found None"),
        ({"references": ["Yes", 3]}, "an entry of 'references' must be a str, got int 3"),
        ({"samples": {"0": "Yes"}}, "needs 'samples', a list of strings; found {'0': 'Yes'}"),
        ({"samples": ["Yes", None]}, "an entry of 'samples' must be a str, got NoneType None"),
        ({"samples": ["a\ud800"]}, "an entry of 'samples' has a lone surrogate '\\ud800' at character 1"),
        ({"references": ["\udc00"]}, "an entry of 'references' has a lone surrogate '\\udc00' at character 0"),
        ({"instruction": 1}, "instruction must be a str, got int 1"),
        ({"samples": "x" * 100_000}, "needs 'samples', a list of strings; found 'xxx"),
    ],
    ids=lambda value: ascii(value)[:50],
)
def test_a_bad_line_is_refused_by_file_and_number(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | change))
    with pytest.raises(AdaptError) as caught:
        read_samples(path)
    assert str(caught.value).startswith(f"{path}, line 3: {problem}")
    assert len(str(caught.value)) < len(str(path)) + 200


@pytest.mark.parametrize("missing", ["instruction", "references", "samples"])
def test_a_line_without_a_field_is_refused_by_its_name(missing: str, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({name: value for name, value in GOOD.items() if name != missing}))
    with pytest.raises(AdaptError, match=rf"samples\.jsonl, line 1: .*'{missing}'"):
        read_samples(path)


def test_a_file_without_samples_or_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text("\n \n")
    with pytest.raises(AdaptError, match=r"blank\.jsonl holds no samples"):
        read_samples(tmp_path / "blank.jsonl")
    with pytest.raises(AdaptError, match=r"the samples cannot be read: .*none\.jsonl"):
        read_samples(tmp_path / "none.jsonl")


def test_a_folder_of_samples_is_to_be_joined(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(AdaptError, match=r"^the samples are read from one file, and .*; join its files"):
            read_samples(source)


def test_one_text_is_not_a_list_of_references() -> None:
    with pytest.raises(ValueError, match="references must be a list of texts, got one str"):
        rouge_l("It is blue.", "blue")
    assert rouge_l(iter(["It is red.", "It is blue."]), "It is blue.") == 1
