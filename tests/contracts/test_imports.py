"""Who may import whom. The rules keep production free of heavy packages, and the walk of a pair easy to follow."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from itertools import pairwise

import pytest

from tests.support.places import ROOT
from tests.support.sources import (
    ROOTS,
    Source,
    every_source,
    is_loader,
    loaded_name,
    none,
    resolve,
    sources,
    sources_of_tests,
)

LAYERS = """
errors, storage, checks, forking, external_data, json_values, native/
< columns, activations, overlap, shares
< pairs, batching, buckets, session, bundle_files, ranking, publish
< bundle, pair_template, inputs
< canary
< tokenizer, dispatcher, scored, cpu/, gpu/
< parts, options < opening < exact < scorer < nodes
< tuning, slim
< bulk/, serving/, testing
< cli/
"""
"""The engine's modules and rooms: each may import what stands before the `<` on its left."""

BULK_LAYERS = """
tasks, totals
< formats/
< row_options, windows, output/
< input_files, work, resume/
< file_windows, runs
< score_file, estimate
< folders
< ray/
"""
"""The modules and rooms of `bulk/`, likewise."""

LAYERS_OF = {"cappy_engine": LAYERS, "cappy_engine.bulk": BULK_LAYERS}

PACKAGES = "cappy_engine < cappy_export < cappy_mini < cappy_bench"
"""Our packages, likewise: never back, not lazily, not by a string."""

FENCES = {
    "numpy": ["cappy_engine", "cappy_export", "cappy_bench", "cappy_mini"],
    "onnxruntime": ["cappy_engine.session", "cappy_export", "cappy_bench"],
    "tokenizers": ["cappy_engine.tokenizer", "cappy_bench", "cappy_mini"],
    "click": ["cappy_engine.cli", "cappy_export.cli", "cappy_bench"],
    "tqdm": ["cappy_engine.cli", "cappy_mini"],
    "filelock": ["cappy_engine.storage"],
    "pyarrow": ["cappy_engine.bulk.formats.tables", "cappy_engine.bulk.formats.json_columns"],
    "ray": ["cappy_engine.bulk.ray.pool", "cappy_engine.serving.http.ray_serve"],
    "triton_python_backend_utils": ["cappy_engine.serving.triton_model"],
    "msgspec": ["cappy_engine.serving"],
    "opentelemetry": ["cappy_engine.serving.tracing"],
    "starlette": ["cappy_engine.serving.http"],
    "uvicorn": ["cappy_engine.serving.http"],
    "httptools": ["cappy_engine.serving.http"],
    "uvloop": ["cappy_engine.serving.http", "cappy_bench.load"],
    "prometheus_client": ["cappy_engine.serving.metrics"],
    "torch": ["cappy_export", "cappy_bench", "cappy_mini"],
    "transformers": ["cappy_export", "cappy_bench", "cappy_mini"],
    "onnx": ["cappy_export", "cappy_bench"],
    "optimum": ["cappy_export", "cappy_bench"],
    "huggingface_hub": ["cappy_export.checkpoints"],
    "msgpack": ["cappy_export.checkpoints", "cappy_bench.make_checkpoint"],
    "safetensors": ["cappy_export", "cappy_bench", "cappy_mini"],
    "accelerate": ["cappy_export.adaptation"],
    "rouge_score": ["cappy_export.adaptation"],
    "openai": ["cappy_bench.candidates.endpoint"],
    "matplotlib": ["cappy_bench"],
}
"""Packages of others, and who alone may import them. What is not named may be imported by `cappy_bench` only."""

HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "optimum", "matplotlib", "tqdm", "accelerate", "openai"}
"""What no module with commands imports before a command is called."""

NOT_FOR_THE_ENGINES_TESTS = {"torch", "transformers", "onnx", "cappy_export", "cappy_bench", "cappy_mini"}


def layers(text: str) -> list[list[str]]:
    """Read `a, b < c` as [[a, b], [c]]."""
    return [[name.strip() for name in layer.split(",")] for layer in text.split("<")]


def place(source_name: str, package: str) -> str:
    """Name the module or room of a package that a module is, as LAYERS does: `cappy_engine.gpu.plan` is in `gpu/`."""
    name, _, rest = source_name.removeprefix(f"{package}.").partition(".")
    return f"{name}/" if rest or (ROOT / "engine" / package.replace(".", "/") / name).is_dir() else name


def root_of(name: str) -> str:
    return name.partition(".")[0]


def in_package(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def numbered(text: str) -> dict[str, int]:
    """Give each name the number of its layer."""
    return {name: number for number, layer in enumerate(layers(text)) for name in layer}


def inside(package: str) -> list[Source]:
    """Find what is below a package of the engine, but for `python -m cappy_engine`, which is above every layer."""
    every = [source for source in sources("cappy_engine") if "__main__" not in source.name]
    return [source for source in every if source.name.startswith(f"{package}.")]


RANK_OF = {package: rank for rank, (package,) in enumerate(layers(PACKAGES))}


# In the engine


@pytest.mark.parametrize("package", LAYERS_OF)
def test_engine_modules_import_only_what_stands_before_them(package: str) -> None:
    layer_of, known, wrong = numbered(LAYERS_OF[package]), {other.name for other in inside(package)}, []
    for source in inside(package):
        here = place(source.name, package)
        assert here in layer_of, f"{source.shown}: the layers of {package} have no {here}"
        for found in source.imports:
            name = resolve(found.name, known)
            there = place(name, package)
            if name in known and there != here and layer_of.get(there, 99) >= layer_of[here]:
                wrong.append(f"{source.shown}:{found.line} imports {name}, but {there} is not before {here}")
    none(wrong)


@pytest.mark.parametrize("package", LAYERS_OF)
def test_every_name_in_the_layers_is_a_module_or_a_folder(package: str) -> None:
    assert set(numbered(LAYERS_OF[package])) <= {place(source.name, package) for source in inside(package)}


def test_the_rules_are_told_to_contributors() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert LAYERS in page
    assert BULK_LAYERS in page
    assert f"`{PACKAGES}`" in page


# Between packages


def test_no_package_imports_a_higher_one() -> None:
    """Never back, not lazily either."""
    none(
        [
            f"{source.shown}:{found.line} imports {found.name}"
            for source in every_source()
            for found in source.imports
            if RANK_OF.get(root_of(found.name), -1) > RANK_OF[root_of(source.name)]
        ]
    )


def test_nothing_of_ours_is_imported_by_a_string() -> None:
    """Entry points in pyproject.toml are the only names. A package of others may be named where it is optional."""
    known = {other.name for other in every_source() if "." in other.name}
    wrong = []
    for source in every_source():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and is_loader(node) and root_of(loaded_name(node) or "cappy_engine") in ROOTS:
                wrong.append(f"{source.shown}:{node.lineno} loads a module by a string: {ast.unparse(node)}")
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                module = node.value.partition(":")[0]
                if module in known and not in_package(module, source.name.rpartition(".")[0]):
                    wrong.append(f"{source.shown}:{node.lineno} names the module {module} in a string")
    none(wrong)


def test_imports_are_absolute() -> None:
    """A relative one hides who imports whom."""
    none(
        [
            f"{source.shown}:{found.line}"
            for source in every_source()
            for found in source.imports
            if found.name.startswith(".")
        ]
    )


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """At the top of files; a package stands for its own `__init__` alone."""
    known = {source.name for source in every_source()}
    graph = {
        source.name: {resolve(found.name, known) for found in source.imports if not found.is_lazy} & known
        for source in every_source()
    }
    for circle in circles(graph):
        raise AssertionError(f"a circle of imports: {' -> '.join(circle)}")


def circles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """Find circles of a graph, each as the path around it."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> Iterator[list[str]]:
        if name in path:
            yield [*path[path.index(name) :], name]
        elif name not in done:
            for other in sorted(graph[name] - {name}):
                yield from walk(other, [*path, name])
            done.add(name)

    for name in graph:
        yield from walk(name, [])


def test_circles_are_found() -> None:
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": set()})) == []
    (found,) = circles({"a": {"b"}, "b": {"c"}, "c": {"b"}})
    assert set(pairwise(found)) == {("b", "c"), ("c", "b")}


# Packages of others


def test_packages_of_others_are_imported_within_their_fences() -> None:
    none(
        [
            f"{source.shown}:{found.line} imports {root_of(found.name)}"
            for source in every_source()
            for found in source.imports
            if root_of(found.name) not in {*ROOTS, *sys.stdlib_module_names}
            and not any(in_package(source.name, name) for name in FENCES.get(root_of(found.name), ["cappy_bench"]))
        ]
    )


def test_no_fence_is_open_for_what_does_not_need_it() -> None:
    for package in FENCES:
        for name in FENCES[package]:
            users = [source for source in every_source() if in_package(source.name, name) and package in source.roots]
            assert users, f"{name} does not import {package}; take it out of FENCES"


def test_nothing_heavy_is_imported_before_a_command_is_called() -> None:
    """Every module that an entry point of `cappy.commands` names, and the packages themselves, are imported here."""
    modules = {entry.module for entry in metadata.entry_points(group="cappy.commands")} | {
        *ROOTS,
        "cappy_engine.cli.main",
    }
    imports = "; ".join(f"import {name}" for name in sorted(modules))
    code = f"import sys; {imports}; print(*sorted({HEAVY} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], f"imported at the top of {', '.join(sorted(modules))}, or below"


# Tests


def test_the_engines_tests_need_nothing_but_the_engine() -> None:
    """They run in an environment that has no PyTorch: nor may what supports them import it."""
    by_name = {source.name: source for source in sources_of_tests()}
    reached = {name for name in by_name if in_package(name, "tests.engine")} | {"tests.conftest"}
    while True:
        supports = {resolve(found.name, set(by_name)) for name in reached for found in by_name[name].imports}
        if supports & by_name.keys() <= reached:
            break
        reached |= supports & by_name.keys()
    for source in map(by_name.__getitem__, sorted(reached)):
        assert not source.roots & NOT_FOR_THE_ENGINES_TESTS, (
            f"{source.shown} imports {', '.join(source.roots & NOT_FOR_THE_ENGINES_TESTS)}; "
            "move the test to tests/export, tests/bench or tests/contracts"
        )
