"""The tasks against PromptSource itself and the authors' file, where they are.

The file's examples are taken out of one template's rows, and must give back the rows of all templates.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import pytest
from jinja2.meta import find_undeclared_variables

from cappy_bench.quality.promptsource_render import choose_templates, render
from cappy_bench.quality.promptsource_tasks import TASKS
from tests.support.places import DATA

REAL_FILE = DATA / "promptsource_test.jsonl.gz"


@pytest.fixture
def real_templates() -> Callable[..., Any]:
    """PromptSource itself; skips where it is not installed."""
    module = pytest.importorskip("promptsource.templates", exc_type=ImportError)
    templates: Callable[..., Any] = module.DatasetTemplates
    return templates


def silent(text: str) -> None:
    """Say nothing."""


@pytest.mark.usefixtures("real_templates")
def test_the_own_files_of_storycloze_and_crows_pairs_are_read(tmp_path: Path) -> None:
    story = tmp_path / "story.csv"
    story.write_text(
        "InputStoryid,InputSentence1,InputSentence2,InputSentence3,InputSentence4,RandomFifthSentenceQuiz1,"
        'RandomFifthSentenceQuiz2,AnswerRightEnding\nx,A.,"B, b.",C.,D.,E.,F.,2\n'
    )
    crows = tmp_path / "crows.csv"
    crows.write_text(
        ',sent_more,sent_less,stereo_antistereo,bias_type\n0,M.,L.,stereo,age\n1,"M, m.",L.,antistereo,age\n'
    )
    files = {"StoryCloze": story, "Crows-Pairs": crows}
    rows = list(render(list(files), files=files, say=silent))
    assert {(row["dataset_name"], row["example_idx"], row["response"]) for row in rows if row["label"]} == {
        *(("StoryCloze", 0, "F."), ("Crows-Pairs", 0, "Sentence A demonstrates a stereotype")),
        *(("Crows-Pairs", 1, "Sentence B violates a stereotype"), ("Crows-Pairs", 0, "Yes")),
        *(("Crows-Pairs", 1, "No"), ("Crows-Pairs", 0, "No"), ("Crows-Pairs", 1, "Yes")),
    }
    assert len({row["template_name"] for row in rows if row["dataset_name"] == "StoryCloze"}) == 5
    assert "A. B, b. C. D. What is a possible continuation" in rows[0]["instruction"]


def test_the_tasks_are_those_of_the_file_in_its_order() -> None:
    assert list(TASKS) == list(read_real())


@pytest.mark.parametrize("name", TASKS)
def test_the_templates_are_those_of_the_file(name: str, real_templates: Callable[..., Any]) -> None:
    chosen = choose_templates(TASKS[name], real_templates(*TASKS[name].templates).templates.values())
    assert [template.name for template in chosen] == list(read_real()[name])


@pytest.mark.parametrize("name", TASKS)
def test_the_templates_read_the_fields_that_are_checked(name: str, real_templates: Callable[..., Any]) -> None:
    parse = jinja2.Environment(autoescape=True).parse
    read: set[str] = set()
    chosen: list[Any] = choose_templates(TASKS[name], real_templates(*TASKS[name].templates).templates.values())
    for template in chosen:
        read |= find_undeclared_variables(parse(template.jinja + template.answer_choices))
    assert read - {"answer_choices"} == set(TASKS[name].fields)


@pytest.mark.slow
@pytest.mark.usefixtures("real_templates")
@pytest.mark.parametrize("name", TASKS)
def test_the_rows_of_the_file_are_rendered_again(name: str, tmp_path: Path) -> None:
    by_template = read_real()[name]
    expected = [row for rows in by_template.values() for row in rows]
    by_key: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in expected:
        by_key[row["template_name"], row["example_idx"]].append(row)
    numbers = sorted({row["example_idx"] for row in expected})
    examples = [recovered(name, {template: by_key[template, number] for template in by_template}) for number in numbers]
    files = {name: tmp_path / "examples.jsonl"}
    files[name].write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    rendered = render([name], files=files, say=silent)
    assert [row | {"example_idx": numbers[row["example_idx"]]} for row in rendered] == expected


def read_real() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The rows of the authors' file by task and template."""
    if not REAL_FILE.is_file():
        pytest.skip(f"needs the authors' file, {REAL_FILE}")
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with gzip.open(REAL_FILE, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            found.setdefault(row["dataset_name"], {}).setdefault(row["template_name"], []).append(row)
    return found


ENTAILMENT = ("GPT-3 style", r"(?P<premise>.*)\nQuestion: (?P<hypothesis>.*) True(, False,)? or (Neither|False)\?")
PATTERNS = {
    **dict.fromkeys(("ANLI R1", "ANLI R2", "ANLI R3", "CB", "RTE", "WinoGender"), ENTAILMENT),
    "StoryCloze": (
        "Choose Story Ending",
        r"Read the following story :\n\n(?P<input_sentence_1>.*)\n(?P<input_sentence_2>.*)\n(?P<input_sentence_3>.*)\n"
        r"(?P<input_sentence_4>.*)\n\nChoose a possible .*: \n- (?P<sentence_quiz1>.*)\n- (?P<sentence_quiz2>.*)",
    ),
    "WSC": (
        "by p they mean",
        r'(?P<text>.*) Here, by "(?P<span2_text>.*)" they mean "(?P<span1_text>.*)"\. Yes or no\?',
    ),
    "WiC": (
        "GPT-3-prompt",
        r"(?P<sentence1>.*)\n(?P<sentence2>.*)\nQuestion: Is the word '(?P<word>.*)' used in the same sense in .*",
    ),
    "Winogrande": (
        "fill in the blank",
        r"Fill in .* sentence:\n(?P<sentence>.*)\n\nChoices:\n- (?P<option1>.*)\n- (?P<option2>.*)\n\nAnswer:",
    ),
    "Crows-Pairs": ("stereotype_confirm", r"A: (?P<sent_more>.*)\nB: (?P<sent_less>.*)\nI believe sentence A is .*"),
}
"""A template of each task, and where it puts the fields."""


def recovered(name: str, by_template: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The example that was rendered, out of the rows of one template (of WSC: of two)."""
    template, pattern = PATTERNS[name]
    rows = by_template[template]
    match = re.fullmatch(pattern, rows[0]["instruction"], re.DOTALL)
    assert match, rows[0]["instruction"]
    example: dict[str, Any] = match.groupdict()
    place = [row["label"] for row in rows].index(1)
    if name == "Winogrande":
        return {**example, "answer": str(place + 1)}
    if name == "StoryCloze":
        return {**example, "answer_right_ending": place + 1}
    if name == "Crows-Pairs":
        return {**example, "stereo_antistereo": place}
    if name == "WSC":
        example["span2_index"] = index_of_pronoun(example, by_template["in other words"][0]["instruction"])
    return {**example, "label": place}


def index_of_pronoun(example: Mapping[str, str], instruction: str) -> int:
    """The word from which on "in other words" repeats the text, with the pronoun replaced."""
    words = example["text"].split(" ")
    for index in range(len(words)):
        rest = " ".join(words[index:]).replace(example["span2_text"], example["span1_text"])
        if instruction.endswith(f"In other words, {rest} True or false?"):
            return index
    raise AssertionError(instruction)
