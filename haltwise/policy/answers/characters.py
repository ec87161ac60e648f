"""Characters that are written in several ways, in one: what an answer is does not hang on them."""

import re
import unicodedata
from functools import lru_cache

#: The letters beside which digits are a part of a name (x2), for a character class. Scripts without
#: blanks between words are not among them: there, digits beside a letter are a number.
NAME_LETTERS = r"A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0370-\u052f"

_SAME = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2010\u2012\u2013\u02d7\u2796\u2043", "-"),
        **dict.fromkeys("\u2018\u2019\u02bb\u02bc\u2032", "'"),
        **dict.fromkeys("\u2044\u2215", "/"),
        **dict.fromkeys("\u066c\u060c", ","),
        "\u2236": ":",
        "\u066a": "%",
        "\u066b": ".",
        "\u00ba": "\u00b0",
        **dict.fromkeys("\ufe0f\u20e3", ""),  # the frame around the digit of a key
    }
)
_RAISED = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b\u207f\u2071]+")
_LOWERED = re.compile("[\u2080-\u2089\u208a\u208b]+")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_SHAPES = {"<wide>", "<narrow>", "<small>", "<circle>", "<square>", "<noBreak>", "<vertical>"}


@lru_cache(maxsize=4096)
def _plain(character: str) -> str:
    """Returns the plain form of one character that is not ASCII."""
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category in ("Cf", "Zs"):  # Marks of writing direction and the like; all sorts of blanks.
        return "" if category == "Cf" else " "
    shape = unicodedata.decomposition(character).partition(" ")[0]
    # The letters of sets, such as that of the real numbers, are more than letters in a font.
    is_shape = (
        shape in _SHAPES
        or (shape == "<font>" and character >= "\U0001d400")
        or (shape == "<compat>" and category != "Lo")  # those are letters of their own
    )
    if shape == "<fraction>":
        return " " + unicodedata.normalize("NFKC", character).translate(_SAME)
    return unicodedata.normalize("NFKC", character) if is_shape else character


def _shifted(sign: str, found: re.Match[str]) -> str:
    inner = unicodedata.normalize("NFKC", found[0]).translate(_SAME)
    return f"{sign}{inner}" if len(inner) == 1 else f"{sign}{{{inner}}}"


def plain_characters(text: str) -> str:
    """Returns a text in plain characters.

    Digits of all scripts, full-width and circled forms and letters in mathematical fonts become
    ASCII; so do minus signs, short dashes, apostrophes, blanks, raised and lowered digits
    (^2, _2) and fractions (1/2). Invisible characters are lost; the rest is in NFC.
    """
    if text.isascii():
        return text
    text = unicodedata.normalize("NFC", text)
    text = _RAISED.sub(lambda found: _shifted("^", found), text)
    text = _LOWERED.sub(lambda found: _shifted("_", found), text)
    text = _NOT_ASCII.sub(lambda found: _plain(found[0]), text).translate(_SAME)
    return unicodedata.normalize("NFC", text)


def caseless(text: str) -> str:
    """Returns a text without upper case, so that texts that differ in case alone are equal."""
    folded = unicodedata.normalize("NFD", text).casefold()
    return unicodedata.normalize("NFC", folded)
