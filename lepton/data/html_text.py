"""The text of an HTML page, as a person reads it: without markup, scripts and styles, a paragraph a block."""

import re
from html.parser import HTMLParser

UNREAD = {"head", "template", "noscript", "svg", "canvas", "iframe", "object", "select", "textarea"}
"""Elements whose content is not text of the page."""
BLOCKS = {
    "address", "article", "aside", "blockquote", "body", "dd", "details", "div", "dl", "dt", "fieldset", "figcaption",
    "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "main", "nav", "ol", "p", "pre",
    "section", "summary", "table", "ul",
}  # fmt: skip
"""Elements that an empty line sets apart."""
LINES = {"br", "caption", "legend", "li", "option", "tr"}
"""Elements that begin a line."""
CELLS = {"td", "th"}
_NO_TEXT = re.compile(
    r"<!--.*?(?:-->|\Z)|<(script|style)(?=[\s/>]).*?(?:</\1\s*>|\Z)|<[!?][^>]*(?:>|\Z)", re.DOTALL | re.IGNORECASE
)
"""Comments, scripts, styles and declarations; one that is not closed goes to the end of the page, as in a browser. They
are cut out beforehand: Python's parser looks for each end anew, which takes hours where there are many without one."""
_OPEN_TAG = re.compile(r"<[a-zA-Z/]")
_SPACE = re.compile(r"[ \t\n\r\f]+")


def text_of_page(page: str) -> str:
    """Return the text of an HTML page; '' if there is none.

    Blocks are set apart by an empty line, the cells of a table's row by a tab. White space within a line is joined,
    except in `<pre>`. Whatever is wrong with the markup, there is a text.
    """
    page = _NO_TEXT.sub(" ", page)
    last = page.rfind(">") + 1
    if cut := _OPEN_TAG.search(page, last):  # a tag that is never closed
        page = page[: cut.start()]
    reader = _Reader()
    reader.feed(page)
    reader.close()
    lines = "".join(reader.parts).split("\n")
    text = "\n".join(line.rstrip() for line in lines)
    text = re.sub(r"\n{3,}", "\n\n", text).strip("\n")
    return text + "\n" if text.strip() else ""


class _Reader(HTMLParser):
    """Collects the text of a page in `parts`."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._unread: list[str] = []
        """Open elements whose content is left out."""
        self._pre = 0
        self._in_line = False
        """Whether the present line has text."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "body":  # which ends a head that was not closed
            self._unread = []
        if tag in UNREAD:
            self._unread.append(tag)
        elif not self._unread:
            self._break(tag)
            self._pre += tag == "pre"
            if tag == "li":
                self._add("- ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if not self._unread and tag not in UNREAD:
            self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._unread:
            del self._unread[self._unread.index(tag) :]
        elif not self._unread:
            self._pre = max(0, self._pre - (tag == "pre"))
            if tag not in LINES and tag not in CELLS:
                self._break(tag)

    def handle_data(self, data: str) -> None:
        if self._unread:
            return
        if self._pre:
            self._add(data)
            return
        text = _SPACE.sub(" ", data)
        self._add(text if self._in_line else text.removeprefix(" "))

    def _break(self, tag: str) -> None:
        if tag in BLOCKS or tag in LINES:
            self.parts.append("\n\n" if tag in BLOCKS else "\n")
            self._in_line = False
        elif tag in CELLS and self._in_line:
            self._add("\t")

    def _add(self, text: str) -> None:
        if text:
            self.parts.append(text)
            self._in_line = not text.endswith((" ", "\n"))
