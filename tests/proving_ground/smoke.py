"""Runs a task of the proving ground as its user does, in small."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest


def smoke(main: Callable[[Sequence[str]], None], capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """Return the last line of `main --smoke`, after a look at the table."""
    main(["--smoke", *words])
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    names = [row["name"] for row in found["rows_of_table"]]
    table = [line for line in lines if not line.startswith("  ")]
    assert len(table) == 1 + len(names)
    assert all(line.startswith(name) for line, name in zip(table[1:], names, strict=True))
    assert {"a uniform guess", "most frequent answer"} < set(names)
    assert names[-len(found["models"]) :] == found["models"]
    return found
