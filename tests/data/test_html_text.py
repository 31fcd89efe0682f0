"""The text of a page, whatever the quality of its markup."""

import gzip
from pathlib import Path

import pytest

from lepton.data import formats
from lepton.data.html_text import text_of_page
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
        ("<p>a<!-- not <p>closed", "a\n"),
        ("a<!-- b --> c <?php d ?>e<![CDATA[f]]>", "a c e\n"),
        ("a<SCRIPT src='x'>if (1 < 2) '</p>'</script >b<style>p {}</style><script-tag>c</script-tag>", "a b c\n"),
        ("<p>a<script>never closed <p>b", "a\n"),
        ("1 <2 a <b never closed", "1 <2 a\n"),
        ("a<![foo[ b > c", "a c\n"),
        ("<p title='a>b'>c", "c\n"),
    ],
)
def test_pages_of_any_quality_give_text(tmp_path: Path, page: str, text: str | None) -> None:
    assert documents(Corpus([put(tmp_path / "a.html", page)])) == [text] * (text is not None)


def test_a_page_has_a_greatest_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_DOCUMENT", 100)
    with pytest.raises(InputError, match=r"b\.html: longer than"):
        documents(Corpus([put(tmp_path / "b.html", "a" * 101)]))


@pytest.mark.parametrize("end", [" end", "<p>end"])
@pytest.mark.parametrize("part", ["<", "<!--", "<a ", "<a b=", "<script>", "<!", "<?", "</", "<a b='", "&", "<div>"])
def test_markup_that_is_never_closed_takes_no_longer_than_other(part: str, end: str) -> None:
    """200 kB: where the time grew with the square of the length, this would take minutes."""
    assert len(text_of_page(part * (200_000 // len(part)) + end)) < 1_000_000
