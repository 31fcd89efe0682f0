"""What holds for the tests themselves."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "tests").rglob("*.py"))
PATCHES = {"setattr", "delattr", "patch"}
PRIVATE = {
    "tests/laws/conftest.py": "the defaults of a function of the tests",
    "tests/ops/test_cross_entropy_kernel.py": "its kernel needs a GPU: elsewhere the plain form takes its place",
}
"""Files that may replace names with an underscore, and why."""


def patches(tree: ast.AST) -> Iterator[ast.Call]:
    """Yield the calls of `monkeypatch.setattr` and its like."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in PATCHES:
            yield node


def strings(nodes: list[ast.expr]) -> list[str]:
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def inside_lepton(source: str) -> list[str]:
    """Return the paths in a test's source by which it replaces something of lepton."""
    return [path for call in patches(ast.parse(source)) for path in strings(call.args[:1]) if path.startswith("lepton")]


def private(source: str) -> list[str]:
    """Return the names with an underscore that a test's source replaces."""
    found = [name for call in patches(ast.parse(source)) for name in strings(call.args[:2])]
    return [name for name in found if name.rpartition(".")[2].startswith("_") and not name.startswith("torch.")]


def test_the_checks_find_what_they_look_for():
    assert inside_lepton('monkeypatch.setattr("lepton.files.read", None)') == ["lepton.files.read"]
    assert inside_lepton('monkeypatch.setattr("os.replace", None)') == []
    assert private('patch.setattr(module, "_read", None)') == ["_read"]
    assert private('patch.setattr(module, "read", None)') == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_of_lepton_is_replaced_by_its_path(path):
    """Such a test breaks when a function moves, and passes when it is no longer called."""
    assert inside_lepton(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_private_is_replaced(path):
    found = private(path.read_text(encoding="utf-8"))
    assert bool(found) == (path.relative_to(ROOT).as_posix() in PRIVATE), found
