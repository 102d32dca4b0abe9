"""No dataclass of options forgets to check what its fields say that they take."""

from __future__ import annotations

import ast

import pytest

from tests.support.sources import every_source, none


@pytest.mark.slow
def test_every_class_with_asked_fields_checks_them() -> None:
    classes = [
        (source, node) for source in every_source() for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)
    ]
    asking = [(source, node) for source, node in classes if any(map(_is_asked, node.body))]
    assert len(asking) > 20
    none(
        [
            f"{source.shown}:{node.lineno} {node.name} does not call check_asked"
            for source, node in asking
            if "check_asked" not in {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        ]
    )


def _is_asked(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.AnnAssign) and any(
        isinstance(node, ast.Call) and ast.unparse(node.func) == "Asked" for node in ast.walk(statement.annotation)
    )
