"""What holds for the tests themselves."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "tests").rglob("*.py"))
MODULES = [
    path.relative_to(ROOT / "lepton").with_suffix("").as_posix()
    for path in sorted((ROOT / "lepton").rglob("*.py"))
    if path.stem not in ("__init__", "__main__")
]
ELSEWHERE = {
    "cli/tokenizer": "tests/cli/test_prepare.py",
    "generate/stream": "tests/generate/test_state.py",
    "model/arguments": "tests/model/test_network.py",
    "model/budget": "tests/cli/test_budgets.py",
    "model/flops": "tests/model/test_network.py",
    "model/fresh_state": "tests/generate/test_state.py",
    "model/modules": "tests/model/test_network.py",
    "model/promise": "tests/cli/test_promises.py",
    "ops/triton/attention": "tests/ops/test_attention_kernel.py",
    "ops/triton/choose": "tests/ops/test_choose.py",
    "ops/triton/cross_entropy": "tests/ops/test_cross_entropy_kernel.py",
    "ops/triton/delta_rule": "tests/ops/test_delta_rule_kernel.py",
    "ops/triton/few_writes": "tests/ops/test_few_writes.py",
    "ops/triton/products": "tests/ops/test_products.py",
    "ops/triton/ring_attention": "tests/ops/test_ring_attention.py",
    "train/messages": "tests/train/test_assembly.py",
}
"""Modules that are tested through those that use them, and where."""
OF_SEVERAL = {
    "generate/test_arguments",
    "generate/test_state",
    "generate/test_uncertainty",
    "hf/test_page",
    "model/ideas/test_ideas_removed",
    "model/test_add_an_idea",
    "model/test_before",
    "model/test_trunk",
    "proving_ground/test_all_on",
    "proving_ground/test_babi",
    "proving_ground/test_capacity",
    "proving_ground/test_chains",
    "proving_ground/test_depth",
    "proving_ground/test_hops",
    "proving_ground/test_knowledge",
    "proving_ground/test_needle",
    "proving_ground/test_path_star",
    "proving_ground/test_recall",
    "proving_ground/test_runner",
    "proving_ground/test_task",
    "proving_ground/test_text",
    "serve/test_client",
    "serve/test_fuzz",
    "serve/test_page",
    "serve/test_promises",
    "test_acceptance_rules",
    "test_alive",
    "test_dots",
    "test_figures",
    "test_architecture",
    "test_docs",
    "test_examples",
    "test_generate_speed",
    "test_model_card",
    "test_package",
    "test_readme",
    "test_report",
    "test_seed_surface",
    "test_serve_fuzz",
    "test_serve_load",
    "test_serve_turns",
    "test_side_by_side",
    "test_tests",
    "test_time_to_loss",
    "test_train_speed",
    "test_trunk_model",
    "test_trunk_optimizer",
    "test_trunk_switches",
    "test_trunk_trials",
    "test_weights",
    "train/test_chat",
    "train/test_leaving",
    "train/test_several_processes",
}
"""Tests of what several modules do together, of a script, or of a document."""
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


def mirrored(test: str) -> list[str]:
    """Return the modules that a test file, such as 'data/test_shards_refused', can be of: the longest name first."""
    folder, _, name = test.rpartition("test_")
    words = name.split("_")
    return [f"{folder}{'_'.join(words[:count])}" for count in range(len(words), 0, -1)]


def test_every_module_has_a_test_of_its_name():
    """`tests/X/test_NAME.py` for `lepton/X/NAME.py`, or test_NAME_SUBJECT.py where one file would be long."""
    tests = [path.relative_to(ROOT / "tests").with_suffix("").as_posix() for path in FILES if is_test(path)]
    of = {test: next((name for name in mirrored(test) if name in MODULES), None) for test in tests}
    lacking = set(MODULES) - set(of.values())
    assert lacking == ELSEWHERE.keys(), "a new module needs a test of its name; one that has it is no exception"
    assert {test for test, module in of.items() if module is None} == OF_SEVERAL
    assert all((ROOT / path).exists() for path in ELSEWHERE.values())


def is_test(path: Path) -> bool:
    own = (ROOT / "tests" / "laws", ROOT / "tests" / "fuzz")  # of the whole package
    return path.stem.startswith("test_") and path.parent not in own


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_of_lepton_is_replaced_by_its_path(path):
    """Such a test breaks when a function moves, and passes when it is no longer called."""
    assert inside_lepton(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_private_is_replaced(path):
    found = private(path.read_text(encoding="utf-8"))
    assert bool(found) == (path.relative_to(ROOT).as_posix() in PRIVATE), found
