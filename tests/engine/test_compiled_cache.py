"""Compiled cycles on disk: found again by a later process, and only where everything is the same."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lepton.engine import compiled, compiled_cache
from lepton.engine.cycle import Outcome, Shape
from lepton.engine.pool import Pool
from tests.generate.models import lively

ROOT = Path(__file__).parents[2]
SHAPE = Shape(3, 0, False, 0)


@torch.library.custom_op("tests::turn", mutates_args=("x",))
def turn(x: Tensor) -> None:
    """An operator that Inductor knows nothing of, as those of lepton, and that writes in place."""
    x.copy_(x.roll(1, 1))


def small_cycle(model, pool, place_B, shape, prepared):
    """Stands in for a cycle, which takes long to compile. In this one there is nothing that needs C++."""
    seen_BF = pool.held.rows.seen_BF
    turn(seen_BF)
    return Outcome(torch.mm(seen_BF, model.embed.weight.T).topk(2, 1).indices, None, None, None)


def chosen(make_cycle, cycles: int = 5) -> list[list[list[int]]]:
    """What a cycle chooses, time after time. `make_cycle` returns it, as a function without arguments."""
    model = lively("dense", torch.float32)
    pool, place_B = Pool(model, 3, 16), torch.arange(3)
    with torch.no_grad():
        run = make_cycle(model, pool, place_B, SHAPE, None)
        pool.held.rows.seen_BF.copy_(model.embed.weight[5:8])
        return [run().counts.tolist() for _ in range(cycles)]


EXPECTED = chosen(lambda *given: lambda: small_cycle(*given))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LEPTON_CACHE", str(tmp_path))
    monkeypatch.setattr(compiled, "cycle", small_cycle)
    return tmp_path / "cycles"


def test_a_compiled_cycle_is_loaded_later_and_one_that_is_damaged_is_made_anew(folder, monkeypatch):
    traced = []
    trace = compiled.traced_cycle
    monkeypatch.setattr(compiled, "traced_cycle", lambda *given: traced.append(1) or trace(*given))
    assert chosen(compiled.compiled_cycle) == EXPECTED
    assert len(traced) == 1
    assert chosen(compiled.compiled_cycle) == EXPECTED
    assert len(traced) == 1, "the second is loaded"

    code = "from lepton.engine import compiled\nfrom tests.engine.test_compiled_cache import chosen, key, small_cycle\n"
    code += "import torch\ntorch.set_num_threads(1)\ncompiled.cycle, compiled.traced_cycle = small_cycle, None\n"
    code += "print(chosen(compiled.compiled_cycle))\nprint(key())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()) == (0, [str(EXPECTED), key()]), done.stderr

    (file,) = folder.iterdir()
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (b"", whole[:20], whole[:-1], bytes(flipped)):
        file.write_bytes(damaged)
        assert compiled_cache.load(file.stem) is None
    assert chosen(compiled.compiled_cycle) == EXPECTED
    assert len(traced) == 2
    assert compiled_cache.load(file.stem) is not None
    assert [*folder.iterdir()] == [file]


def test_a_graph_with_a_constant_is_not_kept(folder, monkeypatch):
    ones = torch.ones(32, 4)

    def with_constant(model, pool, *_):
        return Outcome(torch.mm(pool.held.rows.seen_BF, ones), None, None, None)

    monkeypatch.setattr(compiled, "cycle", with_constant)
    assert len(chosen(compiled.compiled_cycle)) == 5
    assert not folder.exists()


def test_a_cycle_without_one_of_its_kernels_is_not_kept(folder, monkeypatch):
    monkeypatch.setattr(compiled, "KERNELS", [*compiled.KERNELS, SimpleNamespace(sound=False)])
    assert chosen(compiled.compiled_cycle) == EXPECTED
    assert not folder.exists()


def key(model=None, tensors=None, constants=SHAPE):
    model = model or lively("complete", torch.float32)
    return compiled_cache.key_of(model, [*model.parameters()] if tensors is None else tensors, constants)


def test_the_same_has_the_same_key():
    other = lively("complete", torch.float32)
    other.load_state_dict({name: 2 * value for name, value in other.state_dict().items()})
    assert key(other) == key(), "values do not matter"


def test_what_a_graph_depends_on_changes_the_key(monkeypatch):
    model = lively("complete", torch.float32)
    keys = [
        key(model),
        key(lively("complete", torch.float32, logit_cap=14.0)),
        key(lively("complete", torch.float32, rope_base=9999.0)),
        key(lively("no peek", torch.float32)),
        *(key(model, constants=replace(SHAPE, **each)) for each in ({"rows": 2}, {"drafts": 1}, {"opening": True})),
        key(model, constants=(SHAPE, 3)),
    ]
    with model.without("drafter"):
        keys.append(key(model))
    x = torch.zeros(8, 8)
    layouts = [[x, x], [x, x.clone()], [x.double(), x], [x.T, x], [x[1:], x], [x[:, 1:], x], [x[:4, :4], x], [x], []]
    keys += [key(model, tensors=each) for each in layouts]
    model.router.window += 1
    keys.append(key(model))
    torch.set_num_threads(2)
    keys.append(key())
    torch.set_num_threads(1)
    monkeypatch.setattr(sys, "version", "4.0")
    keys.append(key())
    assert None not in keys
    assert len(keys) == len({*keys})


def test_what_the_key_cannot_tell_is_not_kept():
    model = lively("complete", torch.float32)
    handle = model.embed.register_forward_hook(lambda *_: None)
    assert key(model) is None
    handle.remove()
    assert key(model) is not None
    model.embed.forward = model.embed.forward
    assert key(model) is None
    del model.embed.forward
    model.peek.project = type("Other", (nn.Module,), {"__module__": "elsewhere"})()
    assert key(model) is None


def test_source_that_has_changed_has_another_hash_and_source_that_changes_none(tmp_path):
    def written(name: str, text: str, seconds: float = 100) -> Path:
        (tmp_path / name / "inner").mkdir(parents=True, exist_ok=True)
        path = tmp_path / name / "inner" / "x.py"
        path.write_text(text, encoding="utf-8")
        os.utime(path, (seconds, seconds))
        return tmp_path / name

    first = compiled_cache.source_hash(written("a", "x = 1"), 200)
    assert first == compiled_cache.source_hash(written("b", "x = 1"), 200)
    assert first != compiled_cache.source_hash(written("c", "x = 2"), 200)
    assert compiled_cache.source_hash(written("d", "x = 1", 300), 200) is None


class Packed:
    """Stands in for what Inductor compiled."""

    def serialize(self) -> bytes:
        return b"packed"


def test_few_files_are_kept_those_last_used(tmp_path, monkeypatch):
    monkeypatch.setenv("LEPTON_CACHE", str(tmp_path))
    monkeypatch.setattr(compiled_cache, "MOST_FILES", 2)
    for i, name in enumerate(["old", "used", "new"]):
        compiled_cache.save(name, [], Packed())
        os.utime(tmp_path / "cycles" / f"{name}.cycle", (i, i))
    assert sorted(each.stem for each in (tmp_path / "cycles").iterdir()) == ["new", "used"]
    assert compiled_cache.load("new") is None, "it is none of Inductor's"


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch):
    (tmp_path / "cycles").write_text("a file is in the way")
    monkeypatch.setenv("LEPTON_CACHE", str(tmp_path))
    assert compiled_cache.load("x") is None
    with pytest.warns(UserWarning, match="not kept"):
        compiled_cache.save("x", [], Packed())
