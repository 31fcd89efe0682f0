"""`trust_remote_code=True`: the folder alone is the model, in a process that cannot import LEPTON."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib

import pytest
import torch
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from lepton.errors import InputError
from lepton.hf.remote_code import OLDEST, PACKAGE, closure, flat, relative, write_code
from tests.cli.tiny import run, save_tiny

HIDDEN = "import sys; sys.modules['lepton'] = None\n"
"""Makes `import lepton` fail, also where it is installed."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("remote")
    model, tokenizer = save_tiny(path / "final.pt")
    assert run("export", "--to", "hf", "--checkpoint", path / "final.pt", "--out", path / "hf")[0] == 0
    return path / "hf", model, tokenizer


def python(code, folder, cache):
    """Run code in a new process away from this checkout, without a network; return what it prints."""
    names = {"PYTHONPATH", "PYTEST_CURRENT_TEST"}
    known = {name: value for name, value in os.environ.items() if name not in names}
    known |= {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "FOLDER": str(folder)}
    words = [sys.executable, "-c", code]
    quiet = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "check": False}
    done = subprocess.run(words, cwd=cache, env=known, **quiet)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOAD = """
import json, os
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = os.environ["FOLDER"]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("The quick brown fox", return_tensors="pt")
text = model.generate(**ids, do_sample=False, max_new_tokens=70)[0].tolist()
with torch.no_grad():
    logits = model(**ids).logits[0].tolist()
found = {"text": text, "logits": logits, "module": type(model).__module__, "config": type(model.config).__module__}
"""


def test_the_folder_is_enough(saved, tmp_path):
    """Past the window of 16 tokens. What such a process saves is enough, too."""
    folder, model, tokenizer = saved
    again = tmp_path / "again"
    code = f"{HIDDEN}{LOAD}model.save_pretrained({str(again)!r})\nprint(json.dumps(found))"
    found = json.loads(python(code, folder, tmp_path))
    ids = tokenizer.encode("The quick brown fox")
    assert found["module"].startswith("transformers_modules.hf.")
    assert found["config"].startswith("transformers_modules.hf.")
    assert found["text"] == model.generate(ids, 70, temperature=0)
    with torch.no_grad():
        own = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(torch.tensor(found["logits"]), own, rtol=0, atol=1e-5)
    assert {path.name for path in again.glob("*.py")} == {path.name for path in folder.glob("*.py")}


def test_the_python_of_the_card_runs_as_printed(saved, tmp_path):
    folder = saved[0]
    (block,) = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    block = block.replace('folder = "."', f"folder = {str(folder)!r}")
    text = python(f"import torch\ntorch.manual_seed(0)\n{HIDDEN}{block}", folder, tmp_path)
    assert text.startswith("Once upon a time")


def test_an_installed_lepton_is_used(saved, tmp_path):
    folder, model, tokenizer = saved
    here = os.getcwd()
    code = f"import sys; sys.path.insert(0, {here!r})\n{LOAD}print(json.dumps(found))"
    found = json.loads(python(code, folder, tmp_path))
    assert (found["module"], found["config"]) == ("lepton.hf.modeling", "lepton.hf.configuration")
    assert found["text"] == model.generate(tokenizer.encode("The quick brown fox"), 70, temperature=0)


def test_a_training_run_saves_the_code_too(saved, tmp_path):
    """`save_pretrained` after `import lepton.hf`, as `Trainer` calls it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(saved[0], trust_remote_code=True)
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.glob("*.py")}
    assert names == {path.name for path in saved[0].glob("*.py")}
    fields = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert fields["auto_map"]["AutoModelForCausalLM"] == "modeling_lepton.LeptonForCausalLM"
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not [*(tmp_path / "other").glob("*.py")]
    with pytest.raises(InputError, match="save first, then call model"):
        model.save_pretrained(tmp_path / "none", push_to_hub=True)


def test_transformers_finds_every_file_and_asks_for_no_other_library(tmp_path):
    write_code(tmp_path)
    main = tmp_path / "modeling_lepton.py"
    named = {os.path.basename(path) for path in get_relative_import_files(main)}
    assert named == {path.name for path in tmp_path.iterdir()} - {main.name}
    asked = {library for path in tmp_path.iterdir() for library in get_imports(path)} - sys.stdlib_module_names
    assert asked <= {"torch", "transformers", "numpy", "safetensors"}
    assert [library for library in asked if importlib.util.find_spec(library) is None] == []


def test_the_oldest_version_of_transformers_is_that_of_the_extra():
    with (PACKAGE.parent / "pyproject.toml").open("rb") as file:
        extra = tomllib.load(file)["project"]["optional-dependencies"]["hf"]
    assert f"transformers>={OLDEST[0]}.{OLDEST[1]},<6" in extra


def test_no_file_imports_the_package(tmp_path):
    write_code(tmp_path)
    for path in tmp_path.glob("lepton_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] != "lepton", path
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("lepton") for alias in node.names), path


def test_the_copy_holds_the_model_and_neither_engine_nor_training():
    rooms = {name.split(".")[1] for name in closure()}
    assert {"model", "ops", "hf", "config", "errors"} <= rooms
    assert not rooms & {"engine", "generate", "train", "cli", "api", "data", "evals"}


def test_imports_become_relative():
    source = """from lepton import tensors
from lepton.errors import (
    InputError,
    shown as told,
)
import triton
import triton.language as tl

def f():
    import platformdirs
    from lepton.ops.triton import products as kernels
    from lepton.ops.triton.products import ROWS
"""
    modules = {"lepton.tensors", "lepton.errors", "lepton.ops.triton.products"}
    assert (
        relative(source, modules)
        == """from . import lepton_tensors as tensors
from .lepton_errors import InputError
from .lepton_errors import shown as told
try:
    import triton
    import triton.language as tl
except ImportError:
    raise

def f():
    try:
        import platformdirs
    except ImportError:
        raise
    from . import lepton_ops_triton_products as kernels
    from .lepton_ops_triton_products import ROWS
"""
    )
    assert flat("lepton.ops.triton.products") == "lepton_ops_triton_products"
