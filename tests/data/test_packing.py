"""Packed files are read as what they hold; torn ones, and kinds of files that are not read, are named."""

import importlib.util
from functools import partial
from pathlib import Path

import pytest

from lepton.data.packing import UNREADABLE, zstd
from lepton.data.sources import Corpus
from lepton.errors import InputError
from lepton.requirements import MissingLibrary
from tests.data.test_formats import PACK, STORY
from tests.data.test_sources import documents, lines, put


@pytest.mark.parametrize("packing", PACK)
def test_torn_packed_files_are_named(tmp_path: Path, packing: str) -> None:
    whole = PACK[packing]("\n".join(map(str, range(40_000))).encode())
    for content in (whole[: len(whole) // 2], b"", b"plain text", whole[:50] + b"\0\xff" * 60 + whole[170:]):
        path = put(tmp_path / f"a.txt{packing}", content)
        with pytest.raises(InputError, match=rf"a\.txt\{packing} is torn or no {packing[1:]} file"):
            Corpus([path])
    corpus = Corpus([tmp_path])
    assert documents(corpus) == []
    assert corpus.skipped == {path: f"torn {packing}"}


@pytest.mark.parametrize("suffix", sorted(UNREADABLE))
def test_what_is_not_read_is_refused_by_name_with_the_fix(tmp_path: Path, suffix: str) -> None:
    path = put(tmp_path / f"my data{suffix}", "PAR1 looks like text")
    with pytest.raises(InputError, match=rf"my data\{suffix}: \{suffix} files are not read; [a-z]") as caught:
        Corpus([path])
    assert "\n" not in str(caught.value)
    assert "{" not in str(caught.value)
    corpus = Corpus([tmp_path])
    assert documents(corpus) == []
    assert corpus.skipped_summary() == f"1 {suffix} (my data{suffix})"


def test_packed_archives_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.tar files are not read; unpack it"):
        Corpus([put(tmp_path / "a.tar.gz", "x")])
    with pytest.raises(InputError, match=r"a\.parquet\.gz: a packed \.parquet file is not read; unpack it"):
        Corpus([put(tmp_path / "a.parquet.gz", "x")])


def test_zst_is_read_and_a_torn_one_is_named(tmp_path: Path) -> None:
    pytest.importorskip("backports.zstd")
    pack = partial(zstd().compress, options={zstd().CompressionParameter.checksum_flag: 1})
    assert documents(Corpus([put(tmp_path / "a.txt.zst", pack(STORY.encode()))])) == [STORY]
    assert documents(Corpus([put(tmp_path / "a.jsonl.zst", pack(lines(STORY, "b")))])) == [STORY, "b"]
    whole = pack("\n".join(map(str, range(40_000))).encode())
    for content in (whole[: len(whole) // 2], b"", b"plain text", whole[:50] + b"\0\xff" * 60 + whole[170:]):
        with pytest.raises(InputError, match=r"b\.txt\.zst is torn or no zst file"):
            Corpus([put(tmp_path / "b.txt.zst", content)])


@pytest.mark.parametrize(("name", "library"), [("a.parquet", "pyarrow"), ("a.txt.zst", "backports.zstd")])
def test_what_needs_a_library_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, library: str
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in library else real(name))
    path = put(tmp_path / name, "x")
    for source in (path, tmp_path):
        with pytest.raises(MissingLibrary, match=rf"needs {library}; get it with: .* -m pip install {library}"):
            documents(Corpus([source]))


def test_the_line_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    for name in ("a.txt", "a.csv", "a.html"):
        path = put(tmp_path / name, b"text\nok\n" + b"caf\xe9\n")
        with pytest.raises(InputError, match=rf"{name}, line 3 is not UTF-8 text: convert the file \(iconv"):
            documents(Corpus([path]))
