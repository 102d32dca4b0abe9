"""Tables of quality: percents, lost and gained answers, and means over the tasks that they name."""

from __future__ import annotations

import numpy as np
import pytest

from cappy_bench.quality.evaluation import describe_accuracy, describe_rouge, evaluate, evaluation_document
from cappy_bench.quality.held_out import table
from cappy_bench.quality.picking import Example, wilson

EXAMPLES = [
    Example("RTE", (0, 1), (1.0, 0.0)),
    Example("RTE", (2, 3), (1.0, 0.0)),
    Example("RTE", (4, 5), (0.0, 1.0)),
    Example("CB", (6, 7, 8, 9), (0.0, 0.0, 1.0, 0.0)),
]
FIRST = np.array([0.9, 0.1, 0.8, 0.2, 0.6, 0.5, 0.0, 0.0, 0.9, 0.0])
"""Right in 2 of 3 and 1 of 1."""
SECOND = np.array([0.1, 0.9, 0.2, 0.8, 0.1, 0.5, 0.0, 0.0, 0.9, 0.0])
"""Loses the first two and gains the third."""


def test_accuracy_is_shown_in_percent_by_dataset_and_flips_by_what_they_cost() -> None:
    lines = describe_accuracy(evaluate("accuracy", EXAMPLES, {"fp32": FIRST, "int8": SECOND})).splitlines()
    low, high = wilson(2, 3)
    assert lines[1].split()[:3] == ["RTE", "3", "50.0"]
    assert f"66.7 ({100 * low:.1f} to {100 * high:.1f})" in lines[1]
    assert lines[1].index("66.7") < lines[1].index("33.3"), "the columns are in the order of their names"
    assert lines[2].split()[:4] == ["CB", "1", "25.0", "100.0"]
    assert lines[3].split()[:4] == ["mean", "4", "37.5", "83.3"], "over datasets, of 1 and 3 examples"
    told = "int8 against fp32: the same decision in 1 of 4 examples (25.00%); 2 right answers lost, 1 gained"
    assert told in lines
    assert lines[-1] == "  margins of the widest flips, in the first one's scores: 0.8, 0.6, 0.1"


def test_of_many_flips_the_margins_of_the_five_widest_are_shown() -> None:
    examples = [Example("RTE", (2 * place, 2 * place + 1), (1.0, 0.0)) for place in range(7)]
    first = np.array([score for place in range(1, 8) for score in (place / 10, 0.0)])
    shown = describe_accuracy(evaluate("accuracy", examples, {"fp32": first, "int8": -first}))
    assert shown.splitlines()[-1].endswith("in the first one's scores: 0.7, 0.6, 0.5, 0.4, 0.3")


def test_rouge_is_shown_times_100_with_how_much_better_the_first_scorer_is() -> None:
    found = evaluate("ROUGE-L", EXAMPLES, {"fp32": FIRST}, others={"beam": np.array([0.5, 0.25, 0.75, 0.25])})
    lines = describe_rouge(found).splitlines()
    assert lines[2].split() == ["task", "examples", "beam", "random", "fp32", "oracle"]
    assert lines[3].split() == ["RTE", "3", "50.0", "50.0", "66.7", "100.0"]
    assert lines[5].split() == ["mean", "4", "37.5", "37.5", "83.3", "100.0"]
    (beam,) = [line for line in lines if line.startswith("beam")]
    assert "37.5 (" in beam
    assert "+45.8 (" in beam
    (best,) = [line for line in lines if line.startswith("oracle")]
    assert "-16.7 (" in best


def test_where_the_order_of_equal_scores_decides_the_table_says_so() -> None:
    """A scorer that knows nothing would be right wherever the right answer stands first."""
    examples = [*EXAMPLES, Example("CB", (10, 11), (1.0, 1.0))]
    nothing, first = np.zeros(12), np.array([*FIRST, 0.5, 0.5])
    found = evaluate("accuracy", examples, {"fp32": first, "int8": nothing}, notes=["a note"])
    told = (
        "int8: in 4 of 5 examples several candidates score best and are not equally good; the first of them is the "
        "answer"
    )
    assert describe_accuracy(found).splitlines()[-2:] == ["a note", told]
    assert evaluation_document(found)["notes"] == ["a note", told]
    assert evaluate("accuracy", examples, {"fp32": first}).notes == ()


def test_means_of_held_out_tasks_are_of_the_nine_easy_ones_and_of_all() -> None:
    """trec and sst2 are of the nine; the third task is not."""
    rows = [
        {"task": task, "group": str(group), "label": float(place == 0)}
        for task, candidates in (("trec", 2), ("sst2", 2), ("another", 4))
        for group in range(2)
        for place in range(candidates)
    ]
    column = {"trec": 1.0, "sst2": 0.5, "another": 0.0}
    shown = table(rows, {"int8": column}).splitlines()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown]
    assert ["trec", "2", "50.0", "100.0"] in lines
    assert ["another", "2", "25.0", "0.0"] in lines
    assert lines[-2] == ["**mean of the nine**", "", "50.0", "75.00"]
    assert lines[-1] == ["**mean of all**", "", "41.7", "50.00"]


def test_differences_are_of_the_first_scorer_and_a_flip_may_be_neither_better_nor_worse() -> None:
    """Of one example alone a difference may be anything, -1 to 1."""
    scores = {"fp32": np.array([0.9, 0.1, 0.5]), "int8": np.array([0.1, 0.9, 0.5])}
    found = evaluate("ROUGE-L", [Example("count", (0, 1, 2), (0.5, 0.5, 0.2))], scores)
    differences = evaluation_document(found)["differences"]
    assert set(differences) == {"fp32 above random", "fp32 above oracle"}
    assert differences["fp32 above random"] == {"count": 1, "mean": pytest.approx(0.1), "low": -1.0, "high": 1.0}
    text = describe_rouge(found)
    assert "int8 against fp32: the same decision in 0 of 1 examples (0.00%); 0 worse answers, 0 better" in text
    (row,) = [line for line in text.splitlines() if line.startswith("int8 ") and "(0.0 to" in line]
    assert row.count("(") == 1, "a scorer's own difference stands with its flips"
