"""The examples run as their docstrings say, each in a process of its own, and print what is true of the model."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lepton import Lepton
from lepton.data.prepare import prepare
from lepton.data.tokenizer import load_tokenizer
from tests.cli.tiny import TEXT, save_tiny

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")


def example(name, *words):
    """Run an example in the repository's folder, as a user does; return what it prints."""
    command = [sys.executable, "-m", f"examples.{name}", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def saved(tmp_path):
    """A checkpoint, its model and its tokenizer, and a file of text."""
    path, text = tmp_path / "final.pt", tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    return path, *save_tiny(path), text


def test_train_and_generate(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("\n".join(f"{i} of the {TEXT}" for i in range(20)), encoding="utf-8")
    prepare([book], tmp_path / "data", load_tokenizer(None), val_fraction=0.1, row_len=65)
    words = ("--steps", 1, "--seq_len", 64, "--data_dir", tmp_path / "data", "--checkpoint_dir", tmp_path)
    out = example("train_and_generate", *words, "--tokens", 8)
    assert "step 1/1" in out
    model = Lepton.from_checkpoint(tmp_path / "final.pt")
    prompt = model.tokenizer.encode("def main():")
    assert out.endswith(model.tokenizer.decode(model.generate(prompt, max_new_tokens=8, seed=1)) + "\n")


def test_look_inside(saved):
    path, model, tokenizer, text = saved
    out = example("look_inside", "--checkpoint", path, "--text", text, "--depth", 1, "--tokens", 5)
    ids = tokenizer.encode(TEXT)
    with torch.no_grad():
        expected = model(torch.tensor([ids]))
    shown = re.findall(r"^'.*' +(\d+)  '.*' +(\d+)%$", out, re.MULTILINE)
    chances = [round(100 * chance) for chance in expected.uncertainty[0, :5].tolist()]
    assert [(int(depth), int(chance)) for depth, chance in shown] == [(model.config.layers, each) for each in chances]
    assert f"{len(list(expected.state.memory))} crystals in a state of {expected.state.nbytes:,} bytes" in out


def test_remember(saved, tmp_path):
    path, model, tokenizer, text = saved
    words = ("--checkpoint", path, "--folder", tmp_path, "--tokens", 6)
    ids, prompt = tokenizer.encode(TEXT), tokenizer.encode("The model")
    assert f"read {len(ids):,} tokens" in example("remember", *words, "--read", text)

    out = example("remember", *words)
    whole = model.generate(ids + prompt, max_new_tokens=6, temperature=0)[len(ids) :]
    assert f"the same text goes on: {tokenizer.decode(whole[len(prompt) :])!r}" in out
    for name, memory in (("without memory", None), ("with memory", tmp_path / "memory.safetensors")):
        tokens = model.generate(prompt, max_new_tokens=6, temperature=0, memory=memory)
        assert f"a new text {name}: {tokenizer.decode(tokens[len(prompt) :])!r}" in out
    assert re.search(r"^6 tokens in \d+ passes", out, re.MULTILINE)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_each_example_is_tested_and_linked_from_the_documents(path):
    assert f"test_{path.stem}" in globals()
    assert f"(examples/{path.name})" in README
    assert f"(../examples/{path.name})" in TUTORIAL


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    """With the model that comes with LEPTON. Texts may differ between machines; that drafts change none may not."""
    book = tmp_path / "tour.ipynb"
    shutil.copy(ROOT / "examples" / "tour.ipynb", book)
    before = printed(book)
    assert all(before), "a reader of the file sees what each cell prints"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "JUPYTER_PLATFORM_DIRS": "1"}
    command = [sys.executable, "-m", "jupyter", "execute", "--inplace", "--timeout=300", str(book)]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    after = printed(book)
    assert all(after)
    assert after[0] == before[0] == "24928646"
    passes = dict(re.findall(r"(with drafts|without) (\d+) passes", after[3]))
    assert int(passes["with drafts"]) <= int(passes["without"]) == 200
    assert after[3].endswith("True"), "drafts change no text"


def printed(book):
    """Return what each cell of a notebook has printed."""
    cells = json.loads(book.read_text(encoding="utf-8"))["cells"]
    outputs = [cell["outputs"] for cell in cells if cell["cell_type"] == "code"]
    return [
        "".join(
            "".join(each.get("text") or each["data"]["text/plain"]) for each in parts if each.get("name") != "stderr"
        )
        for parts in outputs
    ]
