"""Running heads, running feet and page numbers: what repeats at the edges of pages."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from eabf_cli.core.documents.lines import Line
from eabf_cli.core.documents.page_numbers import Number, bare_number, find_numbers, masked, outer_number, page_offsets
from eabf_cli.core.documents.words import PageWords

_Page = tuple[PageWords, Sequence[Line]]

# The parts of a page's height, at the top and at the bottom, in which they stand.
_EDGE = 0.13
# At most this many rows on each side.
_MAX_ROWS = 3
# Larger than the text by this factor, a line is a title; a bold one by the second.
_LARGER = 1.18
_BOLD_LARGER = 1.04
_SMALLER = 0.85
# The space to the text is wider than that between its lines.
_WIDER = 1.25
# The same words on so many pages are no accident.
_NUM_PAGES = 3
# Of two pages, if they follow each other on one side, fewer words may be one.
_CLOSE = 2
_NUM_WORDS = 3
# Where this part of the pages has a head, what stands in its place on others is one.
_PLACE_SHARE = 0.5
# Pages with this part of their lines in common are steps of one slide.
_STEP_SHARE = 0.5
# What stands on more of the pages is no sign of that.
_BAR_SHARE = 0.3


@dataclass(eq=False)
class _Edge:
    """A line near a page's edge.

    Attributes:
        sheet: the page, or the first step of a slide that is built up over several.
        is_apart: more space than between lines is between it and the text.
        is_title: it is larger than the text.
    """

    line: Line
    page: int
    sheet: int
    is_apart: bool
    is_title: bool
    bare: int | None = field(init=False)
    numbers: list[Number] = field(init=False)

    def __post_init__(self) -> None:
        # "i" beside no text is a page number, in a formula it is none.
        self.bare = bare_number(self.line.text) if self.is_apart or self.line.text[-1].isdigit() else None
        self.numbers = find_numbers(self.line.text)

    @property
    def place(self) -> tuple[int, float, bool]:
        """What lines have in common that take each other's place."""
        return round(self.line.baseline), round(2 * self.line.size) / 2, self.bare is not None


def without_running_heads(pages: Sequence[_Page]) -> list[list[Line]]:
    """Each page's lines without those that belong to the page; a page with nothing else is left as it is."""
    edges = list(_find_edges(pages))
    offsets = page_offsets((edge.page, number.value) for edge in edges for number in edge.numbers)
    heads = _numbered(edges)
    texts = _without_titles(edges, offsets, pages)
    heads |= _with_outer_number(texts) | _repeated(texts, offsets)
    heads |= _in_their_place(texts, heads, len(pages))
    dropped = {id(edge.line) for edge in heads}
    return [[line for line in lines if id(line) not in dropped] for _, lines in pages]


def _find_edges(pages: Sequence[_Page]) -> Iterator[_Edge]:
    """The outermost lines of each page at its top and bottom, by rows."""
    size = _body_size(lines for _, lines in pages)
    for (page, lines), sheet in zip(pages, _sheets(pages), strict=True):
        for sign in (1, -1):
            rows = _rows(lines, sign)
            gaps = [abs(row[0].baseline - inner[0].baseline) for row, inner in pairwise(rows)]
            wide = _WIDER * median(gaps) if gaps else 0.0
            for number, row in enumerate(rows[:_MAX_ROWS]):
                if not _is_near_edge(row[0], page.height, sign):
                    break
                is_apart = any(gap > wide for gap in gaps[number:_MAX_ROWS])
                for line in row:
                    # What a slide says is not so small.
                    own = sheet if line.size > _SMALLER * size else page.index
                    yield _Edge(line, page.index, own, is_apart, _is_title(line, size))


def _body_size(pages: Iterable[Sequence[Line]]) -> float:
    counts: Counter[float] = Counter()
    for lines in pages:
        for line in lines:
            counts[round(2 * line.size) / 2] += sum(len(word.text) for word in line.words)
    return max(counts, key=lambda size: counts[size], default=1.0)


def _is_title(line: Line, size: float) -> bool:
    return line.size > _LARGER * size or (line.is_bold and line.size > _BOLD_LARGER * size)


def _is_near_edge(line: Line, height: float, sign: int) -> bool:
    return (height - line.baseline if sign == 1 else line.baseline) <= _EDGE * height


def _rows(lines: Sequence[Line], sign: int) -> list[list[Line]]:
    """Lines on one height together, from the top for 1, from the bottom for -1."""
    rows: list[list[Line]] = []
    for line in sorted(lines, key=lambda line: -sign * line.baseline):
        if rows and abs(rows[-1][0].baseline - line.baseline) <= 0.5 * line.size:
            rows[-1].append(line)
        else:
            rows.append([line])
    return rows


def _sheets(pages: Sequence[_Page]) -> list[int]:
    """For each page the first one of which it is a step; most are no steps and have their own."""
    inner = [
        {
            (line.text, round(line.baseline))
            for line in lines
            if not any(_is_near_edge(line, page.height, sign) for sign in (1, -1))
        }
        for page, lines in pages
    ]
    # The bar at the side of slides is on most of them.
    counts = Counter(line for found in inner for line in found)
    inner = [{line for line in found if counts[line] <= max(2, _BAR_SHARE * len(pages))} for found in inner]
    sheets = [page.index for page, _ in pages]
    for number in range(1, len(pages)):
        before, own = inner[number - 1], inner[number]
        if before and own and len(before & own) >= _STEP_SHARE * min(len(before), len(own)):
            sheets[number] = sheets[number - 1]
    return sheets


def _without_titles(edges: Sequence[_Edge], offsets: set[int], pages: Sequence[_Page]) -> list[_Edge]:
    """The lines that are no titles; on an upright page a line that alone counts the page is none, large or not."""
    is_slide = {page.index: page.width > page.height for page, _ in pages}
    counted: dict[int, set[int]] = defaultdict(set)
    for edge in edges:
        if edge.bare is not None:
            counted[edge.page].add(edge.bare)

    def counts_page(edge: _Edge) -> bool:
        values = {number.value for number in edge.numbers} - counted[edge.page]
        return not is_slide[edge.page] and any(value - edge.page in offsets for value in values)

    return [edge for edge in edges if not edge.is_title or counts_page(edge)]


def _numbered(edges: Sequence[_Edge]) -> set[_Edge]:
    """Page numbers with nothing beside them."""
    counts = Counter(edge.bare - edge.page for edge in edges if edge.bare is not None)
    # A lone page's number is known if it is the page's place in the file.
    known = {offset for offset, count in counts.items() if count >= 2 or offset == 1}
    return {edge for edge in edges if edge.bare is not None and edge.bare - edge.page in known}


def _with_outer_number(edges: Sequence[_Edge]) -> set[_Edge]:
    """Lines of any words with the page number at their outer end."""
    groups: dict[tuple[int, int], list[_Edge]] = defaultdict(list)
    for edge in edges:
        if edge.is_apart and (number := outer_number(edge.line.text)) is not None:
            groups[number - edge.page, round(edge.line.baseline / 4)].append(edge)
    return set().union(*(group for group in groups.values() if len({edge.page for edge in group}) >= 2))


def _repeated(edges: Sequence[_Edge], offsets: set[int]) -> set[_Edge]:
    """Lines with the same words at the same place on several pages, page numbers aside."""
    groups: dict[tuple[str, int], list[_Edge]] = defaultdict(list)
    for edge in edges:
        for text in masked(edge.line.text.lower(), edge.numbers, edge.page, offsets):
            # Two lines less than two points apart are in one group at least.
            for step in (0, 1):
                groups[text, int(edge.line.baseline // 2) + step].append(edge)
    num_sheets = len({edge.sheet for edge in edges})
    found = [group for group in groups.values() if len({edge.sheet for edge in group}) >= min(2, num_sheets)]
    many = {edge for group in found if len({edge.page for edge in group}) >= _NUM_PAGES for edge in group}
    few = {edge for group in found if _are_close(group) for edge in group}
    places: dict[tuple[int, float, bool], set[int]] = defaultdict(set)
    for edge in many | few:
        places[edge.place].add(edge.sheet)
    needed = min(_NUM_PAGES, max(2, num_sheets // 2))
    return many | {edge for edge in few if len(places[edge.place]) >= needed}


def _are_close(edges: Sequence[_Edge]) -> bool:
    sheets = {edge.sheet for edge in edges}
    is_set_off = all(edge.is_apart or len(edge.line.words) >= _NUM_WORDS for edge in edges)
    return is_set_off and 0 < max(sheets) - min(sheets) <= _CLOSE


def _in_their_place(edges: Sequence[_Edge], heads: set[_Edge], num_pages: int) -> set[_Edge]:
    """Lines that stand where most pages have a head, on pages that have none there: one of a kind, as on the last."""
    pages: dict[tuple[int, float, bool], set[int]] = defaultdict(set)
    for edge in heads:
        pages[edge.place].add(edge.page)
    return {
        edge
        for edge in edges
        if edge.is_apart
        and edge.page not in pages[edge.place]
        and len(pages[edge.place]) >= max(2, _PLACE_SHARE * num_pages)
    }
