"""How large a file, a function and its list of parameters may be, and that a file's name is there once."""

from __future__ import annotations

import ast
from collections import Counter

import pytest

from tests.support.sources import ROOTS, Source, every_source, sources, sources_of_tests

MOST_LINES = 300
MOST_LINES_OF_A_FUNCTION = 60
MOST_PARAMETERS = 8
ALL = pytest.mark.parametrize("source", [*every_source(), *sources_of_tests()], ids=lambda source: source.name)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Name a function's parameters, without `self` and `cls`."""
    found = function.args
    every = [*found.posonlyargs, *found.args, *found.kwonlyargs, *filter(None, (found.vararg, found.kwarg))]
    return [each.arg for each in every if each.arg not in ("self", "cls")]


@ALL
def test_no_file_is_longer_than_300_lines(source: Source) -> None:
    lines = len(source.path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{source.shown} has {lines} lines; {MOST_LINES} are allowed: split it by topic"


@ALL
def test_no_function_is_longer_than_60_lines(source: Source) -> None:
    for function in source.functions:
        lines = (function.end_lineno or 0) - function.lineno + 1
        assert lines <= MOST_LINES_OF_A_FUNCTION, (
            f"{source.shown}:{function.lineno} {function.name} has {lines} lines; "
            f"{MOST_LINES_OF_A_FUNCTION} are allowed"
        )


@ALL
def test_no_function_has_more_than_8_parameters(source: Source) -> None:
    for function in source.functions:
        count = len(parameters(function))
        assert count <= MOST_PARAMETERS, (
            f"{source.shown}:{function.lineno} {function.name} has {count} parameters; {MOST_PARAMETERS} are allowed: "
            "let a frozen dataclass say what belongs together"
        )


ATTRIBUTES = "attributes"
"""An ONNX node's attributes are open-ended, so that a writer of nodes may pass them on."""


@pytest.mark.parametrize("source", every_source(), ids=lambda source: source.name)
def test_options_are_not_passed_through_unseen(source: Source) -> None:
    for function in source.functions:
        name = function.args.kwarg.arg if function.args.kwarg else ATTRIBUTES
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                passed = [ast.unparse(each.value) for each in node.keywords if each.arg is None]
                assert name == ATTRIBUTES or name not in passed, (
                    f"{source.shown}:{node.lineno} {function.name} passes **{name} through; name the options"
                )


@pytest.mark.parametrize("package", ROOTS)
def test_no_file_name_is_there_twice(package: str) -> None:
    names = Counter(source.path.name for source in sources(package) if source.path.stem != "__init__")
    twice = [source.shown for source in sources(package) if names[source.path.name] > 1]
    assert twice == [], f"in {package}, these names are there twice"
