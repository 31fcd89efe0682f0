"""The text of a page, whatever the quality of its markup."""

import gzip
from pathlib import Path

import pytest

from lepton.data import formats
from lepton.data.sources import Corpus
from lepton.errors import InputError
from tests.data.test_sources import documents, put

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
