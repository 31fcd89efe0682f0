"""docs/tools.md: its Python runs as printed, and its task is one."""

import json
import re
from pathlib import Path

import pytest

from tests.cli.tiny import run, run_json, save_tiny
from tests.test_docs import ROOT, run_python_blocks

PAGE = ROOT / "docs" / "tools.md"


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder in which the commands of the page have run."""
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").mkdir()
    save_tiny(Path("checkpoints/final.pt"))
    return tmp_path


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
def test_its_python_runs_as_printed(there, monkeypatch):
    pytest.importorskip("accelerate", reason="accelerate is not installed (extra hf)")
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra harness)")
    assert run("export", "--to", "hf", "--checkpoint", "checkpoints/final.pt", "--out", "my_model")[0] == 0
    names = run_python_blocks(PAGE)
    assert run("generate", "--checkpoint", "fine_tuned.pt", "--prompt", "import", "--max_new_tokens", 3)[0] == 0
    assert names["trainer"].state.global_step == 2


def test_its_task_is_measured(there):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra harness)")
    text = PAGE.read_text(encoding="utf-8")
    Path("my_tasks").mkdir()
    for kind, name in (("yaml", "capitals.yaml"), ("json", "capitals.jsonl")):
        (block,) = re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        Path("my_tasks", name).write_text(block, encoding="utf-8")
    command = ("eval", "--checkpoint", "checkpoints/final.pt", "--tasks", "capitals", "--task_dir", "my_tasks")
    (found,) = run_json(*command)["tasks"].values()
    assert found["samples"] == 1
    assert json.dumps(found["metrics"]["acc"]["value"]) in ("0.0", "1.0")
