"""Files of other forms than plain text: read as what they hold, or refused by name."""

import bz2
import gzip
import importlib.util
import json
import lzma
from functools import partial
from pathlib import Path

import pytest

from lepton.data import formats
from lepton.data.packing import UNREADABLE
from lepton.data.sources import Corpus
from lepton.errors import InputError
from lepton.requirements import MissingLibrary
from tests.data.test_sources import documents, lines, put

PACK = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
STORY = "One, two.\nThree."


@pytest.mark.parametrize("packing", PACK)
def test_packed_text_tables_and_json_are_read(tmp_path: Path, packing: str) -> None:
    table = 'id,text\r\n1,"One, two.\nThree."\r\n2,\r\n3,"say ""hi"""\r\n'
    contents = {
        "a.txt": (STORY, [STORY]),
        "a.md": (STORY, [STORY]),
        "a.jsonl": (lines(STORY, "b").decode(), [STORY, "b"]),
        "a.json": (json.dumps([{"text": STORY}, {"text": None}, "b"]), [STORY, "b"]),
        "a.csv": (table, [STORY, 'say "hi"']),
        "A.TSV": ("text\tid\nOne\t1\nTwo, too\t2\n", ["One", "Two, too"]),
    }
    for name, (content, wanted) in contents.items():
        plain = put(tmp_path / name, content)
        packed = put(tmp_path / (name + packing), PACK[packing](content.encode()))
        assert documents(Corpus([plain])) == documents(Corpus([packed])) == wanted


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


def test_a_json_array_is_read_an_element_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f'text {i}, [with] "quotes\\" and {{braces}}, é' * (1 + i % 5) for i in range(60)]
    for block in (1, 7, 64, 1 << 16):
        monkeypatch.setattr(formats, "BLOCK", block)
        for indent in (None, 2):
            path = put(
                tmp_path / "a.json",
                "\n " + json.dumps([{"n": [i], "text": t} for i, t in enumerate(texts)], indent=indent),
            )
            assert documents(Corpus([path])) == texts
    assert documents(Corpus([put(tmp_path / "a.json", "[ ]")])) == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('[{"text": "a"}, {"text": "b"', r"element 2: no JSON, or a torn file"),
        ('[{"text": "a"}', r"element 1: no JSON, or a torn file"),
        ('[{"text": "a"} {"text": "b"} x]', r"element 3: no JSON"),
        ("[", r"element 1: no JSON, or a torn file"),
        ('[{"text": 5}]', r"element 1: no text in the field 'text'"),
        ("[1, 2]", r"element 1: no text in the field 'text' \(found: int\)"),
        ("[" * 200_000, r"nested too deeply"),
        ('["' + "a" * 5000 + '"]', r"element 1: longer than"),
    ],
)
def test_a_bad_json_array_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, problem: str) -> None:
    if "longer" in problem:
        monkeypatch.setattr(formats, "MAX_DOCUMENT", 1000)
        monkeypatch.setattr(formats, "BLOCK", 100)
    with pytest.raises(InputError, match=rf"a\.json, {problem}|a\.json, element 1: the JSON is {problem}"):
        documents(Corpus([put(tmp_path / "a.json", content)]))


def test_json_that_is_source_code_stays_text(tmp_path: Path) -> None:
    config = '{\n "name": "x",\n "text": "y"\n}\n'
    ignore = '["a", "b"]\n'
    put(tmp_path / "code" / "config.json", config)
    put(tmp_path / "code" / "ignore.json", ignore)
    put(tmp_path / "code" / "stories.json", '[{"text": "a story"}]')
    put(tmp_path / "code" / "train.json", lines("one", "two"))
    packed = put(tmp_path / "code" / "vocabulary.json.gz", gzip.compress(config.encode()))
    corpus = Corpus([tmp_path / "code"])
    assert documents(corpus) == [config, ignore, "a story", "one", "two"]
    assert list(corpus.skipped) == [packed]
    with pytest.raises(InputError, match="no documents with the field 'text'"):
        Corpus([packed])
    assert documents(Corpus([tmp_path / "code" / "config.json"])) == [config]
    assert documents(Corpus([tmp_path / "code" / "ignore.json"])) == ["a", "b"]


def test_a_table_needs_the_column(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", "id;body\n1;one\n2;two, too\n")
    with pytest.raises(
        InputError, match=r"a\.csv, line 1: no text in the field 'text' \(found: id;body\).*--text_field"
    ):
        Corpus([path])
    assert documents(Corpus([path], text_field="body")) == ["one", "two, too"]
    corpus = Corpus([tmp_path])
    assert documents(corpus) == []
    assert corpus.skipped_summary() == "1 .csv without usable 'text' (a.csv)"


@pytest.mark.parametrize("content", ['text\n"never closed\n', 'text\n"a"b\n'])
def test_a_bad_table_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match=r"a\.csv, line \d+: no csv"):
        documents(Corpus([put(tmp_path / "a.csv", content)]))


def test_other_encodings_are_named(tmp_path: Path) -> None:
    for name, content in {"a.csv": b"text\nok\n" + b"caf\xe9\n", "a.json": b'["caf\xe9"]'}.items():
        with pytest.raises(InputError, match="is not UTF-8 text"):
            documents(Corpus([put(tmp_path / name, content)]))


# What a file decides has a bound


def test_json_that_is_nested_too_deeply_is_named_and_in_folders_skipped(tmp_path: Path) -> None:
    deep = put(tmp_path / "deep.jsonl", "[" * 200_000)
    put(tmp_path / "good.txt", "good")
    corpus = Corpus([tmp_path])
    assert documents(corpus) == ["good"]
    assert list(corpus.skipped) == [deep]
    with pytest.raises(InputError, match=r"deep\.jsonl, line 1: the JSON is nested too deeply"):
        Corpus([deep])
    later = put(tmp_path / "later.jsonl", lines("one") + b'{"text": ' + b"[" * 200_000)
    with pytest.raises(InputError, match=r"later\.jsonl, line 2: the JSON is nested too deeply"):
        documents(Corpus([later]))


def test_lines_and_rows_have_a_greatest_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_DOCUMENT", 1 << 12)
    long = "a" * 5000
    contents = {
        "a.jsonl": lines("one", long),
        "a.jsonl.xz": lzma.compress(b" " * 10_000_000),
        "a.csv": f"text\none\n{long}\n".encode(),
        "b.csv": b'text\none\n"' + b"a\n" * 5000 + b'"\n',
    }
    for name, content in contents.items():
        with pytest.raises(InputError, match="longer than"):
            documents(Corpus([put(tmp_path / name, content)]))


# Pages


PAGE = """<!DOCTYPE html><html><head><title>Not text</title><style>p { color: red }</style></head>
<body><script>var x = "<p>no</p>";</script>
<h1>Caf&eacute;   at&#32;night</h1><p>One <b>bold</b>
word.<br>A line.</p><ul><li>first</li><li>second</li></ul>
<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>
<pre>  kept
    as it is</pre><noscript>no</noscript></body></html>
"""
TEXT_OF_PAGE = "Café at night\n\nOne bold word.\nA line.\n\n- first\n- second\n\na\tb\n1\t2\n\n  kept\n    as it is\n"


@pytest.mark.parametrize("name", ["a.html", "A.HTM", "a.xhtml", "a.html.gz"])
def test_a_page_is_read_as_its_text(tmp_path: Path, name: str) -> None:
    content = PAGE.encode()
    path = put(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    assert documents(Corpus([path])) == documents(Corpus([tmp_path])) == [TEXT_OF_PAGE]


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("no markup", "no markup\n"),
        ("<p>never closed <i>here", "never closed here\n"),
        ("<head><title>t<body><p>after a head that is not closed", "after a head that is not closed\n"),
        ("1 < 2 &amp; 3 > 2", "1 < 2 & 3 > 2\n"),
        ("<p>a</p></p></div><p>b", "a\n\nb\n"),
        ("<p> </p>", None),
    ],
)
def test_pages_of_any_quality_give_text(tmp_path: Path, page: str, text: str | None) -> None:
    assert documents(Corpus([put(tmp_path / "a.html", page)])) == [text] * (text is not None)


def test_a_page_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"a\.html: no HTML that can be read .*: save it as plain text"):
        documents(Corpus([put(tmp_path / "a.html", "<p>a<![foo[ b")]))
    monkeypatch.setattr(formats, "MAX_DOCUMENT", 100)
    with pytest.raises(InputError, match=r"b\.html: longer than"):
        documents(Corpus([put(tmp_path / "b.html", "a" * 101)]))


# Zstandard and Parquet


def test_zst_is_read_and_a_torn_one_is_named(tmp_path: Path) -> None:
    pytest.importorskip("backports.zstd")
    from lepton.data.packing import zstd

    pack = partial(zstd().compress, options={zstd().CompressionParameter.checksum_flag: 1})
    assert documents(Corpus([put(tmp_path / "a.txt.zst", pack(STORY.encode()))])) == [STORY]
    assert documents(Corpus([put(tmp_path / "a.jsonl.zst", pack(lines(STORY, "b")))])) == [STORY, "b"]
    whole = pack("\n".join(map(str, range(40_000))).encode())
    for content in (whole[: len(whole) // 2], b"", b"plain text", whole[:50] + b"\0\xff" * 60 + whole[170:]):
        with pytest.raises(InputError, match=r"b\.txt\.zst is torn or no zst file"):
            Corpus([put(tmp_path / "b.txt.zst", content)])


def parquet(path: Path, columns: dict[str, object], **options: object) -> Path:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.table(columns), path, **options)
    return path


def test_a_parquet_file_gives_the_documents_of_the_same_lines(tmp_path: Path) -> None:
    texts = [f"text {i}, é" for i in range(1000)] + [None, "", "last"]
    path = parquet(tmp_path / "a.parquet", {"n": range(1003), "text": texts}, row_group_size=300)
    plain = put(tmp_path / "a.jsonl", lines(*texts))
    assert documents(Corpus([path])) == documents(Corpus([plain])) == [*filter(None, texts)]
    told: list[int] = []
    list(Corpus([path]).pieces(told.append))
    assert sum(told) == path.stat().st_size
    assert len(told) > 2
    assert documents(Corpus([parquet(tmp_path / "b.pq", {"body": ["one"]})], text_field="body")) == ["one"]


def test_a_bad_parquet_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.parquet: no text in the field 'text' \(found: body, n\).*--text_field"):
        Corpus([parquet(tmp_path / "a.parquet", {"body": ["one"], "n": [1]})])
    with pytest.raises(InputError, match=r"b\.parquet, row 1: no text in the field 'text'"):
        Corpus([parquet(tmp_path / "b.parquet", {"text": [1, 2]})])
    whole = parquet(tmp_path / "c.parquet", {"text": ["one"] * 1000}).read_bytes()
    for content in (whole[:-20], b"", b"plain text", whole[:4] + b"\xff" * 100 + whole[104:]):
        with pytest.raises(InputError, match=r"c\.parquet is torn or no Parquet file"):
            documents(Corpus([put(tmp_path / "c.parquet", content)]))


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
