"""Rendering the protocol's input: by hand with a stand-in for PromptSource's templates, and, where PromptSource is
installed, against the authors' file."""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jinja2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.meta import find_undeclared_variables

from cappy_bench.quality.picking import worths_of_picks
from cappy_bench.quality.promptsource import read_examples
from cappy_bench.quality.promptsource_render import choose_templates, draw, render, rows_of
from cappy_bench.quality.promptsource_tasks import TASKS
from cappy_engine.errors import CappyError, InstallationError
from tests.support.places import DATA

REAL_FILE = DATA / "promptsource_test.jsonl.gz"
RTE = [
    {"premise": "It rained.", "hypothesis": "It was wet.", "label": 0, "idx": 7},
    {"premise": "It rained.", "hypothesis": "It was dry.", "label": 1, "idx": 8},
    {"premise": "It rained.", "hypothesis": "Who knows?", "label": 1, "idx": 9},
]


@dataclass
class StandIn:
    """What PromptSource's templates do, as their documentation has it."""

    name: str
    jinja: str
    answer_choices: str | None = "Yes ||| No"
    metadata: Any = field(default_factory=lambda: SimpleNamespace(original_task=True))

    def apply(self, example: dict[str, Any]) -> list[str]:
        choices = self.get_answer_choices_list(example)
        text = jinja2.Template(self.jinja, autoescape=False).render(**example, answer_choices=choices)
        return [part.strip() for part in text.split("|||")]

    def get_answer_choices_list(self, example: dict[str, Any]) -> list[str] | None:
        if self.answer_choices is None:
            return None
        text = jinja2.Template(self.answer_choices, autoescape=False).render(**example)
        return [part.strip() for part in text.split("|||")]


QUESTION = StandIn(
    "question",
    " {{premise}}\nIs it true that {{hypothesis}} ||| "
    "{% if hypothesis != 'Who knows?' %}{{answer_choices[label]}}{% endif %}",
)
GIVEN = StandIn("given", "Given {{premise}} {{hypothesis}} ||| {{answer_choices[label]}}", "True ||| False")
REVERSED = StandIn("reversed", "{{hypothesis}} Why? ||| {{premise}}", metadata=SimpleNamespace(original_task=False))
OPEN = StandIn("open", "{{premise}} So? ||| {{hypothesis}}", None)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """PromptSource with four templates for every dataset."""
    templates = {each.name: each for each in (QUESTION, REVERSED, OPEN, GIVEN)}
    module = ModuleType("promptsource.templates")
    module.DatasetTemplates = lambda *names: SimpleNamespace(templates=templates)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "promptsource", ModuleType("promptsource"))
    monkeypatch.setitem(sys.modules, "promptsource.templates", module)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def silent(text: str) -> None:
    """Say nothing."""


# Rows


def test_each_answer_choice_is_a_row_and_the_target_has_label_1() -> None:
    key = {"dataset_name": "RTE", "template_name": "question", "example_idx": 5}
    instruction = "It rained.\nIs it true that It was dry."
    assert rows_of("RTE", QUESTION, 5, RTE[1]) == [
        {**key, "instruction": instruction, "response": "Yes", "label": 0},
        {**key, "instruction": instruction, "response": "No", "label": 1},
    ]


@pytest.mark.parametrize(
    "template",
    [
        StandIn("hidden", "{{premise}} ||| {% if label > 0 %}{{answer_choices[label]}}{% endif %}"),
        StandIn("foreign", "{{premise}} ||| Maybe"),
        StandIn("no target", "{{premise}}"),
        StandIn("no prompt", "{{missing}} ||| Yes"),
        StandIn("two targets", "{{premise}} ||| Yes ||| No"),
        OPEN,
    ],
    ids=lambda template: template.name,
)
def test_a_template_that_does_not_apply_gives_no_rows(template: StandIn) -> None:
    assert rows_of("RTE", template, 0, RTE[0]) == []


def test_templates_have_answer_choices_and_ask_for_the_original_task() -> None:
    unknown = StandIn("unknown", "", metadata=SimpleNamespace(original_task=None))
    assert choose_templates(TASKS["RTE"], [QUESTION, REVERSED, OPEN, unknown, GIVEN]) == [GIVEN, QUESTION]


def test_a_task_that_names_its_templates_gets_these_or_an_error() -> None:
    names = TASKS["Crows-Pairs"].template_names
    assert names is not None
    templates = [StandIn(name, "", metadata=SimpleNamespace(original_task=False)) for name in (*names, "which_bias")]
    assert [each.name for each in choose_templates(TASKS["Crows-Pairs"], templates)] == sorted(names)
    with pytest.raises(CappyError, match="no template 'anti_stereotype' of"):
        choose_templates(TASKS["Crows-Pairs"], templates[1:])


@given(st.integers(0, 50), st.none() | st.integers(1, 60), st.integers(0, 9))
def test_examples_are_drawn_by_the_seed_once_each_and_in_order(count: int, most: int | None, seed: int) -> None:
    drawn = draw(count, most, seed=seed)
    assert drawn == sorted(set(drawn)) == draw(count, most, seed=seed)
    assert set(drawn) <= set(range(count))
    assert len(drawn) == (count if most is None else min(count, most))


def test_another_seed_draws_others() -> None:
    assert len({tuple(draw(1000, 5, seed=seed)) for seed in range(10)}) == 10


# Whole tasks


@pytest.mark.usefixtures("stand_ins")
def test_what_is_rendered_is_what_evaluate_reads(tmp_path: Path) -> None:
    said: list[str] = []
    rows = list(render(["RTE"], files={"RTE": write_jsonl(tmp_path / "rte.jsonl", RTE)}, say=said.append))
    assert [(row["template_name"], row["example_idx"]) for row in rows[::2]] == [
        *(("given", 0), ("given", 1), ("given", 2)),
        *(("question", 0), ("question", 1)),
    ]
    pairs, examples = read_examples(json.dumps(row).encode() for row in rows)
    scores = np.array([response in ("Yes", "True") for _, response in pairs], np.float32)
    assert worths_of_picks(examples, scores).mean() == 2 / 5
    assert said == [
        "RTE: 3 of 3 examples, 2 templates; the protocol's split has 277 examples; left out 1, with no prompt or no "
        "target among the choices"
    ]


@pytest.mark.usefixtures("stand_ins")
def test_all_templates_of_a_task_get_the_same_drawn_examples(tmp_path: Path) -> None:
    rows = [{"premise": str(number), "hypothesis": "?", "label": 0} for number in range(30)]
    path = write_jsonl(tmp_path / "rte.jsonl", rows)
    drawn = defaultdict(set)
    for row in render(["RTE"], examples=4, seed=3, files={"RTE": path}, say=silent):
        assert row["instruction"].split()[row["template_name"] == "given"] == str(row["example_idx"])
        drawn[row["template_name"]].add(row["example_idx"])
    assert len(drawn["given"]) == 4
    assert drawn["given"] == drawn["question"]


@pytest.mark.usefixtures("stand_ins")
def test_a_task_of_which_nothing_can_be_rendered_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = SimpleNamespace(templates={"foreign": StandIn("foreign", "{{premise}} ||| Maybe")})
    monkeypatch.setattr(sys.modules["promptsource.templates"], "DatasetTemplates", lambda *names: foreign)
    for rows in ([], RTE[:1]):
        path = write_jsonl(tmp_path / "rte.jsonl", rows)
        with pytest.raises(CappyError, match=rf"RTE: {len(rows)} of {len(rows)} examples.*nothing could be rendered"):
            list(render(["RTE"], files={"RTE": path}, say=silent))


@pytest.mark.usefixtures("stand_ins")
def test_a_name_that_is_no_task_is_an_error_before_anything_is_read() -> None:
    with pytest.raises(CappyError, match=r"no task 'rte'; there are ANLI R1, .*Crows-Pairs"):
        render(["rte"], say=silent)
    with pytest.raises(CappyError, match="no task 'COPA'"):
        render(["RTE"], files={"COPA": "copa.jsonl"}, say=silent)


def test_a_task_that_is_not_on_the_hub_asks_for_its_file() -> None:
    with pytest.raises(CappyError, match=r"StoryCloze is not on the hub; ask for 'cloze_test_val.*or leave it out"):
        render(say=silent)


def test_without_promptsource_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "promptsource", None)
    monkeypatch.delitem(sys.modules, "promptsource.templates", raising=False)
    with pytest.raises(InstallationError, match=r"--no-deps --ignore-requires-python promptsource==0\.2\.3"):
        render(["RTE"], say=silent)


@pytest.mark.usefixtures("stand_ins")
def test_datasets_is_needed_only_where_the_hub_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    path = write_jsonl(tmp_path / "rte.jsonl", RTE)
    with pytest.raises(InstallationError, match=r"datasets cannot be imported .*pip install 'datasets"):
        render(["RTE", "CB"], files={"RTE": path}, say=silent)
    assert list(render(["RTE"], files={"RTE": path}, say=silent))


@pytest.mark.usefixtures("stand_ins")
def test_examples_of_the_hub_are_taken_from_its_conversion_to_parquet(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(kind: str, *, data_files: dict[str, str], split: str) -> list[dict[str, Any]]:
        asked.append((kind, data_files, split))
        if split == "test":
            raise FileNotFoundError("no such file")
        return RTE

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert list(render(["RTE"], say=silent))
    url = "hf://datasets/aps/super_glue@refs/convert/parquet/rte/validation/*.parquet"
    assert asked == [("parquet", {"validation": url}, "validation")]
    message = r"WinoGender cannot be loaded from hf://.*no such file.*give a file .*fields premise, hypothesis, label"
    with pytest.raises(CappyError, match=message):
        list(render(["WinoGender"], say=silent))


# Files


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"label": "0"}, "example 1: needs 'label', of type int; has '0'"),
        ({"label": True}, "example 1: needs 'label', of type int; has True"),
        ({"premise": None}, "example 1: needs 'premise', of type str; has None"),
        ({"hypothesis": 3}, "example 1: needs 'hypothesis', of type str; has 3"),
    ],
)
def test_a_field_of_another_type_is_an_error(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rte.jsonl", [RTE[0], RTE[1] | change])
    with pytest.raises(CappyError, match=problem):
        list(render(["RTE"], files={"RTE": path}, say=silent))


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("RTE", {"label": -1}, "the label -1 is none of 0, 1"),
        ("RTE", {"label": 2}, "the label 2 is none of 0, 1"),
        ("CB", {"label": 3}, "the label 3 is none of 0, 1, 2"),
        ("Winogrande", {"answer": ""}, "the answer '' is none of '1', '2'"),
        ("StoryCloze", {"answer_right_ending": 0}, "the answer_right_ending 0 is none of 1, 2"),
    ],
)
def test_a_label_that_the_task_does_not_have_is_an_error_and_not_the_last_choice(
    name: str, change: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    fields = {field: kind() for field, kind in TASKS[name].fields.items()}
    path = write_jsonl(tmp_path / "examples.jsonl", [fields | change])
    with pytest.raises(CappyError, match=f"{name}, example 0: {problem}; .*splits without labels"):
        list(render([name], files={name: path}, say=silent))


@pytest.mark.usefixtures("stand_ins")
def test_a_missing_field_a_bad_line_and_no_file_are_errors(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rte.jsonl", [{"premise": "a", "label": 0}])
    with pytest.raises(CappyError, match="example 0: needs 'hypothesis', of type str; has only premise, label"):
        list(render(["RTE"], files={"RTE": path}, say=silent))
    path.write_text("{}\n[")
    with pytest.raises(CappyError, match=r"rte\.jsonl, line 2: not JSON"):
        list(render(["RTE"], files={"RTE": path}, say=silent))
    with pytest.raises(CappyError, match=r"examples of RTE cannot be read from .*none\.jsonl"):
        list(render(["RTE"], files={"RTE": tmp_path / "none.jsonl"}, say=silent))


@pytest.fixture
def real_templates() -> Callable[..., Any]:
    """PromptSource itself; skips where it is not installed."""
    module = pytest.importorskip("promptsource.templates", exc_type=ImportError)
    templates: Callable[..., Any] = module.DatasetTemplates
    return templates


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


# The authors' file: its examples are taken out of one template's rows, and must give back the rows of all


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
    files = {name: write_jsonl(tmp_path / "examples.jsonl", examples)}
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
