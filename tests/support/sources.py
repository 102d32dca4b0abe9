"""Read the project's own source files: what each imports, and how large it is. Imports none of them."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from tests.support.places import ROOT

ROOTS = {
    "cappy_engine": ROOT / "engine",
    "cappy_export": ROOT / "export",
    "cappy_bench": ROOT / "benchmarks",
    "cappy_mini": ROOT / "export",
}
"""Our packages, and the folders in which they lie."""


LOADERS = {"import_module", "__import__", "run_module", "run_path"}
"""Functions that import what a string names."""


@dataclass(frozen=True)
class Import:
    """A module, or a name in one, that a file imports. `is_lazy` where that happens inside a function."""

    name: str
    line: int
    is_lazy: bool


@dataclass(frozen=True)
class Source:
    """A Python file; `name` is its module's, as in `cappy_engine.cli.main`, and a package's without `__init__`."""

    path: Path
    name: str

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed file."""
        return ast.parse(self.path.read_text(encoding="utf-8"))

    @property
    def shown(self) -> str:
        """The path in the clone, for messages."""
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def imports(self) -> list[Import]:
        """All that the file imports, but for type checkers."""
        return list(_imports(self.tree, is_lazy=False))

    @property
    def roots(self) -> set[str]:
        """The top packages that the file imports."""
        return {found.name.partition(".")[0] for found in self.imports}

    @cached_property
    def functions(self) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
        """Every function and method."""
        return [node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@cache
def sources(package: str) -> list[Source]:
    """Find the files of one of our packages."""
    root = ROOTS[package]
    paths = sorted((root / package).rglob("*.py"))
    return [Source(path, _module(path.relative_to(root))) for path in paths]


@cache
def every_source() -> list[Source]:
    """Find the files of all our packages."""
    return [source for package in ROOTS for source in sources(package)]


@cache
def sources_of_tests() -> list[Source]:
    """Find the tests and what supports them."""
    return [Source(path, _module(path.relative_to(ROOT))) for path in sorted((ROOT / "tests").rglob("*.py"))]


def resolve(name: str, known: set[str]) -> str:
    """Give the module of `known` that an imported name is, or is in; else the name."""
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return name


def none(wrong: Sequence[str]) -> None:
    """Fail with a line for everything that is wrong."""
    assert not wrong, "\n" + "\n".join(wrong)


def is_loader(call: ast.Call) -> bool:
    """True if a call imports what a string names."""
    return ast.unparse(call.func).rpartition(".")[2] in LOADERS


def loaded_name(call: ast.Call) -> str | None:
    """Name the module that a call loads by a literal string; None for any other call, and a computed name."""
    match call.args[:1]:
        case [ast.Constant(value=str(name))] if is_loader(call):
            return name
    return None


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(node: ast.AST, *, is_lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, is_lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = "." * child.level + (child.module or "")
            yield from (Import(f"{module}.{alias.name}", child.lineno, is_lazy) for alias in child.names)
        elif isinstance(child, ast.Call) and (name := loaded_name(child)):
            yield Import(name, child.lineno, is_lazy)
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            yield from (found for part in child.orelse for found in _imports(part, is_lazy=is_lazy))
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, is_lazy=is_lazy or is_function)
