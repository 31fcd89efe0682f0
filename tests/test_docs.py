"""The documents: their Python runs as printed, their links lead somewhere, and the log names every results file."""

import argparse
import importlib.util
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

import lepton
from lepton.cli.arguments import Parser
from lepton.cli.main import COMMANDS
from tests.cli.tiny import save_tiny

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*DOCS, *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^python (?:(train)\.py|-m lepton (\w+))(.*)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
RUN = [
    "docs/tutorial.md",
    *(f"docs/ideas/{idea}.md" for idea in ("thoughts", "memory", "depth", "speculation", "uncertainty")),
]
"""Documents whose Python blocks are one script that needs nothing but `checkpoints/final.pt`."""
INTERNAL = {"__main__", "archive", "cli", "files", "presets", "requirements", "runtime", "shapes", "tensors", "values"}
"""Modules of lepton that are no interface for users."""


def run_python_blocks(path):
    """Execute the Python blocks of a Markdown file in order, as one script; errors carry the file's line numbers."""
    text = path.read_text(encoding="utf-8")
    blocks = list(FENCE.finditer(text))
    assert blocks, f"{path} has no Python"
    names = {"__name__": "__main__"}
    for block in blocks:
        padding = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(padding + block[1], str(path), "exec"), names)
    return names


@pytest.mark.parametrize("name", RUN)
def test_the_python_of_a_document_runs_as_printed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").mkdir()
    save_tiny(Path("checkpoints/final.pt"))
    run_python_blocks(ROOT / name)


def commands(path):
    """Return (command, its arguments) of each line of a Markdown file's shell blocks that runs LEPTON."""
    shell = "".join(SHELL.findall(path.read_text(encoding="utf-8")))
    return [(train or name, shlex.split(words, comments=True)) for train, name, words in COMMAND.findall(shell)]


WITH_COMMANDS = [path for path in DOCS if path.parent.name != "log" and commands(path)]
"""Documents that show commands. Those of the log are of their date."""


def test_the_documents_for_users_show_commands():
    names = {path.stem for path in WITH_COMMANDS}
    assert names >= {"tutorial", "index", "own_data", "tools", "serve", "depth", "peek", "uncertainty"}


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_parser_takes_the_commands_of_a_document(path):
    for command, words in commands(path):
        assert command in COMMANDS
        parser = Parser(prog=command)
        importlib.import_module(f"lepton.cli.{command}").add_arguments(parser)
        assert isinstance(parser.parse_args(words), argparse.Namespace)


def anchors(path):
    """Return the anchors of a Markdown file's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path):
    for link in LINK.findall(path.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


EXTRAS = {"lepton.hf": "transformers", "lepton.evals.harness": "lm_eval"}
"""What needs a library of an extra."""


def is_there(name):
    """Whether the libraries are installed that a name of the API reference needs."""
    needed = [library for start, library in EXTRAS.items() if name.startswith(start)]
    return all(importlib.util.find_spec(library) for library in needed)


def reference():
    """Return what the API reference documents, by name."""
    names = [name for path in DOCS for name in re.findall(r"^::: (\S+)$", path.read_text(encoding="utf-8"), re.M)]
    return {name: pkgutil.resolve_name(name) for name in names if is_there(name)}


def test_every_name_of_the_api_reference_exists():
    assert reference()


def test_every_public_module_is_in_the_api_reference():
    homes = {getattr(value, "__module__", None) or value.__name__ for value in reference().values()}
    modules = {module.name for module in pkgutil.iter_modules(lepton.__path__) if is_there(f"lepton.{module.name}")}
    assert modules - INTERNAL - {home.split(".")[1] for home in homes} == set()


GUIDES = [path for path in DOCS if path.parent.name in ("docs", "ideas") and path.stem not in ("glossary", "log")]
"""Pages that are read, rather than looked up."""


@pytest.mark.parametrize("path", [path for path in GUIDES if path != ROOT / "docs" / "index.md"], ids=lambda p: p.stem)
def test_a_page_begins_with_what_the_reader_can_do_after_it(path):
    title, blank, first, *_ = path.read_text(encoding="utf-8").splitlines()
    assert title.startswith("# ")
    assert blank == ""
    assert first.startswith("After this page you ")


def test_every_page_is_in_the_navigation_of_the_site():
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in DOCS]
    assert [page for page in pages if f": {page}\n" not in site] == []


def test_the_log_names_every_results_file():
    log = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "log").glob("*.md"))
    files = [path.name for path in (ROOT / "benchmarks" / "results").iterdir()]
    assert [name for name in files if name not in log] == []


def test_the_index_of_the_log_lists_every_entry_once():
    index = (ROOT / "docs" / "log.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs" / "log").glob("*.md"):
        questions = re.findall(rf"^## {path.stem}: (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert questions, path
        for question in questions:
            assert index.count(f"[{question}](log/{path.name}#") == 1, question


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_is_wrapped(path):
    """Tables and code cannot be wrapped; the rest is read in a terminal and in reviews."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")] == []
