"""Page numbers as people write them: "3", "1-3,7", "5-"."""

from __future__ import annotations

import re

from eabf_cli.core.errors import InvalidConfigError

_RANGE = re.compile(r"\s*(\d*)\s*(-?)\s*(\d*)\s*")


def parse_page_ranges(pages: str | None, num_pages: int, name: str) -> list[int]:
    """The 0-based pages that are meant, in the order of the document, each once; None means all.

    Args:
        pages: ranges of 1-based page numbers, separated by commas; a range may lack its beginning or its end.
        num_pages: how many pages the document has.
        name: the document, for messages.

    Raises:
        InvalidConfigError: not of this form, or a page that does not exist.
    """
    if pages is None:
        return list(range(num_pages))
    chosen: set[int] = set()
    for part in pages.split(","):
        match = _RANGE.fullmatch(part)
        if match is None or not (match[1] or match[3]):
            raise InvalidConfigError(
                f"--pages {pages}: {part.strip()!r} is no page or range: write 3, 1-8, 1-3,7 or 5-"
            )
        first = int(match[1] or 1)
        last = int(match[3] or num_pages) if match[2] else first
        if not 1 <= first <= num_pages or not 1 <= last <= num_pages:
            raise InvalidConfigError(f"--pages {pages}: {name} has {num_pages:,} pages, numbered from 1")
        if last < first:
            raise InvalidConfigError(f"--pages {pages}: the range {part.strip()} ends before it begins")
        chosen.update(range(first - 1, last))
    return sorted(chosen)
