"""The default data set: the source of Python's standard library, which is on every machine that runs LEPTON."""

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from lepton.data.prepare import PreparationFields, prepare
from lepton.data.sources import is_text
from lepton.data.tokenizer import Tokenizer
from lepton.errors import InputError
from lepton.files import CACHE_VARIABLE, cache_folder

MAX_BYTES = 12_000_000
VAL_FRACTION = 0.04
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "__pycache__"}
"""Folders of installed packages, of tests, and of text that is no ordinary source."""


def default_corpus(tokenizer: Tokenizer) -> Path:
    """Return the folder of the prepared standard library; prepare it first where it is missing (some seconds).

    It is made once for each Python version and tokenizer. `prepare` lets the folder appear whole or not at all; of two
    processes that want to make it the second waits for the first, or, without locks, loses against it.
    """
    python = ".".join(map(str, sys.version_info[:3]))
    folder = cache_folder() / f"stdlib-{python}-{tokenizer.hash[:12]}"
    if not folder.is_dir():
        files = stdlib_files()
        print(f"preparing the default data, Python {python}'s standard library, once, in {folder}", file=sys.stderr)
        try:
            # With equal files, as in earlier versions, so that figures stay comparable.
            how = PreparationFields(val_fraction=VAL_FRACTION, keep_duplicates=True)
            prepare(files, folder, tokenizer, name="stdlib", wait=True, **how)
        except InputError as error:
            if not folder.is_dir():
                raise InputError(f"{error}; {CACHE_VARIABLE} in the environment names another cache folder") from None
    return folder


def stdlib_files() -> list[Path]:
    """Return the standard library's source files by name, the first of them up to 12 MB in all.

    Raises InputError where Python came without its source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files, total = [], 0
    for path in sorted(_python_files(root), key=lambda path: path.relative_to(root).as_posix()):
        total += path.stat().st_size
        if total > MAX_BYTES:
            break
        files.append(path)
    if not files:
        raise InputError(f"this Python has no source of its standard library in {root}: name your data with --data_dir")
    return files


def _python_files(root: Path) -> Iterator[Path]:
    for here, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        for path in (Path(here, name) for name in names if name.endswith(".py")):
            if not path.name.startswith("_sysconfigdata") and is_text(path):  # that file differs between machines
                yield path
