"""The visible text of an HTML page."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from eabf_cli.core.documents.open_elements import BLOCKS, HEADINGS, Element, OpenElements
from eabf_cli.core.documents.paragraph import Paragraph

# fmt: off
_HIDDEN = frozenset(
    (
        "script", "style", "head", "template", "noscript", "svg", "math", "iframe", "object", "select",
        "button", "label", "dialog", "canvas", "audio", "video",
    )
)
# fmt: on
_CELLS = frozenset(("td", "th"))
_HIDING_STYLE = re.compile(r"\b(?:display\s*:\s*none|visibility\s*:\s*hidden)\b", re.IGNORECASE)
# A menu; where its end is missing, what follows is the page.
_MENU = "nav"


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
        self._elements = OpenElements()
        self._is_title = False
        self._is_heading = False
        self._num_pre = 0
        self._lists: list[int | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self._elements.begin(tag)
        if tag == "title" and not self._elements.is_hidden_but_for("head"):
            self._is_title = True
        if tag == "math" and attributes.get("alttext"):
            self._add(f" {attributes['alttext']} ")
        was_hidden = self._elements.is_hidden
        if not was_hidden and (tag in BLOCKS or tag in HEADINGS) and tag not in _CELLS:
            self.end_paragraph()
        hides = tag in _HIDDEN or _is_hiding(attributes)
        mark = (len(self.paragraphs), len(self._lists)) if tag == _MENU else None
        self._elements.push(Element(tag, hides, mark))
        if was_hidden or hides:
            return
        if tag in HEADINGS:
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
        was_hidden = self._elements.is_hidden
        if not was_hidden and (tag in BLOCKS or tag in HEADINGS) and tag not in _CELLS:
            self.end_paragraph()
        element = self._elements.end(tag)
        if element is not None and element.mark is not None and not was_hidden:
            num_paragraphs, num_lists = element.mark
            del self.paragraphs[num_paragraphs:], self._lists[num_lists:]
        if was_hidden:
            return
        if tag in HEADINGS:
            self._is_heading = False
        elif tag == "pre":
            self._num_pre = max(self._num_pre - 1, 0)
        elif tag in ("ul", "ol") and self._lists:
            self._lists.pop()

    def handle_data(self, data: str) -> None:
        if self._is_title:
            self.title.append(data)
        elif not self._elements.is_hidden:
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


def _is_hiding(attributes: dict[str, str | None]) -> bool:
    """Whether an element's own attributes say that it is not shown."""
    if "hidden" in attributes or attributes.get("aria-hidden") == "true":
        return True
    return _HIDING_STYLE.search(attributes.get("style") or "") is not None
