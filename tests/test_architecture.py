"""Imports run one way, importing does nothing, and only the command line parses arguments."""

import ast
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room may import the rooms named here, and itself.
ALLOWED = {
    "errors": set(),
    "requirements": set(),
    "shapes": set(),
    "ops": {"errors"},
    "files": {"errors"},
    "config": {"errors"},
    "presets": {"errors", "config"},
    "archive": {"errors"},
    "tensors": {"errors", "files"},
    "checkpoint": {"errors", "files", "archive", "tensors"},
    "data": {"errors", "files", "config"},
    "model": {"errors", "ops", "files", "tensors", "config", "presets", "checkpoint"},
    "generate": {"errors", "config", "model"},
    "train": {"errors", "ops", "files", "tensors", "config", "presets", "checkpoint", "data", "model", "generate"},
    "evals": {"errors", "files", "tensors", "config", "presets", "checkpoint", "data", "model", "generate", "train"},
    "cli": {
        "errors",
        "ops",
        "requirements",
        "files",
        "tensors",
        "config",
        "presets",
        "checkpoint",
        "data",
        "model",
        "generate",
        "train",
        "evals",
    },
}
# `Lepton.generate` and its sisters are there for users; they fetch the engine when they are called.
LAZY_EXCEPTIONS = {("model", "generate"), ("model", "data")}
# Comes with PyTorch's builds for GPUs; the files of this folder need it, and are imported only where it is there.
OPTIONAL, OPTIONAL_FOLDER = "triton", ROOT / "lepton" / "ops" / "triton"
FILES = sorted((ROOT / "lepton").rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT / "lepton").parts[0].removesuffix(".py")


def imported_rooms(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lepton":
        parts = node.module.split(".")
        return [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names if alias.name in ALLOWED]
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lepton.")]
    return []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    here = room(path)
    if here in ("__init__", "__main__"):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top_level = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        for target in imported_rooms(node):
            lazy = id(node) not in top_level and (here, target) in LAZY_EXCEPTIONS
            assert target == here or target in ALLOWED[here] or lazy, f"{path.name}:{node.lineno} imports {target}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_command_line_parses_arguments(path):
    text = path.read_text(encoding="utf-8")
    assert room(path) in ("cli", "__main__") or ("argparse" not in text and "sys.argv" not in text)


def test_importing_everything_prints_nothing_and_asks_for_no_gpu():
    files = [path for path in FILES if path.stem != "__main__"]
    if importlib.util.find_spec(OPTIONAL) is None:
        files = [path for path in files if path.parent != OPTIONAL_FOLDER or path.stem == "__init__"]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    names = [name.removesuffix(".__init__") for name in [*modules, "model", "train"]]
    code = "import torch\n" + "\n".join(f"import {name}" for name in names)
    code += "\nassert not torch.cuda.is_initialized()\nassert torch.get_default_dtype() == torch.float32"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_kernels_need_what_is_optional(path):
    assert path.parent == OPTIONAL_FOLDER or f"import {OPTIONAL}" not in path.read_text(encoding="utf-8")


def test_every_third_party_import_is_a_declared_dependency():
    """A library that happens to be installed beside another one is no dependency."""
    used = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                used.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
    used -= set(sys.stdlib_module_names) | {"lepton", OPTIONAL}
    with (ROOT / "pyproject.toml").open("rb") as file:
        ranges = {name.split(">=")[0] for name in tomllib.load(file)["project"]["dependencies"]}
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = {line.split("==")[0] for line in lines if "==" in line}
    assert used == ranges == pins
