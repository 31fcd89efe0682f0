"""Imports run one way, importing does nothing, and only the command line parses arguments."""

import ast
import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.cli.tiny import save_tiny

ROOT = Path(__file__).parents[1]
# A room may import those that stand in a line above it. `data` and `checkpoint` know of no model, evaluation of no
# training; generation and training meet in `cli` alone.
FLOORS = (
    ("errors", "requirements", "shapes"),
    ("files", "values", "distributed", "weights"),
    ("config", "archive", "tensors", "ops"),
    ("presets", "weight_files", "runtime"),
    ("checkpoint", "data"),
    ("model",),
    ("engine",),
    ("generate",),
    ("api", "evals"),
    ("train", "hf", "serve"),
    ("cli",),
)
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
# Comes with PyTorch's builds for GPUs; the files of this folder need it, and are imported only where it is there.
OPTIONAL, OPTIONAL_FOLDER = "triton", ROOT / "lepton" / "ops" / "triton"
# What derives from the classes of a library that an extra brings: its place, and the library.
ADAPTERS = {ROOT / "lepton" / "hf": "transformers", ROOT / "lepton" / "evals" / "harness.py": "lm_eval"}
FILES = sorted((ROOT / "lepton").rglob("*.py"))


def adapts(path: Path) -> str | None:
    """The library that the file at `path` is written for, if it is one of an extra."""
    return next((library for place, library in ADAPTERS.items() if place in (path, *path.parents)), None)


def room(path: Path) -> str:
    return path.relative_to(ROOT / "lepton").parts[0].removesuffix(".py")


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in FILES}


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Every module of the package that a file imports: at its top, inside functions, and for type checkers alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lepton":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield (name if name in MODULES else str(node.module)), node.lineno
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in MODULES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    """Between rooms: only upward in `FLOORS`."""
    here = room(path)
    if here in ("__init__", "__main__"):
        return
    for name, line in imported(path):
        if name == "lepton":  # its version
            continue
        there = name.split(".")[1]
        assert there == here or FLOOR[there] < FLOOR[here], f"{path.name}:{line} imports {name}"


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The first circle that a depth-first walk meets from each node, if there is any."""
    found, done = [], set()

    def visit(node: str, trail: list[str]) -> None:
        if node in trail:
            found.append([*trail[trail.index(node) :], node])
        elif node not in done:
            for other in sorted(graph.get(node, ())):
                visit(other, [*trail, node])
            done.add(node)

    for node in graph:
        visit(node, [])
    return found


def test_no_module_imports_itself_by_way_of_others():
    """Inside rooms, too. A package's `__init__` stands for itself: what it re-exports does not import it."""
    graph = {name: {other for other, _ in imported(path) if other != name} for name, path in MODULES.items()}
    graph["lepton"] = set()  # its names are imported when they are asked for
    assert circles(graph) == []
    assert circles({**graph, "lepton.errors": {"lepton.model.network"}}), "a planted one is found"


@pytest.mark.parametrize("command", ["generate", "export", "sizes", "prepare"])
def test_a_command_that_does_not_train_imports_nothing_of_training(command, tmp_path):
    save_tiny(tmp_path / "x.pt")
    (tmp_path / "text.txt").write_text("A fox. " * 200, encoding="utf-8")
    flags = {
        "generate": ["--checkpoint", tmp_path / "x.pt", "--prompt", "fox", "--max_new_tokens", 3],
        "export": ["--checkpoint", tmp_path / "x.pt", "--out", tmp_path / "y.safetensors"],
        "sizes": [],
        "prepare": ["--out", tmp_path / "data", tmp_path / "text.txt"],
    }[command]
    rooms = ("lepton.train", "lepton.evals")
    code = "import sys\nfrom lepton.cli.main import main\ncode = main(sys.argv[1:])\n"
    code += f"print([name for name in sys.modules if name.startswith({rooms})], file=sys.stderr)\nsys.exit(code)"
    words = [sys.executable, "-c", code, command, *map(str, flags)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (0, ["[]"]), done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_command_line_parses_arguments(path):
    text = path.read_text(encoding="utf-8")
    assert room(path) in ("cli", "__main__") or ("argparse" not in text and "sys.argv" not in text)


def test_importing_everything_prints_nothing_and_asks_for_no_gpu():
    files = [path for path in FILES if path.stem != "__main__"]
    if importlib.util.find_spec(OPTIONAL) is None:
        files = [path for path in files if path.parent != OPTIONAL_FOLDER or path.stem == "__init__"]
    files = [path for path in files if adapts(path) is None or importlib.util.find_spec(str(adapts(path)))]
    names = [*map(module, files), "model", "train"]
    code = "import torch\n" + "\n".join(f"import {name}" for name in names)
    code += "\nassert not torch.cuda.is_initialized()\nassert torch.get_default_dtype() == torch.float32"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_kernels_need_what_is_optional(path):
    assert path.parent == OPTIONAL_FOLDER or f"import {OPTIONAL}" not in path.read_text(encoding="utf-8")


def third_party(nodes):
    """Return the libraries that the imports among syntax nodes name."""
    used = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            used.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            used |= {alias.name.split(".")[0] for alias in node.names}
    return used - set(sys.stdlib_module_names) - {"lepton", OPTIONAL}


def test_every_third_party_import_is_a_declared_dependency():
    """A library that happens to be installed beside another one is no dependency.

    What an extra brings is imported where it is used.
    """
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in FILES]
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    ranges = {name.split(">=")[0] for name in project["dependencies"]}
    extras = {name.split(">=")[0] for key, names in project["optional-dependencies"].items() for name in names}
    used = set().union(*(third_party(ast.walk(tree)) for tree in trees))
    for path, tree in zip(FILES, trees, strict=True):
        assert extras & third_party(tree.body) <= {adapts(path)}, path
    used -= extras
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = {line.split("==")[0] for line in lines if "==" in line}
    assert used == ranges == pins


# Operators of torch take flat arguments, and so do their gradients.
FLAT = {"_attend_backward", "_carry_backward", "_products", "_ring_attention"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_functions_and_signatures_stay_small(path):
    """What grows past it wants to be a thing of its own. Kernels are long by nature."""
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    if path.parent == OPTIONAL_FOLDER:
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            names = [each.arg for each in given if each.arg not in ("self", "cls")]
            assert node.end_lineno - node.lineno < 60, f"{node.name} is long"
            assert len(names) <= 8 or node.name in FLAT, f"{node.name} takes {len(names)} arguments"
