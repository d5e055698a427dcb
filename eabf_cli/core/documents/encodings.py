"""The encoding that bytes seem to have: of several that fit, the one in common use."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from charset_normalizer import CharsetMatch

_GUESSED_BYTES = 2**18
# In the order of preference; those from `_RARE` on only where they fit clearly better.
_COMMON = (
    *("cp1252", "cp1250", "cp1251", "koi8_r", "cp932", "euc_jp", "gb18030", "big5", "cp949"),
    *("cp1253", "cp1254", "cp1255", "cp1256", "iso8859_2", "cp1257"),
)
_RARE = ("cp850", "cp866", "mac_roman")
_CLEARLY_LESS_CHAOS = 0.1
# Letters beyond ASCII of the languages that are written in an encoding of the Latin alphabet.
_CENTRAL_EUROPEAN = (
    "ąćęłńóśźż",
    "áčďéěíňóřšťúůýž",
    "áäčďéíĺľňóôŕšťúýž",
    "áéíóöőúüű",
    "čćđšž",
    "ăâîşţ",
    "äöüß",
)
_WESTERN_EUROPEAN = (
    "äöüß",
    "àâæçéèêëîïôœùûüÿ",
    "áéíñóúüªº",
    "ãõáâàçéêíóôúüªº",
    "àèéìíîòóùú",
    "áàéèëïíóöúüç",
    "åäöéàü",
    "æøåéèêòóô",
    "áðéíóúýþæö",
    "õäöüšž",
    "çéèêëàâîôùûœ",
)
_LATIN_ALPHABETS = {
    "cp1252": _WESTERN_EUROPEAN,
    "cp1250": _CENTRAL_EUROPEAN,
    # U+0307 is what lower() makes of the dot of a capital I.
    "cp1254": ("çğıöşüâîû\u0307",),
    "iso8859_2": _CENTRAL_EUROPEAN,
    "cp1257": ("ąčęėįšųūž", "āčēģīķļņšūž", "õäöüšž"),
    "cp850": _WESTERN_EUROPEAN,
    "mac_roman": _WESTERN_EUROPEAN,
}
# As both glibc's iconv and GNU libiconv call it, where that is not Python's name with hyphens.
_CYRILLIC = ("cp1251", "koi8_r", "cp866")
# The commonest letters of Russian, which are more than half of any text in it.
_FREQUENT_CYRILLIC = frozenset("оеаинтсрвл")
_ICONV_NAMES = {"mac_roman": "MACINTOSH"}


def guess_encoding(data: bytes) -> str | None:
    """The encoding of a text that is neither ASCII nor Unicode, as iconv calls it; None where no guess is sound.

    charset-normalizer finds what the bytes may be. Encodings of the Latin alphabet differ in a few letters, which its
    statistics cannot tell from each other: of those the one wins whose letters make up one language's alphabet.
    Those of the Cyrillic alphabet mix up its letters: there the one wins that gives most of the common ones.
    """
    from charset_normalizer import from_bytes

    names = [*_COMMON, *_RARE]
    matches = from_bytes(data[:_GUESSED_BYTES], cp_isolation=names)
    found = {name: match for match in matches for name in match.could_be_from_charset if name in names}
    if not found:
        return None
    best = min(found, key=lambda name: (_chaos(name, found), -found[name].coherence, names.index(name)))
    if best in _LATIN_ALPHABETS:
        latin = [name for name in names if name in found and name in _LATIN_ALPHABETS]
        # max() takes the first of equals.
        best = max(latin, key=lambda name: round(_alphabet_share(str(found[name]), _LATIN_ALPHABETS[name]), 2))
    elif best in _CYRILLIC:
        cyrillic = [name for name in _CYRILLIC if name in found]
        best = max(cyrillic, key=lambda name: _frequent_share(str(found[name])))
    return _ICONV_NAMES.get(best, best.replace("_", "-").upper())


def _chaos(name: str, found: Mapping[str, CharsetMatch]) -> float:
    return found[name].chaos + (_CLEARLY_LESS_CHAOS if name in _RARE else 0.0)


def _frequent_share(text: str) -> float:
    """The part of a text's letters beyond ASCII that the commonest Cyrillic ones make up."""
    letters = [sign for sign in text.lower() if sign.isalpha() and not sign.isascii()]
    return sum(sign in _FREQUENT_CYRILLIC for sign in letters) / max(len(letters), 1)


def _alphabet_share(text: str, alphabets: tuple[str, ...]) -> float:
    """The part of a text's characters beyond ASCII that one language has; of quotation marks and the like all do."""
    odd = text.translate(dict.fromkeys(map(ord, string.printable)))
    signs = [sign for sign in odd.lower() if sign not in "“”„‘’‚–—…«»€£§°©®·¿¡"]
    if not signs:
        return 1.0
    return max(sum(sign in alphabet for sign in signs) for alphabet in alphabets) / len(signs)
