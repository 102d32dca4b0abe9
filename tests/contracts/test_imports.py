"""Who may import whom. The rules keep production free of heavy packages, and the walk of a pair easy to follow."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tests.support.places import ROOT

ENGINE, EXPORT = ROOT / "engine" / "cappy_engine", ROOT / "export" / "cappy_export"

LAYERS = [
    {"errors"},
    {"pairs", "lines", "machine", "buckets", "providers", "installation"},
    {"bundle", "tokenizer", "batching", "execution", "preflight"},
    {"placement", "engine_cache"},
    {"session"},
    {"canary"},
    {"gpu"},
    {"opening"},
    {"scorer"},
    {"files", "tuning", "picking"},
    {"promptsource", "report", "command_line"},
    {"evaluation"},
    {"build_commands", "score_commands", "task_commands", "evaluate_commands"},
    {"cli"},
]
"""Modules of the engine; each may import from the layers above it only."""

FENCES = {
    "onnxruntime": {"session"},
    "tokenizers": {"tokenizer"},
    "tqdm": {"build_commands", "score_commands", "task_commands"},
    "numpy": {"tokenizer", "batching", "buckets", "session", "canary", "gpu", "scorer", "picking"},
}
"""Packages that the engine may import, and its modules that do."""

EXTRAS = {"accelerate": {"adapt"}, "rouge_score": {"rouge"}, "matplotlib": {"plots"}, "openai": {"endpoint"}}
"""Packages of the extras `train` and `llm`, and the modules of the exporter that may import them."""

EXPORTING = {"pipeline", "reference"}
"""What `cappy export` and `cappy verify` start from: nothing that these import may need an extra's package."""

EXPORT_MAY_IMPORT = {
    *("errors", "pairs", "lines", "machine", "buckets", "bundle", "tokenizer", "batching", "session", "scorer"),
    *("picking", "evaluation"),
}
"""Modules of the engine that the exporter imports: nothing of GPUs, for which it writes models, but runs none there."""


def imports(path: Path) -> set[str]:
    """Every module that the file imports, anywhere in it, with names imported from a package as `package.name`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide who imports whom"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            found |= {str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)}
    return found


def modules_of(package: str, names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith(f"{package}.")}


ENGINE_FILES = sorted(ENGINE.glob("*.py"))
EXPORT_FILES = sorted(EXPORT.glob("*.py"))


def test_every_module_has_a_layer() -> None:
    assert set().union(*LAYERS) == {path.stem for path in ENGINE_FILES} - {"__init__"}


@pytest.mark.parametrize("path", [path for path in ENGINE_FILES if path.stem != "__init__"], ids=lambda path: path.stem)
def test_engine_modules_import_only_from_lower_layers(path: Path) -> None:
    names = {path.stem for path in ENGINE_FILES}
    below: set[str] = set()
    for layer in LAYERS:
        if path.stem in layer:
            break
        below |= layer
    assert (modules_of("cappy_engine", imports(path)) & names) <= below


@pytest.mark.parametrize("path", ENGINE_FILES, ids=lambda path: path.stem)
def test_the_engine_imports_nothing_heavy(path: Path) -> None:
    third_party = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"cappy_engine"}
    assert third_party <= set(FENCES)
    for package in third_party:
        assert path.stem in FENCES[package]


def test_no_fence_is_open_for_a_module_that_does_not_need_it() -> None:
    imported = {path.stem: {name.split(".")[0] for name in imports(path)} for path in ENGINE_FILES}
    for package, modules in FENCES.items():
        assert modules == {name for name, packages in imported.items() if package in packages}
    used = set().union(*(modules_of("cappy_engine", imports(path)) for path in EXPORT_FILES))
    assert used & {path.stem for path in ENGINE_FILES} == EXPORT_MAY_IMPORT


@pytest.mark.parametrize(
    "name", ["cli", "command_line", "build_commands", "score_commands", "task_commands", "evaluate_commands"]
)
def test_commands_import_what_is_heavy_only_inside_a_function(name: str) -> None:
    tree = ast.parse((ENGINE / f"{name}.py").read_text(encoding="utf-8"))
    top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not {name for name in top if name.split(".")[0] in ("cappy_export", "tqdm", "onnxruntime")}


@pytest.mark.parametrize("path", EXPORT_FILES, ids=lambda path: path.stem)
def test_the_exporter_imports_the_engine_only_up_to_the_scorer(path: Path) -> None:
    names = {path.stem for path in ENGINE_FILES}
    assert (modules_of("cappy_engine", imports(path)) & names) <= EXPORT_MAY_IMPORT


@pytest.mark.parametrize("path", EXPORT_FILES, ids=lambda path: path.stem)
def test_packages_of_the_extras_are_imported_by_their_modules_only(path: Path) -> None:
    packages = {name.split(".")[0] for name in imports(path)}
    assert {package for package, modules in EXTRAS.items() if path.stem not in modules}.isdisjoint(packages)


def test_exporting_needs_nothing_of_the_extras() -> None:
    imported = {path.stem: modules_of("cappy_export", imports(path)) for path in EXPORT_FILES}
    reached: set[str] = set()
    while found := set().union(EXPORTING, *(imported.get(name, set()) for name in reached)) - reached:
        reached |= found
    assert reached.isdisjoint(set().union(*EXTRAS.values()))


def test_decodings_and_files_of_candidates_need_no_llm() -> None:
    """What is sampled, and how files grow, is known apart from the LLMs: they meet in `decodings.Sampler` only."""
    for name in ("decodings", "partial", "sampling", "endpoint"):
        names = imports(EXPORT / f"{name}.py")
        third_party = {each.split(".")[0] for each in names} - set(sys.stdlib_module_names) - {"cappy_engine"}
        assert third_party <= {"cappy_export"} | ({"openai"} if name == "endpoint" else set())
        assert modules_of("cappy_export", names) & {path.stem for path in EXPORT_FILES} <= {"decodings", "partial"}
