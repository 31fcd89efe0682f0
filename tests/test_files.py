import json
import lzma
import os
import sys

import pytest

from lepton.errors import InputError
from lepton.files import parse_json, read_bytes, readable, remove_unfinished, replacing, unpack_xz

posix = pytest.mark.skipif(sys.platform == "win32", reason="pipes with names and devices are of Unix")


def test_a_regular_file_and_a_link_to_one_are_read(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"text")
    (tmp_path / "link").symlink_to(path)
    assert read_bytes(path, "text", 4) == read_bytes(tmp_path / "link", "text", 4) == b"text"
    with pytest.raises(InputError, match="larger than 3 bytes"):
        read_bytes(path, "text", 3)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(InputError, match="no such tokenizer"):
        readable(tmp_path / "none", "tokenizer")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="no such file"):
        readable(tmp_path / "file" / "below")
    with pytest.raises(InputError, match="is a folder"):
        readable(tmp_path)
    with pytest.raises(InputError, match="is not a path"):
        readable("a\0b")
    with pytest.raises(InputError, match="is not a path"), replacing("\ud800"):
        raise AssertionError("there is nothing to write to")


@posix
def test_pipes_and_devices_are_neither_opened_nor_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe"), ("/dev/zero", "a device")):
        with pytest.raises(InputError, match=kind):
            readable(path)
        with pytest.raises(InputError, match=kind), replacing(path):
            pass


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a"
    with replacing(path) as unfinished:
        unfinished.write_text("one")
    with pytest.raises(TypeError), replacing(path) as unfinished:
        unfinished.write_text(2)
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]


def test_a_link_that_leads_back_to_itself_is_not_replaced(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop"), replacing(tmp_path / "loop"):
        pass
    assert (tmp_path / "loop").is_symlink()


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with replacing(tmp_path / "a") as first, replacing(tmp_path / "a") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a").read_text() == "first"


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for text in ("one", "two"):
        with replacing(tmp_path / "link") as unfinished:
            unfinished.write_text(text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "a").read_text() == text


def test_what_a_killed_writer_left_is_removed(tmp_path):
    (tmp_path / ".a.pt.0123abcd.tmp").touch()
    (tmp_path / "a.pt").touch()
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_xz_is_unpacked_up_to_a_bound():
    content = lzma.compress(b"x" * 1000) + lzma.compress(b"y" * 1000)
    assert unpack_xz(content, "a.xz", 2000) == b"x" * 1000 + b"y" * 1000
    with pytest.raises(InputError, match="unpacks to more than 1,999 bytes"):
        unpack_xz(content, "a.xz", 1999)
    for damaged in (content[:-5], content[:50] + b"?" + content[51:], b"no xz"):
        with pytest.raises(InputError, match=r"a\.xz is torn"):
            unpack_xz(damaged, "a.xz", 2000)


@pytest.mark.parametrize("text", ["[" * 200_000, "{", "1" * 5000, b"\xff"])
def test_bad_json_is_named(text):
    with pytest.raises(InputError, match=r"notes\.jsonl, line 3"):
        parse_json(text, "notes.jsonl, line 3")
    assert parse_json(json.dumps({"a": [1]}), "") == {"a": [1]}


@pytest.mark.parametrize("path", [None, 5, b"a", ["a"], [[]] * 3])
def test_what_is_no_path_is_named(path):
    for use in (readable, lambda given: replacing(given).__enter__()):
        with pytest.raises(InputError, match="is not a path: give a text or a Path"):
            use(path)
