from __future__ import annotations

import pytest

from eabf_cli.core.documents.hyphens import Hyphenation

SOFT = "\u00ad"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["an exam" + SOFT, "ple of"], "an example of"),
        (["an exam-", "ple of"], "an example of"),
        (["a long-", "term plan"], "a long-term plan"),
        (["state-of-the" + SOFT, "art"], "state-of-the-art"),
        (["Entropy" + SOFT, "Aware"], "Entropy-Aware"),
        (["in 2019-", "2020"], "in 2019-2020"),
        (["pre" + SOFT, "and post-war"], "pre- and post-war"),
        (["a thous" + SOFT, "and times"], "a thousand times"),
        (["it is -", "as said"], "it is - as said"),
        (["no", "hyphen"], "no hyphen"),
        (["the end" + SOFT], "the end-"),
    ],
)
def test_a_hyphen_at_a_line_s_end_stays_where_the_document_has_it(lines: list[str], expected: str) -> None:
    elsewhere = ["the long-term view, a thousand words"]
    assert Hyphenation([*lines, *elsewhere]).join(lines) == expected
