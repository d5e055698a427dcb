from __future__ import annotations

import pytest

from eabf_cli.core.documents.broken_fonts import describe_broken_fonts, without_foreign_signs


@pytest.mark.parametrize(
    "word", ["di!culties", 'e"ect', "e#cient", "o$er", "di\ufffdculties", "\ue001nding", "e\uf001ect"]
)
def test_spoiled_words_are_told(word: str) -> None:
    (warning,) = describe_broken_fonts([(1, "sound words"), (7, f"more {word} here {word}")])
    assert repr(word) in warning
    assert "on page 7" in warning
    # One alone may be meant.
    assert describe_broken_fonts([(7, word)]) == []


@pytest.mark.parametrize(
    "text",
    [
        'don\'t so-called and/or e.g. it\'s 3.5% AT&T R&D C# F# #1 $5 x! Yahoo! "quoted" ("x") n! a*b 2*x',
        "https://a.example/x?y=1&z=%20#part user@example.org a_b x+y \ufffd \u03b8\ufffdx",
        "\u4f60\u597d! \u00dcber\u00e9! na\u00efve",
    ],
)
def test_sound_words_are_not(text: str) -> None:
    assert describe_broken_fonts([(1, f"{text} {text}")]) == []


def test_signs_of_a_font_stay_in_words_only() -> None:
    assert without_foreign_signs("\uf8eex\ufffd") == "x"
    assert without_foreign_signs("e\ufffdect") == "e\ufffdect"
    assert without_foreign_signs("\uf0b7") == "\u2022"
