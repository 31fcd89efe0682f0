import json
import lzma
import os
from pathlib import Path

import pytest

from lepton import files
from lepton.data import sources
from lepton.data.sources import Corpus
from lepton.data.tokenizer import Tokenizer
from lepton.errors import InputError


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*texts: object, field: str = "text") -> bytes:
    return "".join(json.dumps({"n": 1, field: text}) + "\n" for text in texts).encode()


def documents(corpus: Corpus) -> list[str]:
    found, open_document = [], ""
    for piece in corpus.pieces():
        open_document += piece.text
        if piece.last:
            found.append(open_document)
            open_document = ""
    assert open_document == ""
    return found


def test_a_text_file_is_a_document_and_a_json_line_another(tmp_path: Path) -> None:
    text = put(tmp_path / "b.md", "# Títle\r\n\r\ntext")
    marked = put(tmp_path / "bom.txt", b"\xef\xbb\xbfmarked")
    plain = put(tmp_path / "a.jsonl", lines("one", "two\nlines"))
    packed = put(tmp_path / "c.jsonl.xz", lzma.compress(lines("three", "", None, "four") + b"\n"))
    assert documents(Corpus([text, marked])) == ["# Títle\n\ntext", "marked"]
    assert documents(Corpus([packed, str(plain)])) == ["three", "four", "one", "two\nlines"]


def test_a_field_of_another_name(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", lines("one", field="body"))
    assert documents(Corpus([path], text_field="body")) == ["one"]
    with pytest.raises(
        InputError, match=r"a\.jsonl, line 1: no text in the field 'text' \(found: n, body\).*--text_fi"
    ):
        Corpus([path])


def test_a_folder_is_read_by_name_without_what_is_no_text(tmp_path: Path) -> None:
    put(tmp_path / "z.py", "z")
    put(tmp_path / "a" / "two.c", "two")
    put(tmp_path / "a" / "one.md", "one")
    put(tmp_path / "a" / "data.jsonl", lines("line"))
    put(tmp_path / "a" / "empty.txt", "")
    unread = {
        put(tmp_path / "picture.png", b"\x89PNG\x00\x01"),
        put(tmp_path / "latin.txt", "é".encode("latin-1")),
        put(tmp_path / "cut.txt", "é".encode()[:1]),
        put(tmp_path / "other.jsonl", lines("x", field="body")),
    }
    for hidden in (".git/config", ".hidden", "__pycache__/x.py", "a/node_modules/x.js", "out/old.txt"):
        put(tmp_path / hidden, "no")
    corpus = Corpus([tmp_path], leave_out=[tmp_path / "out"])
    assert documents(corpus) == ["z", "line", "one", "two"]
    assert set(corpus.skipped) == unread


def test_a_folder_that_links_to_itself_ends(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", "a")
    try:
        (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
        (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    except OSError:
        pytest.skip("this system has no links for ordinary users")
    assert documents(Corpus([tmp_path])) == ["a"]


def test_a_source_is_read_once(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", "a")
    assert documents(Corpus([path, tmp_path, path])) == ["a"]


def test_named_files_must_be_readable(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file or folder: .*nowhere\.txt"):
        Corpus([tmp_path / "nowhere.txt"])
    with pytest.raises(InputError, match=r"image\.bin is not UTF-8 text"):
        Corpus([put(tmp_path / "image.bin", b"\x00")])
    with pytest.raises(InputError, match=r"latin\.txt, line 1 is not UTF-8 text"):
        Corpus([put(tmp_path / "latin.txt", b"caf\xe9")])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="needs a user who may not read all files")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", "a")
    path.chmod(0)
    with pytest.raises(InputError, match=r"cannot read .*a\.txt"):
        Corpus([path])
    corpus = Corpus([tmp_path])
    assert documents(corpus) == []
    assert corpus.skipped == {path: "unreadable"}


def test_torn_json_lines_are_named_with_their_line(tmp_path: Path) -> None:
    broken = put(tmp_path / "a.jsonl", lines("one", "two") + b'{"text": "thr')
    with pytest.raises(InputError, match=r"a\.jsonl, line 3: no JSON") as caught:
        documents(Corpus([broken]))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"b\.jsonl, line 2: no text in the field 'text' \(found: int\)"):
        documents(Corpus([put(tmp_path / "b.jsonl", lines("one") + b"17")]))
    with pytest.raises(InputError, match=r"c\.jsonl, line 1: no text"):
        Corpus([put(tmp_path / "c.jsonl", lines(17))])
    with pytest.raises(InputError, match=r"d\.jsonl, line 1: no JSON"):
        Corpus([put(tmp_path / "d.jsonl", b"\xff\xfe")])


def test_a_torn_xz_file_is_named(tmp_path: Path) -> None:
    whole = lzma.compress(lines(*map(str, range(50_000))))
    torn = put(tmp_path / "a.jsonl.xz", whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"a\.jsonl\.xz is torn"):
        documents(Corpus([torn]))
    with pytest.raises(InputError, match=r"b\.jsonl\.xz is torn or no xz file"):
        Corpus([put(tmp_path / "b.jsonl.xz", "plain text")])


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n    return 1\n\n\nclass A:\n    pass\n" * 40,
        "a line of prose\nand another one, with no indent\n" * 40,
        "nolineendsatall" * 80,
        "\n" * 1000,
        "日本語\n" * 300,
    ],
)
def test_long_documents_come_in_pieces_that_change_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shipped: Tokenizer, text: str
) -> None:
    monkeypatch.setattr(sources, "PIECE", 256)
    path = put(tmp_path / "a.txt", text)
    pieces = list(Corpus([path]).pieces())
    assert all(0 < len(piece.text) <= 256 for piece in pieces)
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert "".join(piece.text for piece in pieces) == text
    if "line" in text.split("\n")[0] and " " in text:  # there are places to cut
        assert [i for piece in pieces for i in shipped.encode(piece.text)] == shipped.encode(text)


def test_pieces_of_code_change_no_token(tmp_path: Path, shipped: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE", 4096)
    code = Path(files.__file__).read_text(encoding="utf-8").replace("\ndef ", "\n@cache\ndef ")  # with places to cut
    pieces = [piece.text for piece in Corpus([put(tmp_path / "a.py", code)]).pieces()]
    assert len(pieces) > 1
    assert [i for text in pieces for i in shipped.encode(text)] == shipped.encode(code)


def test_progress_adds_up_to_the_size_of_the_files(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", "words " * 100_000)
    put(tmp_path / "b.bin", b"\0" * 100)
    put(tmp_path / "c.jsonl", lines(*["some text"] * 5000))
    put(tmp_path / "d.jsonl.xz", lzma.compress(lines(*map(str, range(5000)))))
    corpus = Corpus([tmp_path])
    steps: list[int] = []
    for _ in corpus.pieces(steps.append):
        pass
    assert corpus.size == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert sum(steps) == pytest.approx(corpus.size, rel=0.02)
    assert min(steps) > 0


# Separators


STORIES = "Once.\n<|endoftext|>\nTwice,\nsaid <|endoftext|> he.\r\n<|endoftext|>\r\n\n<|endoftext|>\n\nThrice."


def test_lines_with_the_marker_alone_separate_documents(tmp_path: Path) -> None:
    corpus = Corpus([put(tmp_path / "a.txt", STORIES)])
    assert documents(corpus) == ["Once.\n", "Twice,\nsaid <|endoftext|> he.\n", "\nThrice."]
    assert (corpus.separators, corpus.markers_kept) == (3, 1)
    corpus = Corpus([put(tmp_path / "a.jsonl", lines(STORIES, "four"))])
    assert len(documents(corpus)) == 4


def test_a_named_separator_stands_anywhere_and_an_empty_one_nowhere(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", STORIES)
    anywhere = ["Once.\n", "\nTwice,\nsaid ", " he.\n", "\n\nThrice."]
    assert documents(Corpus([path], separator="<|endoftext|>")) == anywhere
    assert documents(Corpus([path], separator="")) == [STORIES.replace("\r", "")]
    assert documents(Corpus([path], separator="\nTwice,\n")) == [
        "Once.\n<|endoftext|>",
        STORIES.replace("\r", "").split("Twice,\n")[1],
    ]
    with pytest.raises(InputError, match="at most 1,024"):
        Corpus([path], separator="-" * 2000)


@pytest.mark.parametrize("separator", [None, "<|endoftext|>", "\n"])
def test_separators_are_found_wherever_pieces_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str | None
) -> None:
    texts = [f"story {i} " + "long words and more\n" * (i % 9) + "end" for i in range(40)]
    joint = "\n<|endoftext|>\n"
    path = put(tmp_path / "a.txt", joint.join(texts))
    wanted = documents(Corpus([path], separator=separator))
    for length in (16, 17, 50, 61):
        monkeypatch.setattr(sources, "PIECE", length)
        pieces = list(Corpus([path], separator=separator).pieces())
        assert max(len(piece.text) for piece in pieces) <= length
        assert documents(Corpus([path], separator=separator)) == wanted
    if separator is None:
        assert wanted == [text + "\n" for text in texts[:-1]] + texts[-1:]


# What is skipped


def test_what_a_folder_does_not_give_is_counted_and_named(tmp_path: Path) -> None:
    for name in (".git/x", ".env", "a.arrow", "b.arrow", "c.arrow", "d.arrow", "e.pdf"):
        put(tmp_path / "in" / name, "text")
    put(tmp_path / "in" / "sub" / "photo.jpg", b"\xff\xd8\0")
    put(tmp_path / "in" / "latin.txt", b"caf\xe9")
    put(tmp_path / "in" / "__pycache__" / "x.py", "no")
    put(tmp_path / "elsewhere" / "x.txt", "no")
    try:
        (tmp_path / "in" / "there").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "in" / "there2").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "in" / "lost").symlink_to(tmp_path / "nowhere")
        os.mkfifo(tmp_path / "in" / "pipe")
    except (OSError, AttributeError):
        pytest.skip("this system has no links for ordinary users, or no pipes with names")
    corpus = Corpus([tmp_path / "in"])
    assert documents(corpus) == []
    summary = corpus.skipped_summary()
    assert summary.startswith("4 .arrow (a.arrow, b.arrow, c.arrow, ...), ")
    for part in (
        "2 linked folders (there, there2)",
        "2 hidden (.git, .env)",
        "1 .pdf (e.pdf)",
        "1 binary (photo.jpg)",
        "1 not UTF-8 (latin.txt)",
        "1 __pycache__ (__pycache__)",
        "1 broken link (lost)",
        "1 pipe or device (pipe)",
    ):
        assert part in summary


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names and devices are of Unix")
def test_pipes_and_devices_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    for path, kind in ((tmp_path / "pipe.txt", "a pipe"), ("/dev/zero", "a device")):
        with pytest.raises(InputError, match=kind):
            Corpus([path])


def test_a_name_that_no_file_has_is_refused() -> None:
    with pytest.raises(InputError, match="cannot read the file or folder"):
        Corpus(["x" * 300])
