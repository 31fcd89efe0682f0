"""Where a data set goes: decided before anything is read, and never half there."""

import errno
import os
import stat
from pathlib import Path

import pytest

from lepton.data import prepare as module
from lepton.data import publish
from lepton.data.prepare import prepare
from lepton.data.publish import UNFINISHED, place_for
from lepton.data.shards import ShardedDataset
from lepton.data.tokenizer import Tokenizer
from lepton.errors import InputError
from tests.data.test_prepare import contents

locks = pytest.mark.skipif(publish.fcntl is None, reason="this system has no locks on folders")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"On day {i} it rained again and again.")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def rows(folder: Path) -> int:
    return ShardedDataset(folder, seq_len=8, seed=0, split="train", vocab_size=300).rows


def mount(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make `folder` behave as a mount point: it can be neither renamed nor removed."""
    rename, rmdir = Path.rename, Path.rmdir

    def refuse(path: Path) -> None:
        if path == folder:
            raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == folder)
    monkeypatch.setattr(Path, "rename", lambda path, new: (refuse(path), refuse(Path(new)), rename(path, new))[2])
    monkeypatch.setattr(Path, "rmdir", lambda path: (refuse(path), rmdir(path))[1])


def test_a_link_stays_a_link(tmp_path: Path, source: Path, letters: Tokenizer) -> None:
    for target in ("full", "missing"):
        if target == "full":
            (tmp_path / target).mkdir()
        link = tmp_path / f"link to {target}"
        try:
            link.symlink_to(target)
        except OSError:
            pytest.skip("this system has no links for ordinary users")
        for force in (False, True):
            assert prepare([source], link, letters, force=force)["name"] == link.name
            assert link.is_symlink()
            assert rows(tmp_path / target) > 0
        with pytest.raises(InputError, match="not empty"):
            prepare([source], link, letters)
    assert names(tmp_path) == ["full", "link to full", "link to missing", "missing", "notes"]


def test_a_mount_point_is_written_inside(
    tmp_path: Path, source: Path, letters: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    (disk / "lost+found").mkdir(parents=True)
    inode = disk.stat().st_ino
    mount(monkeypatch, disk)
    prepare([source], disk, letters, row_len=64)
    before = contents(disk)
    assert {"metadata.json", "shard_00000.npy", "val/shard_00000.npy"} == set(before)
    with pytest.raises(InputError, match=r"not empty.*--force"):
        prepare([source], disk, letters)
    (source / "0.txt").write_text("other text")
    prepare([source], disk, letters, row_len=64, force=True, val_fraction=0)
    assert set(contents(disk)) == {"metadata.json", "shard_00000.npy"}
    assert contents(disk) != before
    assert names(disk) == ["lost+found", "metadata.json", "shard_00000.npy"]
    assert names(tmp_path) == ["disk", "notes"]
    assert disk.stat().st_ino == inode
    (disk / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files \(thesis"):
        prepare([source], disk, letters, force=True)


def test_a_folder_in_one_that_cannot_be_written_is_written_inside(
    tmp_path: Path, source: Path, letters: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "readonly" / "data"
    out.mkdir(parents=True)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != out.parent and access(path, mode))
    prepare([source], out, letters)
    assert names(out.parent) == ["data"]
    assert rows(out) > 0


def test_what_is_half_moved_is_refused_by_readers_and_replaced(
    tmp_path: Path, source: Path, letters: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount(monkeypatch, disk)
    prepare([source], disk, letters)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(InputError, match=r"cannot write .*disk: Input/output error"):
            prepare([source], disk, letters, force=True)
    assert UNFINISHED in names(disk)
    with pytest.raises(InputError, match=r"is not whole.*run it again"):
        rows(disk)
    prepare([source], disk, letters)
    assert rows(disk) > 0
    assert UNFINISHED not in names(disk)


def test_what_is_half_moved_is_replaced_where_it_is_no_mount_point_any_more(
    tmp_path: Path, source: Path, letters: Tokenizer
) -> None:
    (tmp_path / "data").mkdir()
    for name in (UNFINISHED, "shard_00000.npy"):
        (tmp_path / "data" / name).touch()
    prepare([source], tmp_path / "data", letters)
    assert UNFINISHED not in names(tmp_path / "data")
    assert rows(tmp_path / "data") > 0


@locks
def test_two_at_once_into_one_folder(tmp_path: Path, source: Path, letters: Tokenizer) -> None:
    out = tmp_path / "data"
    with place_for(out, force=False), pytest.raises(InputError, match=r"another process is preparing .*data"):
        prepare([source], out, letters)
    assert names(tmp_path) == ["notes"]
    prepare([source], out, letters)
    with place_for(out, force=True), pytest.raises(InputError, match="another process is preparing"):
        prepare([source], out, letters, force=True)
    assert names(tmp_path) == ["data", "notes"]


@locks
def test_what_a_killed_process_left_is_cleared_and_its_data_set_comes_back(
    tmp_path: Path, source: Path, letters: Tokenizer
) -> None:
    out, workshop = tmp_path / "data", tmp_path / ".data.partial"
    prepare([source], out, letters)
    before = contents(out)
    workshop.mkdir()
    out.rename(workshop / "old-1")  # killed between the two renames
    (workshop / "new-1" / "val").mkdir(parents=True)
    (workshop / "new-1" / "shard_00000.npy").write_text("half")
    with pytest.raises(InputError, match="not empty"):
        prepare([source], out, letters)
    assert contents(out) == before
    assert names(tmp_path) == ["data", "notes"]


def test_nothing_is_read_before_the_place_is_decided(
    tmp_path: Path, source: Path, letters: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Corpus", None)
    places = [(source, r"holds other files"), (source / "0.txt", "is a file"), (source / "0.txt" / "x", "cannot write")]
    try:
        (tmp_path / "loop").symlink_to("loop")
        places.append((tmp_path / "loop", "leads back to itself"))
    except OSError:
        pass
    for out, problem in places:
        with pytest.raises(InputError, match=problem):
            prepare([source], out, letters)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="needs a user who may not write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path, source: Path, letters: Tokenizer) -> None:
    (tmp_path / "readonly").mkdir()
    (tmp_path / "readonly").chmod(stat.S_IREAD | stat.S_IEXEC)
    with pytest.raises(InputError, match="cannot write"):
        prepare([source], tmp_path / "readonly" / "data", letters)


def test_a_full_disk_is_named_however_numpy_says_it(
    tmp_path: Path, source: Path, letters: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError("4096 requested and 0 written")

    monkeypatch.setattr("numpy.save", full)
    with pytest.raises(InputError, match=r"cannot write .*data: 4096 requested and 0 written \(is the disk full\?\)"):
        prepare([source], tmp_path / "data", letters)
    assert names(tmp_path) == ["notes"]


def test_output_inside_a_source_leaves_itself_out(tmp_path: Path, source: Path, letters: Tokenizer) -> None:
    notes: list[str] = []
    first = prepare([source], source / "data", letters, note=notes.append)
    second = prepare([source], source / "data", letters, note=notes.append, force=True)
    assert first == second
    assert notes == []


def test_folders_mounted_from_the_same_disk_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "36 35 8:1 /home/me /mnt/my\\040disk rw - ext4 /dev/sda1 rw\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: line)
    monkeypatch.setattr(os.path, "ismount", lambda path: False)
    assert publish._is_mount(Path("/mnt/my disk"))
    assert not publish._is_mount(Path("/mnt/my"))


def test_a_name_that_no_folder_has_is_refused():
    with pytest.raises(InputError, match="is not a path"), publish.place_for(Path("\ud800"), force=False):
        pass
