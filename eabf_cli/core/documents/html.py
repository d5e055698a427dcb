"""The visible text of an HTML page."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from eabf_cli.core.documents.paragraph import Paragraph

# fmt: off
_HIDDEN = frozenset(
    (
        "script", "style", "nav", "head", "template", "noscript", "svg", "math", "iframe", "object", "select",
        "button", "label", "dialog", "canvas", "audio", "video",
    )
)
_BLOCKS = frozenset(
    (
        "address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "div", "dl", "dt",
        "fieldset", "figcaption", "figure", "footer", "header", "hr", "html", "legend", "li", "main", "ol", "p",
        "pre", "section", "summary", "table", "tbody", "tfoot", "thead", "tr", "ul",
    )
)
# fmt: on
_HEADINGS = frozenset(f"h{level}" for level in range(1, 7))
_VOID = frozenset(
    ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr")
)
_CELLS = frozenset(("td", "th"))


def read_html(text: str) -> tuple[list[Paragraph], str | None]:
    """The paragraphs of a page, and its title if it has one."""
    parser = _VisibleText()
    parser.feed(text)
    parser.close()
    parser.end_paragraph()
    return parser.paragraphs, " ".join("".join(parser.title).split()) or None


class _VisibleText(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[Paragraph] = []
        self.title: list[str] = []
        self._text: list[str] = []
        # The open elements that hide what is in them, innermost last.
        self._hidden: list[str] = []
        self._is_title = False
        self._is_heading = False
        self._num_pre = 0
        self._lists: list[int | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "title" and not any(hidden != "head" for hidden in self._hidden):
            self._is_title = True
        attributes = dict(attrs)
        hides = tag in _HIDDEN or "hidden" in attributes or attributes.get("aria-hidden") == "true"
        if tag == "math" and attributes.get("alttext"):
            self._add(f" {attributes['alttext']} ")
        if tag == "body":
            # A head need not be closed.
            self._hidden = [hidden for hidden in self._hidden if hidden != "head"]
        if not self._hidden and (tag in _BLOCKS or tag in _HEADINGS):
            self.end_paragraph()
        if self._hidden or hides:
            if tag not in _VOID and (hides or tag == self._hidden[-1]):
                self._hidden.append(tag)
            return
        if tag in _HEADINGS:
            self._is_heading = True
        elif tag == "pre":
            self._num_pre += 1
        elif tag in ("ul", "ol"):
            self._lists.append(1 if tag == "ol" else None)
        elif tag == "li":
            self._text.append(self._list_mark())
        elif tag == "br":
            self._text.append("\n")
        elif tag in _CELLS and "".join(self._text).strip():
            self._text.append("\t")

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self._is_title = False
        if self._hidden:
            if tag in self._hidden:
                # Elements inside that were not closed end with it.
                del self._hidden[len(self._hidden) - 1 - self._hidden[::-1].index(tag) :]
            return
        if tag in _BLOCKS or tag in _HEADINGS:
            self.end_paragraph()
        if tag in _HEADINGS:
            self._is_heading = False
        elif tag == "pre":
            self._num_pre = max(self._num_pre - 1, 0)
        elif tag in ("ul", "ol") and self._lists:
            self._lists.pop()

    def handle_data(self, data: str) -> None:
        if self._is_title:
            self.title.append(data)
        elif not self._hidden:
            self._add(data if self._num_pre else re.sub(r"[ \t\n\r\f]+", " ", data))

    def _add(self, text: str) -> None:
        self._text.append(text)

    def _list_mark(self) -> str:
        if not self._lists or self._lists[-1] is None:
            return "- "
        number = self._lists[-1]
        self._lists[-1] = number + 1
        return f"{number}. "

    def end_paragraph(self) -> None:
        text = "".join(self._text)
        if self._num_pre:
            lines = [line.rstrip() for line in text.strip("\n").split("\n")]
        else:
            lines = [
                "  ".join(" ".join(cell.split()) for cell in line.split("\t") if cell.strip())
                for line in text.split("\n")
            ]
        text = "\n".join(line for line in lines if line.strip() or self._num_pre).strip("\n")
        self._text = []
        if text.strip() and text.strip() not in ("-",):
            is_item = bool(self._lists)
            self.paragraphs.append(Paragraph([text], is_heading=self._is_heading, is_row=is_item))
