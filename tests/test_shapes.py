"""Every shape suffix says the truth: its letters are in the legend, and mean one size."""

import ast
import contextlib
import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from lepton import Lepton, shapes
from lepton.config import LeptonConfig
from lepton.shapes import LETTERS

PACKAGE = Path(shapes.__file__).parent
SUFFIX = re.compile(r"_*[a-z]\w*_([0-9]*[A-Z][A-Z0-9]*)")
# Sizes that differ from each other, and those of them that are the same in every function.
SIZES = {"width": 36, "layers": 5, "heads": 6, "kv_heads": 3, "head_dim": 28, "ffn": 40, "vocab_size": 256}
IDEAS = {
    "thoughts": {"count": 2, "ffn": 44, "rounds": 2},
    "memory": {"heads": 4, "key_dim": 10, "value_dim": 18},
    "crystals": {"slots": 11, "per_segment": 3},
    "peek": {"width": 15, "horizon": 4},
    "router": {"exit_width": 13, "window": 17},
    "drafter": {"count": 5, "width": 24, "vocab": 50},
    "uncertainty": {},
}
FIXED = {"D": 36, "E": 20, "K": 3, "S": 2, "U": 18, "W": 24, "X": 16, "Y": (0, 5), "Z": 50}


@functools.cache
def suffix(name: str) -> str:
    match = SUFFIX.fullmatch(name)
    return match[1] if match else ""


def names(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        found |= {getattr(node, field) for field in ("id", "arg", "attr") if hasattr(node, field)}
    return {name for name in found if name}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_letter_is_in_the_legend(path):
    unknown = {name: suffix(name) for name in names(path.read_text(encoding="utf-8"))}
    assert not {name for name, letters in unknown.items() if not set(letters) <= set(LETTERS) | set("0123456789")}


def test_every_letter_of_the_legend_is_used():
    used = {letter for path in PACKAGE.rglob("*.py") for name in names(path.read_text()) for letter in suffix(name)}
    assert set(LETTERS) <= used


def wrong_shapes(values: dict[str, Any]) -> list[str]:
    """What is wrong with the tensors among some named values that belong together."""
    wrong, sizes = [], {digit: (int(digit), digit) for digit in "0123456789"}
    for name, value in values.items():
        letters = suffix(name)
        if not letters or not isinstance(value, torch.Tensor):
            continue
        if value.dim() != len(letters):
            wrong.append(f"{name} has the shape {tuple(value.shape)}")
            continue
        for letter, size in zip(letters, value.shape, strict=True):
            known, where = sizes.setdefault(letter, (size, name))
            fixed = FIXED.get(letter, size)
            if size != known or size not in (fixed if isinstance(fixed, tuple) else (fixed,)):
                wrong.append(f"{name} has the shape {tuple(value.shape)}: {letter} is {known} in {where}")
    return wrong


def fields(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass or a named tuple."""
    if isinstance(value, tuple):
        return value._asdict() if hasattr(value, "_asdict") else {}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return {}
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


@contextlib.contextmanager
def watched(belongs: Callable[[str], bool]) -> Iterator[set[str]]:
    """Collect what is wrong with the names in functions of files that belong, when they return."""
    wrong: set[str] = set()

    def profile(frame: FrameType, event: str, _argument: Any) -> None:
        code = frame.f_code
        if event != "return" or not belongs(code.co_filename):
            return
        found = dict(frame.f_locals)
        parts = [fields(value) for value in found.values()]
        for values in (found, *parts):
            wrong.update(f"{Path(code.co_filename).name}, {code.co_qualname}: {each}" for each in wrong_shapes(values))

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield wrong
    finally:
        sys.setprofile(before)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    ideas = LeptonConfig(width=8, layers=2, heads=1, kv_heads=1, ffn=8).replace(**IDEAS).ideas
    return Lepton(LeptonConfig(**SIZES, window=9, segment=8, embed_rank=20, ideas=ideas))


def test_names_say_the_shapes_of_a_run(model, tmp_path):
    tokens = torch.randint(1, SIZES["vocab_size"], (7, 63))
    tokens[:, 30] = model.config.eos_id
    with watched(lambda path: path.startswith(str(PACKAGE))) as wrong:
        state = model(tokens[:, :41]).state
        out = model(tokens[:, 41:], state, lengths=torch.arange(7), depth=0.5, think=3)
        out.commit(torch.arange(7) + 3).save(tmp_path / "state.safetensors")
        model.load_state(tmp_path / "state.safetensors")
        model.loss(tokens, think=torch.tensor([4, 2, 1, 0, 2, 2, 2]), groups=12).loss.backward()
        model.eval()
        prompts = [list(range(1, 1 + length)) for length in (3, 20, 11)]
        for options in (
            {"seed": 0},
            {"seed": 0, "use_speculative": False, "depth": 0.5},
            {"memory": state.rows(torch.tensor([0])).memory},
        ):
            model.generate(prompts, 6, **options)
        model.generate_with_uncertainty(prompts[0], 3, seed=1)
    assert not wrong, "\n".join(sorted(wrong))


def test_a_wrong_name_is_caught():
    def right(x_BD):
        pair_B2 = x_BD[:, :2]
        return pair_B2.sum()

    def wrong_number(x_BD):
        mean_BD = x_BD.mean(1)
        return mean_BD - 1

    def wrong_letter(x_BD):
        turned_BD = x_BD.T
        return turned_BD + 1

    def wrong_size(x_BD):
        return x_BD

    with watched(lambda path: path == __file__) as wrong:
        right(torch.zeros(7, 36))
        assert not wrong
        for function in (wrong_number, wrong_letter):
            function(torch.zeros(7, 36))
        wrong_size(torch.zeros(7, 20))
    assert {each.split(":")[0].split(".")[-1] for each in wrong} == {"wrong_number", "wrong_letter", "wrong_size"}
