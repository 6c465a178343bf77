"""Attributes that are looked up in rings, which the type checker does not see, exist."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "minigpt"


@cache
def trees() -> dict[Path, ast.Module]:
    """Syntax trees of the package's files."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}


@cache
def constants() -> dict[str, Any]:
    """Constants of all modules, by name."""
    return {
        line.targets[0].id: line.value.value
        for tree in trees().values()
        for line in tree.body
        if isinstance(line, ast.Assign)
        and isinstance(line.targets[0], ast.Name)
        and isinstance(line.value, ast.Constant)
    }


def text_of(node: ast.expr) -> str:
    """A literal text, or one made of constants of the package."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Name(id=name):
            return str(constants()[name])
        case ast.JoinedStr(values=parts):
            return "".join(
                text_of(part.value if isinstance(part, ast.FormattedValue) else part)
                for part in parts
            )
    raise KeyError(ast.unparse(node))


def looked_up_module(node: ast.expr | None) -> str | None:
    """Name of the module that an expression looks up; None for any other expression."""
    match node:
        case ast.Call(func=ast.Name(id="ring" | "find_ring"), args=[name]):
            try:
                return text_of(name)
            except KeyError:  # a variable
                return None
    return None


def looked_up_attributes(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Modules and their attributes, as in ``ring(module).attribute``, also through a variable."""
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    for scope in (tree, *functions):
        values: dict[str, list[str | None]] = defaultdict(list)
        for node in ast.walk(scope):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                values[node.id].append(None)
            if isinstance(node, ast.Assign | ast.NamedExpr | ast.AnnAssign):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if isinstance(target, ast.Name) and (module := looked_up_module(node.value)):
                    values[target.id].append(module)
        for node in ast.walk(scope):
            if isinstance(node, ast.Attribute):
                module = looked_up_module(node.value)
                if isinstance(node.value, ast.Name):
                    match values[node.value.id]:
                        case [None, str(found)] | [str(found), None]:  # assigned once
                            module = found
                if module is not None:
                    yield module, node.attr


def has(module: str, name: str) -> bool:
    try:
        return hasattr(import_module(f"minigpt.{module}"), name) or bool(
            import_module(f"minigpt.{module}.{name}")
        )
    except ModuleNotFoundError:
        return False


@pytest.mark.integration
def test_attributes_looked_up_in_rings_exist() -> None:
    found = {
        (module, name, path.relative_to(PACKAGE))
        for path, tree in trees().items()
        for module, name in looked_up_attributes(tree)
    }
    missing = [f"{path}: {module}.{name}" for module, name, path in found if not has(module, name)]
    assert not missing
    assert len(found) > 100


@pytest.mark.parametrize(
    "code",
    [
        'ring("errors").no_such_name',
        'def f():\n    if errors := find_ring("errors"):\n        errors.no_such_name()',
        'NAME = "errors"\nmodule = ring(NAME)\nmodule.no_such_name',
    ],
)
def test_a_missing_attribute_is_found(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(constants(), "NAME", "errors")
    [(module, name)] = set(looked_up_attributes(ast.parse(code)))
    assert (module, name) == ("errors", "no_such_name")
    assert not has(module, name)
