"""The libraries that LEPTON needs: one line where one is missing or too old, instead of a traceback from its depths."""

import importlib.metadata
import importlib.util
import re
import sys

OLDEST = {"torch": (2, 11), "numpy": (1, 26), "tokenizers": (0, 21), "safetensors": (0, 5), "tqdm": (4, 66)}
"""Oldest version of each library that is imported at the start, as in pyproject.toml."""


class MissingLibrary(ImportError):
    """A library is missing or too old; the message is one line that says how to get it."""


def check() -> None:
    """Raise MissingLibrary if a library is missing or too old. Nothing is imported for it."""
    lacking = {name: text for name, oldest in OLDEST.items() if (text := _lacking(name, oldest))}
    if lacking:
        wanted = " ".join(f'"{name}>={".".join(map(str, OLDEST[name]))}"' for name in lacking)
        raise MissingLibrary(
            f"{', '.join(lacking.values())}; get what LEPTON needs with: {sys.executable} -m pip install {wanted}"
        )


def need(name: str, what: str, oldest: tuple[int, int] | None = None) -> None:
    """Raise MissingLibrary if a library that only `what` needs is missing, or older than `oldest`."""
    if problem := _lacking(name, oldest or (0, 0)):
        wanted = name if oldest is None else f'"{name}>={oldest[0]}.{oldest[1]}"'
        why = "" if problem.endswith("not installed") else f" ({problem})"
        raise MissingLibrary(f"{what} needs {name}{why}; get it with: {sys.executable} -m pip install {wanted}")


def _with_parents(name: str) -> list[str]:
    """Return the packages that a module lies in, and the module: `find_spec` raises where one of the former is missing.

    Looked for in this order, the first that is missing is the last that is looked for.
    """
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _lacking(name: str, oldest: tuple[int, int]) -> str | None:
    if not all(importlib.util.find_spec(part) for part in _with_parents(name)):
        return f"{name} is not installed"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # built from source: its users know what they have
        return None
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) >= oldest:
        return None
    return f"{name} {version} is too old"
