"""The code of a model beside its weights, for `trust_remote_code=True` where LEPTON is not installed.

transformers copies a module and those that it imports by relative names from one folder, and imports the copy. So each
module of the package that the model needs becomes a file of that folder: `lepton.model.network` is
`lepton_model_network.py`, and imports its neighbours by such names.
"""

import ast
import re
import shutil
import sys
from collections.abc import Container, Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
OWN_NAME = "lepton.hf.remote_code"
FIRST = "lepton.hf.modeling"
"""The module whose imports are followed."""
OLDEST = (5, 24)
"""Version of transformers from which on the code works."""
MAIN_NAME = "modeling_lepton"
AUTO_MAP = {
    "AutoConfig": f"{MAIN_NAME}.LeptonHFConfig",
    "AutoModelForCausalLM": f"{MAIN_NAME}.LeptonForCausalLM",
}
"""Where `config.json` says that the classes are."""
MAIN = '''\
"""The code of this model for transformers, which runs it where `trust_remote_code=True` is given.

A LEPTON that is installed is used: pip install ".[hf]" in the folder of a clone of its repository. Else it is the copy
of LEPTON {version} in the files lepton_*.py beside this one (MIT license).
"""

import transformers

if [int(number) for number in transformers.__version__.split(".")[:2]] < {oldest}:
    raise ImportError("this model needs transformers {wanted} or newer: pip install --upgrade transformers")

try:
    from lepton.hf import LeptonCache, LeptonForCausalLM, LeptonHFConfig
except ImportError:
    from .lepton_hf_cache import LeptonCache
    from .lepton_hf_configuration import LeptonHFConfig
    from .lepton_hf_modeling import LeptonForCausalLM

__all__ = ["LeptonCache", "LeptonForCausalLM", "LeptonHFConfig"]


def files() -> None:
    """Name all files: transformers copies those that it finds in imports, and does not look for others."""
{imports}
'''
OPTIONAL = re.compile(r"(?:^ *(?:import|from) (?:triton|platformdirs)\b.*\n)+", re.MULTILINE)
"""Imports of libraries that a model can do without."""


def write_code(folder: str | Path) -> None:
    """Write the files to `folder`; those of an earlier export are replaced. A copy writes copies of itself."""
    if __name__ != OWN_NAME:
        for path in Path(__file__).parent.glob("*lepton*.py"):
            shutil.copyfile(path, Path(folder) / path.name)
        return
    sources = {name: path.read_text(encoding="utf-8") for name, path in closure().items()}
    version = sys.modules[PACKAGE.name].__version__
    for name, source in sources.items():
        origin = f"# A copy of {name} of LEPTON {version} with relative imports (MIT license).\n"
        (Path(folder) / f"{flat(name)}.py").write_text(origin + relative(source, sources), encoding="utf-8")
    imports = "\n".join(f"    from .{flat(name)} import __name__  # noqa: F401" for name in sorted(sources))
    wanted = ".".join(map(str, OLDEST))
    main = MAIN.format(version=version, oldest=[*OLDEST], wanted=wanted, imports=imports)
    (Path(folder) / f"{MAIN_NAME}.py").write_text(main, encoding="utf-8")


def flat(name: str) -> str:
    """Return the name of a module's copy."""
    return name.replace(".", "_")


def closure() -> dict[str, Path]:
    """Return the files of all modules that the model needs, by the modules' names."""
    known = {_module(path): path for path in PACKAGE.rglob("*.py")}
    found: dict[str, Path] = {}
    waiting = [FIRST]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = known[name]
        for node in _imports(ast.parse(known[name].read_text(encoding="utf-8"))):
            waiting += [each for each, _ in _targets(node, known)]
    return found


def relative(source: str, modules: Container[str]) -> str:
    """Return the source of a module with relative imports in place of those from the package.

    Imports of optional libraries get a `try` around them: transformers otherwise demands that they are there.
    """
    lines = source.splitlines(keepends=True)
    for node in reversed([*_imports(ast.parse(source))]):
        new = [f"{' ' * node.col_offset}{_line(node, *target)}\n" for target in _targets(node, modules)]
        lines[node.lineno - 1 : node.end_lineno] = new
    return OPTIONAL.sub(_tried, "".join(lines))


def _line(node: ast.ImportFrom, module: str, alias: ast.alias) -> str:
    is_module = module == f"{node.module}.{alias.name}"
    renamed = f" as {alias.asname or alias.name}" if is_module or alias.asname else ""
    name = flat(module)
    return f"from . import {name}{renamed}" if is_module else f"from .{name} import {alias.name}{renamed}"


def _tried(imports: re.Match[str]) -> str:
    lines = imports[0].splitlines(keepends=True)
    indent = " " * (len(lines[0]) - len(lines[0].lstrip()))
    inside = "".join(f"    {line}" for line in lines)
    return f"{indent}try:\n{inside}{indent}except ImportError:\n{indent}    raise\n"


def _imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    """Yield the imports from the package: at the top and inside functions, in the order of the lines."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0]
    ours = [node for node in nodes if (node.module or "").partition(".")[0] == PACKAGE.name]
    yield from sorted(ours, key=lambda node: node.lineno)


def _targets(node: ast.ImportFrom, modules: Container[str]) -> Iterator[tuple[str, ast.alias]]:
    """Yield the module of each imported name: the name itself may be one."""
    for alias in node.names:
        inner = f"{node.module}.{alias.name}"
        yield (inner if inner in modules else str(node.module)), alias


def _module(path: Path) -> str:
    parts = (PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")
