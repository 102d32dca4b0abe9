"""List the 11 tasks of Cappy's zero-shot protocol: where their examples are, and which templates they have.

T0 (arXiv 2110.08207) holds these tasks out. Their names are those of Cappy's table (arXiv 2311.06720, section 4.1).
Their splits are those on which T0 evaluates: validation (ANLI's dev), and test for WinoGender and CrowS-Pairs, which
have no other.

The authors' file has the same tasks and templates, with about 100 examples of most. Which ones were drawn is not known,
nor whether its ANLI is dev or test; it numbers WinoGender's examples up to 463, but SuperGLUE's AX-g has 356. So
figures on these tasks stand beside the published ones, but are not the same measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of the protocol.

    `place`, `config` and `split` are the hub's; without a `place` the examples must be given, and `advice` says where
    to get them. The templates read `fields`, with their types; the one called `label_field` says which choice is right,
    by one of `labels`. `count` is the number of examples in the split. `template_names` are given if the templates'
    metadata do not tell which of them belong to the task.
    """

    place: str | None
    config: str
    split: str
    templates: tuple[str, str | None]
    fields: Mapping[str, type]
    labels: tuple[int | str, ...]
    count: int
    label_field: str = "label"
    template_names: tuple[str, ...] | None = None
    advice: str = ""


_ENTAILMENT = {"premise": str, "hypothesis": str, "label": int}
_STORY = dict.fromkeys((f"input_sentence_{number}" for number in range(1, 5)), str)


def _anli(part: str, count: int) -> Task:
    return Task(
        place="facebook/anli",
        config="plain_text",
        split=f"dev_{part}",
        templates=("anli", None),
        fields=_ENTAILMENT,
        labels=(0, 1, 2),
        count=count,
    )


def _super_glue(
    config: str,
    count: int,
    fields: Mapping[str, type],
    *,
    labels: tuple[int, ...] = (0, 1),
    split: str = "validation",
) -> Task:
    return Task(
        place="aps/super_glue",
        config=config,
        split=split,
        templates=("super_glue", config),
        fields=fields,
        labels=labels,
        count=count,
    )


TASKS: Mapping[str, Task] = {
    "ANLI R1": _anli("r1", 1000),
    "ANLI R2": _anli("r2", 1000),
    "ANLI R3": _anli("r3", 1200),
    "CB": _super_glue("cb", 56, _ENTAILMENT, labels=(0, 1, 2)),
    "RTE": _super_glue("rte", 277, _ENTAILMENT),
    "StoryCloze": Task(
        place=None,
        config="2016",
        split="validation",
        templates=("story_cloze", "2016"),
        fields={**_STORY, "sentence_quiz1": str, "sentence_quiz2": str, "answer_right_ending": int},
        label_field="answer_right_ending",
        labels=(1, 2),
        count=1871,
        advice="ask for 'cloze_test_val__spring2016 - cloze_test_ALL_val.csv' at https://cs.rochester.edu/nlp/rocstories",
    ),
    "WSC": _super_glue(
        "wsc.fixed", 104, {"text": str, "span1_text": str, "span2_text": str, "span2_index": int, "label": int}
    ),
    "WiC": _super_glue("wic", 638, {"word": str, "sentence1": str, "sentence2": str, "label": int}),
    "Winogrande": Task(
        place="allenai/winogrande",
        config="winogrande_xl",
        split="validation",
        templates=("winogrande", "winogrande_xl"),
        fields=dict.fromkeys(("sentence", "option1", "option2", "answer"), str),
        label_field="answer",
        labels=("1", "2"),
        count=1267,
    ),
    "WinoGender": _super_glue("axg", 356, _ENTAILMENT, split="test"),
    "Crows-Pairs": Task(
        place="nyu-mll/crows_pairs",
        config="crows_pairs",
        split="test",
        templates=("crows_pairs", None),
        fields={"sent_more": str, "sent_less": str, "stereo_antistereo": int},
        label_field="stereo_antistereo",
        labels=(0, 1),
        count=1508,
        template_names=(  # none of these claims to ask for the original task, which was made for language models
            *("anti_stereotype", "anti_stereotype_confirm", "demontraste_or_violate"),
            *("stereotype", "stereotype_confirm"),
        ),
        advice="take data/crows_pairs_anonymized.csv of https://github.com/nyu-mll/crows-pairs",
    ),
}
"""The tasks by name, in the order of Cappy's table."""

CSV_FIELDS: Mapping[str, str] = {
    **{f"InputSentence{number}": f"input_sentence_{number}" for number in range(1, 5)},
    **{f"RandomFifthSentenceQuiz{number}": f"sentence_quiz{number}" for number in (1, 2)},
    "AnswerRightEnding": "answer_right_ending",
}
"""Columns of StoryCloze's own file, and what the templates call them."""

CSV_LABELS: Mapping[str, int] = {"stereo": 0, "antistereo": 1}
"""Labels of CrowS-Pairs' own file, and the numbers that the templates know."""
