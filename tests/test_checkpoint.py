import errno
import os
import sys
from pathlib import Path

import pytest
import torch

from lepton import checkpoint
from lepton.errors import InputError


def payload(step=1, **extra):
    return {"model": {"w": torch.arange(5000.0) + step}, "config": {}, "step": step, **extra}


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-200])


def test_what_is_saved_loads_with_torch_alone(tmp_path):
    path = tmp_path / "new" / "step_1.pt"
    checkpoint.save(path, payload(nested={"a": [torch.ones(2), (1, None)], "text": "ü"}))
    for content in (torch.load(path), checkpoint.load(path), checkpoint.load(str(path))):
        assert content["format"] == checkpoint.FORMAT
        assert torch.equal(content["model"]["w"], torch.arange(5000.0) + 1)
        assert content["nested"]["text"] == "ü"
        assert content["nested"]["a"][1] == (1, None)
    assert [file.name for file in path.parent.iterdir()] == ["step_1.pt"]


def test_saving_again_replaces(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path / "best.pt", payload(step))
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 2


@pytest.mark.parametrize("harm", [flip_a_byte, cut_short, lambda path: path.write_bytes(b"")])
def test_a_torn_file_names_the_newest_whole_one_before_it(tmp_path, harm):
    for step in (5, 10, 20, 30, 40):
        checkpoint.save(tmp_path / f"step_{step}.pt", payload(step))
    harm(tmp_path / "step_30.pt")
    with pytest.raises(InputError, match=r"step_30\.pt is torn .*before it is .*step_20\.pt$"):
        checkpoint.load(tmp_path / "step_30.pt")
    harm(tmp_path / "step_20.pt")
    with pytest.raises(InputError, match=r"before it is .*step_10\.pt$"):
        checkpoint.load(tmp_path / "step_30.pt")


def test_a_torn_first_file_names_what_else_there_is(tmp_path):
    checkpoint.save(tmp_path / "step_5.pt", payload(5))
    flip_a_byte(tmp_path / "step_5.pt")
    with pytest.raises(InputError, match="no whole checkpoint is there"):
        checkpoint.load(tmp_path / "step_5.pt")
    checkpoint.save(tmp_path / "best.pt", payload(4))
    with pytest.raises(InputError, match=r"newest whole one there is .*best\.pt"):
        checkpoint.load(tmp_path / "step_5.pt")


def test_a_missing_file_names_one_that_is_there(tmp_path):
    with pytest.raises(InputError, match=r"gone.step_9\.pt does not exist; no whole checkpoint is there"):
        checkpoint.load(tmp_path / "gone" / "step_9.pt")
    checkpoint.save(tmp_path / "step_5.pt", payload(5))
    for name in ("step_9.pt", "final.pt"):
        with pytest.raises(InputError, match=rf"{name} does not exist; .*step_5\.pt"):
            checkpoint.load(tmp_path / name)
    with pytest.raises(InputError, match=r"is a folder; give a checkpoint file; .*step_5\.pt"):
        checkpoint.load(tmp_path)


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    path = tmp_path / "other.pt"
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(InputError, match="not a LEPTON checkpoint: it lacks"):
        checkpoint.load(path)
    torch.save(Path("x"), path)  # a pickle that may run code
    with pytest.raises(InputError, match="not a LEPTON checkpoint"):
        checkpoint.load(path)
    path.write_text("hello")
    with pytest.raises(InputError, match="torn"):
        checkpoint.load(path)
    torch.save(payload() | {"format": 99}, path)
    with pytest.raises(InputError, match="format 99; this version reads format 1"):
        checkpoint.load(path)


def test_no_damaged_byte_is_more_than_an_unusable_file(tmp_path):
    """Names and sizes in the archive's directory, at its end, are covered by no checksum."""
    path = tmp_path / "step_3.pt"
    checkpoint.save(path, payload(3))
    whole = path.read_bytes()
    for place in range(len(whole) - 1200, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x80]) + whole[place + 1 :])
        try:
            assert checkpoint.load(path)["step"] == 3
        except InputError:
            assert checkpoint.newest_whole(tmp_path) in (None, path)


def test_the_newest_whole_one(tmp_path):
    assert checkpoint.newest_whole(tmp_path / "missing") is None
    assert checkpoint.newest_whole(tmp_path) is None
    checkpoint.save(tmp_path / "final.pt", payload(7))
    assert checkpoint.newest_whole(tmp_path) == tmp_path / "final.pt"
    for step in (9, 10, 100):
        checkpoint.save(tmp_path / f"step_{step}.pt", payload(step))
    (tmp_path / "step_1000.pt.tmp").write_bytes(b"half")
    (tmp_path / "step_x.pt").write_bytes(b"")
    assert checkpoint.newest_whole(tmp_path) == tmp_path / "step_100.pt"
    assert [step for step, _ in checkpoint.steps_in(tmp_path)] == [9, 10, 100]
    flip_a_byte(tmp_path / "step_100.pt")
    assert checkpoint.newest_whole(tmp_path) == tmp_path / "step_10.pt"
    assert checkpoint.newest_whole(tmp_path, before=10) == tmp_path / "step_9.pt"
    assert checkpoint.newest_whole(tmp_path, before=9) is None


def assert_intact(folder):
    assert checkpoint.load(folder / "best.pt")["step"] == 1
    assert [file.name for file in folder.iterdir()] == ["best.pt"], "nothing half-written stays"


@pytest.mark.parametrize("call", ["torch.save", "os.fsync", "os.replace"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, call):
    checkpoint.save(tmp_path / "best.pt", payload(1))

    def full(*args, **options):
        if call == "torch.save":
            args[1].write(b"part of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(call, full)
    with pytest.raises(InputError, match=r"cannot save .*best\.pt: No space left on device; checkpoints saved before"):
        checkpoint.save(tmp_path / "best.pt", payload(2))
    assert_intact(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_device_that_is_really_full(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "best.pt", payload(1))
    monkeypatch.setattr("secrets.token_hex", lambda count: "x")
    (tmp_path / ".best.pt.x.tmp").symlink_to("/dev/full")
    with pytest.raises(InputError, match="cannot save"):
        checkpoint.save(tmp_path / "best.pt", payload(2))
    assert_intact(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_disk_that_fills_up_amid_the_file(tmp_path):
    import resource

    checkpoint.save(tmp_path / "best.pt", payload(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))
    try:
        with pytest.raises(InputError, match="cannot save"):
            checkpoint.save(tmp_path / "best.pt", payload(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_intact(tmp_path)


def test_ctrl_c_amid_a_save_leaves_what_was_there(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "best.pt", payload(1))

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / "best.pt", payload(2))
    assert_intact(tmp_path)


@pytest.mark.parametrize("links", [True, False])
def test_a_duplicate_is_independent_of_its_source(tmp_path, monkeypatch, links):
    def no_links(*args):
        raise OSError(errno.EPERM, "this file system has no links")

    if not links:
        monkeypatch.setattr("os.link", no_links)
    checkpoint.save(tmp_path / "step_1.pt", payload(1))
    checkpoint.duplicate(tmp_path / "step_1.pt", tmp_path / "final.pt")
    checkpoint.save(tmp_path / "step_1.pt", payload(2))
    assert checkpoint.load(tmp_path / "final.pt")["step"] == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["final.pt", "step_1.pt"]


def test_what_killed_processes_left_is_removed(tmp_path):
    checkpoint.save(tmp_path / "step_1.pt", payload(1))
    for name in (".step_2.pt.1f.tmp", "best.pt.tmp", "notes.tmp"):
        (tmp_path / name).write_bytes(b"half")
    checkpoint.remove_unfinished(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes.tmp", "step_1.pt"]


RUN = {
    "size": None, "tokenizer": None, "validation": None, "best": float("inf"), "rng": {"cpu": torch.get_rng_state()},
    "optimizer": {"kind": "muon", "states": {}}, "training": {"dense": False, "overrides": {}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": [1]}, "'model' is of type list"),
        ({"model": {"w": 3}}, "'model.w' is int, not a tensor"),
        ({"model": {3: torch.ones(1)}}, "'model' has the key 3"),
        ({"model": {"w": torch.tensor([1, float("nan")])}}, r"'model\.w' holds NaN or infinity: training has diverged"),
        ({"config": None}, "'config' is of type NoneType"),
        ({"config": {1: 2}}, "'config' has the key 1"),
        ({"step": "3"}, "'step' is of type str"),
        ({"step": True}, "'step' is of type bool"),
        ({"step": -1}, "'step' is -1"),
        ({"step": 1 << 70}, "'step' is 118059"),
        ({"size": 5}, "'size' is of type int"),
        ({"tokenizer": {}}, "'tokenizer' is of type dict"),
        ({"validation": 1.0}, "'validation' is of type float"),
        ({"best": float("nan")}, "'best' is NaN"),
        (
            {"optimizer": {"states": {"adamw": {0: {"exp_avg": torch.tensor(torch.inf)}}}}},
            r"'optimizer.*0\.exp_avg' holds",
        ),
    ],
)
def test_values_that_no_checkpoint_has_are_named(tmp_path, changes, message):
    path = tmp_path / "final.pt"
    torch.save({"format": checkpoint.FORMAT} | payload() | RUN, path)
    checkpoint.check_run(path, checkpoint.load(path))
    torch.save({"format": checkpoint.FORMAT} | payload() | RUN | changes, path)
    with pytest.raises(InputError, match=message) as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rng": {}}, "'rng' lacks a 'cpu' of type Tensor"),
        ({"optimizer": {"kind": "muon"}}, "'optimizer' lacks a 'states' of type dict"),
        ({"training": {"dense": 1, "overrides": {}}}, "'training' lacks a 'dense' of type bool"),
    ],
)
def test_what_a_run_goes_on_from_is_whole(changes, message):
    content = payload() | RUN
    checkpoint.check_run("x.pt", content)
    with pytest.raises(InputError, match=message):
        checkpoint.check_run("x.pt", content | changes)
    with pytest.raises(InputError, match=r"x\.pt lacks 'best'"):
        checkpoint.check_run("x.pt", {name: value for name, value in content.items() if name != "best"})


def test_nesting_without_end_is_refused(tmp_path):
    deep = []
    deep.append(deep)
    torch.save({"format": checkpoint.FORMAT} | payload(validation={"deep": deep}), tmp_path / "x.pt")
    with pytest.raises(InputError, match="nested too deeply"):
        checkpoint.load(tmp_path / "x.pt")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes with names are of Unix")
def test_a_pipe_is_neither_read_nor_replaced(tmp_path):
    for name in ("step_5.pt", "x.safetensors"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(InputError, match="is a pipe, not a checkpoint"):
            checkpoint.load(tmp_path / name)
        with pytest.raises(InputError, match=r"cannot save .* is a pipe"):
            checkpoint.save(tmp_path / name, payload())
    assert not checkpoint.is_whole(tmp_path / "step_5.pt")
    assert checkpoint.newest_whole(tmp_path) is None


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "best.pt").symlink_to(tmp_path / "disk" / "real.pt")
    checkpoint.save(tmp_path / "best.pt", payload(3))
    assert (tmp_path / "best.pt").is_symlink()
    assert checkpoint.load(tmp_path / "best.pt")["step"] == checkpoint.load(tmp_path / "disk" / "real.pt")["step"] == 3


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"PK\3\4" + bytes(100), bytes(8) + b"{}", b"\xff" * 8 + b"{}"])
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_files_of_another_kind_are_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}.*(torn|not a whole|lacks)") as caught:
        checkpoint.load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_weights_alone_are_a_safetensors_file(tmp_path):
    path = tmp_path / "x.safetensors"
    content = payload(step=4, size="nano", tokenizer='{"a": 1}', optimizer={"kind": "muon"}) | {"config": {"width": 3}}
    checkpoint.save(path, content)
    found = checkpoint.load(path)
    assert torch.equal(found["model"]["w"], content["model"]["w"])
    names = ("config", "size", "tokenizer", "step")
    assert [found[name] for name in names] == [content[name] for name in names]
    with pytest.raises(InputError, match="holds weights only: start from it with --init_from"):
        checkpoint.check_run(path, found)
    flip_a_byte(path)
    with pytest.raises(InputError, match=r"x\.safetensors is damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize("path", [None, 5, b"a", [], "x" * 300, "a\0b", "a\nb"])
def test_what_is_no_name_of_a_file_is_one_line(path):
    with pytest.raises(InputError, match=r"not a path|does not exist") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)
