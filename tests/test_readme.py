"""The README's blocks run as printed: Python in a fresh namespace each, and every flag of its commands is known."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

import model as entry_point
from lepton.api import Lepton
from lepton.cli.arguments import Parser
from lepton.cli.main import COMMANDS
from tests.cli.tiny import save_tiny, tiny_model

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
COMMAND = re.compile(r"python (?:(train)\.py|-m lepton (\w+))((?: .*)?)$")


@pytest.mark.parametrize("block", PYTHON, ids=[f"block{i}" for i in range(len(PYTHON))])
def test_each_block_runs_as_printed(block, tmp_path, monkeypatch, capsys):
    """In a folder with the checkpoints that it names. TINY is replaced by a model of its shape and 30 k parameters."""
    monkeypatch.chdir(tmp_path)
    for name in ("checkpoint.pt", "checkpoints/final.pt"):
        save_tiny(tmp_path / name)
    monkeypatch.setattr(entry_point, "create_lepton_tiny", lambda: Lepton(tiny_model().config))
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert len(names.get("tokens", [0])) > 0
    assert capsys.readouterr().err == ""


def test_the_lines_of_generation_that_users_copy_stay():
    """They have been the same since the first version; texts of others quote them."""
    lines = """\
from model import create_lepton_tiny
import torch
model = create_lepton_tiny()
model.load_state_dict(torch.load('checkpoint.pt')['model'])
model.eval()
# Fast generation with speculative decoding
tokens = model.generate(prompt_ids, max_new_tokens=100, use_speculative=True)
# Get uncertainty scores too
tokens, uncertainties = model.generate_with_uncertainty(prompt_ids, max_new_tokens=100)"""
    assert any(set(lines.splitlines()) <= set(block.splitlines()) for block in PYTHON)


@pytest.mark.parametrize("line", [line for line in SHELL.splitlines() if COMMAND.search(line)])
def test_each_command_is_one_that_the_parser_takes(line):
    train, name, flags = COMMAND.search(line).groups()
    name = train or name
    assert name in COMMANDS
    parser = Parser(prog=name)
    importlib.import_module(f"lepton.cli.{name}").add_arguments(parser)
    assert isinstance(parser.parse_args(shlex.split(flags, comments=True)), argparse.Namespace)


def test_commands_are_found():
    assert len([line for line in SHELL.splitlines() if COMMAND.search(line)]) >= 8
