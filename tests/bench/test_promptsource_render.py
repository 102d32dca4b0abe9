"""Rendering the protocol's input, with a stand-in for PromptSource's templates."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jinja2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cappy_bench.quality.picking import worths_of_picks
from cappy_bench.quality.promptsource import read_examples
from cappy_bench.quality.promptsource_render import choose_templates, draw, render, rows_of
from cappy_bench.quality.promptsource_render import read_examples as read_task
from cappy_bench.quality.promptsource_tasks import TASKS
from cappy_engine.errors import CappyError, InstallationError

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


def test_the_labels_of_files_with_columns_are_those_that_templates_know(tmp_path: Path) -> None:
    crows, story = tmp_path / "crows.csv", tmp_path / "story.csv"
    crows.write_text(",sent_more,sent_less,stereo_antistereo\n0,M.,L.,stereo\n1,M.,L.,antistereo\n")
    story.write_text("InputSentence1,RandomFifthSentenceQuiz2,AnswerRightEnding\nA.,B.,2\n")
    assert [example["stereo_antistereo"] for example in read_task("Crows-Pairs", crows)] == [0, 1]
    expected = {"input_sentence_1": "A.", "sentence_quiz2": "B.", "answer_right_ending": 2}
    assert read_task("StoryCloze", story) == [expected]


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
