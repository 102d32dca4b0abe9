"""Render the input of `cappy evaluate promptsource` from examples of the tasks and PromptSource's templates.

A template is used if it has answer choices and asks for the dataset's own task (`original_task`), as in T0's
evaluation. Each answer choice is a response, and the target has label 1. Texts are as PromptSource gives them, which
strips the ends of prompts and choices.

`promptsource` and `datasets` are not dependencies: they are imported only when rows are rendered, and INSTALL installs
them. Pure but for reading examples; knows nothing of models.
"""

from __future__ import annotations

import csv
import importlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cappy_bench.quality.promptsource_tasks import CSV_FIELDS, CSV_LABELS, TASKS, Task
from cappy_engine.bulk.formats.json_lines import open_lines, read_fields
from cappy_engine.bulk.formats.lines import numbered
from cappy_engine.errors import CappyError, InstallationError, InvalidLine

Row = dict[str, Any]
"""A line of the protocol: {dataset_name, template_name, example_idx, instruction, response, label}."""
Files = Mapping[str, str | Path]
Say = Callable[[str], object]

INSTALL = (
    "pip install 'datasets>=3,<5' 'setuptools<82' jinja2 pandas pyyaml && "
    "pip install --no-deps --ignore-requires-python promptsource==0.2.3"
)
"""promptsource 0.2.3 asks for Python < 3.10 and an old streamlit, but its templates need neither. They do import
pkg_resources, which setuptools 82 no longer has. datasets 5 needs a huggingface-hub that is too new for the exporter's
transformers."""


class Template(Protocol):
    """The used part of PromptSource's templates; `metadata.original_task` is a bool, or None for not known."""

    name: str
    metadata: Any
    answer_choices: str | None

    def apply(self, example: dict[str, Any]) -> list[str]:
        """Give [prompt, target], stripped, from fields cut to 2,048 characters; the target may be empty or missing."""

    def get_answer_choices_list(self, example: dict[str, Any]) -> list[str] | None:
        """Give the answer choices, stripped."""


def render(
    tasks: Sequence[str] | None = None,
    *,
    examples: int | None = None,
    seed: int = 0,
    files: Files | None = None,
    say: Say,
) -> Iterator[Row]:
    """Render the rows of `tasks` (names of TASKS; None: all 11), by task, template, example and answer choice.

    With `examples` at most so many of each task, drawn by `seed`, the same for all templates. A task in `files` takes
    its examples from there and not from the hub: .jsonl with the fields in TASKS, or .csv as StoryCloze and CrowS-Pairs
    come in. `say` gets a line for each task when it is done, with the count of rows that were left out.

        >>> rows = render(["RTE"], examples=100, files={"RTE": "rte.jsonl"}, say=print)

    Raises, before the first row, InstallationError, and CappyError for a name that is not a task's and for a task that
    needs a file and has none. With the rows it raises CappyError for examples that cannot be read or lack a field, and
    for a task of which nothing could be rendered.
    """
    files = files or {}
    names = list(dict.fromkeys(TASKS if tasks is None else tasks))
    for name in (*names, *files):
        if name not in TASKS:
            raise CappyError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    for name in names:
        if TASKS[name].place is None and name not in files:
            raise CappyError(f"{name} is not on the hub; {TASKS[name].advice}, and give that file, or leave it out")
    _import_templates()
    if not files.keys() >= set(names):
        _import_datasets()
    return _rows(names, examples, seed, files, say)


def rows_of(dataset_name: str, template: Template, example_idx: int, example: Mapping[str, Any]) -> list[Row]:
    """Render a row for each answer choice, with label 1 for the target.

    There are no rows if the template does not apply: it gives no prompt, or a target outside its answer choices, at
    which T0's evaluation stops.

        >>> rows_of("RTE", template, 0, {"premise": "It rained.", "hypothesis": "It was wet.", "label": 0})
    """
    prompt, *targets = template.apply(dict(example))
    choices = template.get_answer_choices_list(dict(example)) or []
    if not prompt or len(targets) != 1 or targets[0] not in choices:
        return []
    key = {"dataset_name": dataset_name, "template_name": template.name, "example_idx": example_idx}
    return [
        {**key, "instruction": prompt, "response": choice, "label": int(choice == targets[0])} for choice in choices
    ]


def choose_templates(task: Task, templates: Iterable[Template]) -> list[Template]:
    """Choose the task's templates, by name: the ones it names, or all with answer choices for the original task.

        >>> choose_templates(TASKS["RTE"], DatasetTemplates("super_glue", "rte").templates.values())

    Raises CappyError for a template that the task names and PromptSource lacks.
    """
    found = {template.name: template for template in templates}
    names = task.template_names
    if names is None:
        names = tuple(name for name, each in found.items() if each.answer_choices and each.metadata.original_task)
    for name in names:
        if name not in found:
            raise CappyError(f"PromptSource has no template {name!r} of {task.templates}; run: {INSTALL}")
    return [found[name] for name in sorted(names)]


def draw(count: int, most: int | None, *, seed: int) -> list[int]:
    """Draw at most `most` of `count` examples (None: all), by `seed`, in their order.

    >>> draw(3, None, seed=0)
    [0, 1, 2]
    """
    if most is None or most >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), most))  # noqa: S311 - a sample, no secret


def read_examples(name: str, path: str | Path) -> list[dict[str, Any]]:
    """Read the examples of the task `name`: .csv with a header, or JSON Lines if the file is called otherwise.

        >>> read_examples("RTE", "rte.jsonl")

    Raises CappyError for a file that cannot be read, with the line.
    """
    try:
        if Path(path).suffix == ".csv":
            with Path(path).open("rb") as file:
                texts = (line.decode("utf-8-sig" if number == 1 else "utf-8") for number, line in numbered(file))
                return [_from_csv(TASKS[name], fields) for fields in csv.DictReader(texts, strict=True)]
        with open_lines(path) as lines:
            found = (read_fields(line, number, ()) for number, line in numbered(lines))
            return [fields for fields in found if fields is not None]
    except InvalidLine as error:
        raise CappyError(f"{path}, {error}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CappyError(f"the examples of {name} cannot be read from {path}: {error}") from error


def checked(name: str, index: int, example: Mapping[str, Any]) -> dict[str, Any]:
    """Take the fields of an example that the templates of the task `name` read.

        >>> checked("RTE", 0, {"premise": "It rained.", "hypothesis": "It was wet.", "label": 0, "idx": 7})
        {'premise': 'It rained.', 'hypothesis': 'It was wet.', 'label': 0}

    Raises CappyError for a field that is missing or of another type: a template would show nothing in its place, or
    take another target (Winogrande's compare `answer` with the text '1', not the number). It also raises it for a label
    that the task does not have: hidden ones are often -1, which a template would take for the last answer choice.
    """
    task = TASKS[name]
    for field, kind in task.fields.items():
        if type(example.get(field)) is not kind:
            found = f"{example[field]!r:.60}" if field in example else f"only {', '.join(map(str, example))}"
            raise CappyError(f"{name}, example {index}: needs {field!r}, of type {kind.__name__}; has {found}")
    label = example[task.label_field]
    if label not in task.labels:
        raise CappyError(
            f"{name}, example {index}: the {task.label_field} {label!r:.60} is none of "
            f"{', '.join(map(repr, task.labels))}; splits without labels (often called test) cannot be used"
        )
    return {field: example[field] for field in task.fields}


def _rows(names: Sequence[str], most: int | None, seed: int, files: Files, say: Say) -> Iterator[Row]:
    collection = _import_templates().DatasetTemplates
    for name in names:
        task = TASKS[name]
        found = read_examples(name, files[name]) if name in files else _from_hub(name, task)
        chosen = [(index, checked(name, index, found[index])) for index in draw(len(found), most, seed=seed)]
        templates = choose_templates(task, collection(*task.templates).templates.values())
        used = 0
        for template in templates:
            for index, example in chosen:
                rows = rows_of(name, template, index, example)
                used += bool(rows)
                yield from rows
        text = f"{name}: {len(chosen)} of {len(found)} examples, {len(templates)} templates"
        if not used:
            raise CappyError(f"{text}: nothing could be rendered")
        if len(found) != task.count:
            text += f"; the protocol's split has {task.count} examples"
        if used < len(chosen) * len(templates):
            text += f"; left out {len(chosen) * len(templates) - used}, with no prompt or no target among the choices"
        say(text)


def _from_csv(task: Task, fields: Mapping[str | Any, Any]) -> dict[str, Any]:
    example = {CSV_FIELDS.get(column, column): value for column, value in fields.items() if column is not None}
    for field, kind in task.fields.items():
        value = example.get(field)
        if kind is int and isinstance(value, str):
            example[field] = CSV_LABELS.get(value, int(value) if value.isdecimal() else value)
    return example


def _from_hub(name: str, task: Task) -> Sequence[Mapping[str, Any]]:
    """Load examples from the hub's own conversion to Parquet, which has one layout.

    It needs no dataset scripts, which `datasets` 4 does not run.
    """
    url = f"hf://datasets/{task.place}@refs/convert/parquet/{task.config}/{task.split}/*.parquet"
    load = _import_datasets().load_dataset
    try:
        return list(load("parquet", data_files={task.split: url}, split=task.split))
    except Exception as error:  # of whichever package failed below `datasets`
        advice = f" ({task.advice})" if task.advice else ""
        raise CappyError(
            f"the examples of {name} cannot be loaded from {url}: {error!r:.300}; give a file with them instead"
            f"{advice}, with the fields {', '.join(task.fields)}"
        ) from error


def _import_templates() -> Any:
    try:
        return importlib.import_module("promptsource.templates")
    except ImportError as error:
        raise _not_installed("promptsource", error) from error


def _import_datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise _not_installed("datasets", error) from error


def _not_installed(package: str, error: ImportError) -> InstallationError:
    return InstallationError(f"{package} cannot be imported ({error}); run: {INSTALL}")
