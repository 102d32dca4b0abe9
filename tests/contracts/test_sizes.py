"""How large a file, a function, its parameters and its first sentence may be, and that a file's name is there once."""

from __future__ import annotations

import ast
import re
from collections import Counter

from tests.support.sources import ROOTS, every_source, none, sources, sources_of_tests

MOST_LINES = 300
MOST_LINES_OF_A_FUNCTION = 60
MOST_PARAMETERS = 8
MOST_WORDS = 15
ALL = [*every_source(), *sources_of_tests()]
ATTRIBUTES = "attributes"
"""An ONNX node's attributes are open-ended, so that a writer of nodes may pass them on."""

END = re.compile(r"[.!?;:][\"'`)]*(?:\s|$)|\n\n")
"""Where the first sentence of a docstring ends; what stands behind a colon is a list, or a shape."""
SIGNATURE = re.compile(r"[A-Za-z0-9]+ \(")
"""An operator's docstring begins like this: it is in the models, as their documentation."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def lines_of(function: Function) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


def parameters(function: Function) -> list[str]:
    """Name a function's parameters, without `self` and `cls`."""
    found = function.args
    every = [*found.posonlyargs, *found.args, *found.kwonlyargs, *filter(None, (found.vararg, found.kwarg))]
    return [each.arg for each in every if each.arg not in ("self", "cls")]


def passed_through(function: Function) -> list[int]:
    """List the lines on which a function passes its `**options` on."""
    name = function.args.kwarg.arg if function.args.kwarg else ATTRIBUTES
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    spread = [(call.lineno, ast.unparse(each.value)) for call in calls for each in call.keywords if each.arg is None]
    return [line for line, value in spread if value == name != ATTRIBUTES]


def test_no_file_is_longer_than_300_lines_or_it_is_split_by_topic() -> None:
    counts = {source.shown: source.path.read_text(encoding="utf-8").count("\n") for source in ALL}
    none([f"{path} has {count} lines" for path, count in counts.items() if count > MOST_LINES])


def test_no_function_is_longer_than_60_lines() -> None:
    none(
        [
            f"{source.shown}:{function.lineno} {function.name} has {lines_of(function)} lines"
            for source in ALL
            for function in source.functions
            if lines_of(function) > MOST_LINES_OF_A_FUNCTION
        ]
    )


def test_no_function_has_more_than_8_parameters_or_a_dataclass_says_what_belongs_together() -> None:
    none(
        [
            f"{source.shown}:{function.lineno} {function.name} has {len(parameters(function))} parameters"
            for source in ALL
            for function in source.functions
            if len(parameters(function)) > MOST_PARAMETERS
        ]
    )


def test_the_first_sentence_of_a_docstring_has_at_most_15_words() -> None:
    long = []
    for source in every_source():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first = END.split(ast.get_docstring(node) or "", maxsplit=1)[0]
                if len(first.split()) > MOST_WORDS and not SIGNATURE.match(first):
                    long.append(f"{source.shown}: {' '.join(first.split())}")
    none(long)


def test_options_are_not_passed_through_unseen_but_named() -> None:
    none(
        [
            f"{source.shown}:{line} {function.name} passes its keyword arguments through"
            for source in every_source()
            for function in source.functions
            for line in passed_through(function)
        ]
    )


def test_no_file_name_is_there_twice_in_a_package() -> None:
    for package in ROOTS:
        names = Counter(source.path.name for source in sources(package) if source.path.stem != "__init__")
        none([source.shown for source in sources(package) if names[source.path.name] > 1])
