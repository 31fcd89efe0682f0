"""Files of other forms than plain text: read as what they hold, or refused by name."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from lepton.data import formats
from lepton.data.sources import Corpus
from lepton.errors import InputError
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


# Parquet


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
