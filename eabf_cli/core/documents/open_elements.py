"""Which elements of an HTML page are open: many end without a tag of their own.

A part of the rules of the HTML standard, section 13.2.6 ("The rules for parsing tokens in HTML content").
"""

from __future__ import annotations

from dataclasses import dataclass

VOID = frozenset(
    ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr")
)
HEADINGS = frozenset(f"h{level}" for level in range(1, 7))
# fmt: off
BLOCKS = frozenset(
    (
        "address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "div", "dl", "dt",
        "fieldset", "figcaption", "figure", "footer", "form", "header", "hr", "html", "legend", "li", "main", "nav",
        "ol", "p", "pre", "section", "summary", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "ul",
    )
)
_IN_HEAD = frozenset(("base", "link", "meta", "noscript", "script", "style", "template", "title"))
# fmt: on
_ROWS = ("tr", "td", "th")
_SECTIONS = ("tbody", "thead", "tfoot")
# What the beginning of an element ends, and what hides it from that.
_ENDED_BY = (
    dict.fromkeys((BLOCKS | HEADINGS) - {"tr", "td", "th"}, (("p",), ("table", "td", "th", "caption", "button")))
    | {"li": (("li", "p"), ("ul", "ol"))}
    | dict.fromkeys(("dd", "dt"), (("dd", "dt", "p"), ("dl",)))
    | dict.fromkeys(("td", "th"), (("td", "th"), ("tr", "table")))
    | {"tr": (_ROWS, ("table", *_SECTIONS))}
    | dict.fromkeys(_SECTIONS, ((*_SECTIONS, "caption", *_ROWS), ("table",)))
    | {"option": (("option",), ("select",)), "optgroup": (("option", "optgroup"), ("select",))}
)


@dataclass(eq=False, slots=True)
class Element:
    """An open element.

    Attributes:
        hides: what is in it is not shown.
        mark: what its owner keeps with it.
    """

    tag: str
    hides: bool = False
    mark: tuple[int, int] | None = None


class OpenElements:
    """The open elements, outermost first."""

    def __init__(self) -> None:
        self._open: list[Element] = []

    @property
    def is_hidden(self) -> bool:
        return any(element.hides for element in self._open)

    def is_hidden_but_for(self, tag: str) -> bool:
        return any(element.hides and element.tag != tag for element in self._open)

    def begin(self, tag: str) -> None:
        """End what the beginning of this element ends; it is not opened yet."""
        if tag not in _IN_HEAD and tag != "head":
            self._end_outermost(("head",), ())
        ended, walls = _ENDED_BY.get(tag, ((), ()))
        self._end_outermost(ended, walls)

    def push(self, element: Element) -> None:
        if element.tag not in VOID:
            self._open.append(element)

    def end(self, tag: str) -> Element | None:
        """End the innermost open element of this name, and all inside it; returns it."""
        walls = ("table", "template") if tag in BLOCKS and tag != "table" else ()
        for index in reversed(range(len(self._open))):
            element = self._open[index]
            if element.tag == tag:
                del self._open[index:]
                return element
            # The end of a word's markup ends no paragraph.
            if element.tag in walls or (tag not in BLOCKS and element.tag in BLOCKS):
                return None
        return None

    def _end_outermost(self, tags: tuple[str, ...], walls: tuple[str, ...]) -> None:
        """End the outermost of some elements that no wall hides, and all inside it."""
        first = None
        for index in reversed(range(len(self._open))):
            if self._open[index].tag in tags:
                first = index
            elif self._open[index].tag in walls:
                break
        if first is not None:
            del self._open[first:]
