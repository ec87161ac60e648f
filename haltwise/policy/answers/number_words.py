"""Numbers that are written in words, in English and in Chinese characters, by their value."""

import re
from fractions import Fraction

from haltwise.policy.answers.number_spellings import exact_value
from haltwise.policy.answers.words import SCALES

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
_ORDINALS = "third fourth fifth sixth seventh eighth ninth tenth"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_SMALL = {word: value for value, word in enumerate(_ONES.split())} | {
    word: 10 * value for value, word in enumerate(_TENS.split(), start=2)
}
_PARTS = {"half": 2, "halve": 2, "quarter": 4} | {
    word: value for value, word in enumerate(_ORDINALS.split(), start=3)
}
_DIGITS = dict(
    zip("零〇一二两兩三四五六七八九", [0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 7, 8, 9], strict=True)
)
_PLACES = {"十": 10, "百": 100, "千": 1_000, "万": 10_000, "萬": 10_000, "亿": 10**8, "億": 10**8}

_END = re.compile(r"[.;!(\n\u2014\u3002]|,?\s(?:because|since|as|which)\s|,\snot\s", re.IGNORECASE)
_SIGN = re.compile(r"(?:minus|negative)\s|[负負]", re.IGNORECASE)
_CHARACTERS = re.compile(f"[{''.join(_DIGITS)}{''.join(_PLACES)}]{{1,20}}")


def number_in_words(text: str) -> str:
    """Returns the value of a text that is a number in words, up to a remark behind it.

    Args:
        text: A text in plain characters, without styles.

    Returns:
        Its value, as `exact_value` spells it; "" if it is anything else.
    """
    told = _END.split(text.strip(" \n*_$\"'`"))[0].strip(" *_$\"'`")
    sign = _SIGN.match(told)
    size = told[sign.end() :] if sign else told
    value = _in_characters(size) if _CHARACTERS.fullmatch(size) else _in_english(size)
    if value is None:
        return ""
    return exact_value(str(-value if sign else value))


def _in_english(text: str) -> Fraction | None:
    words = re.split(r"[\s-]+", text[:200].casefold())
    name = words[-1].removesuffix("s")
    if name not in _PARTS:
        return _cardinal(words)
    before, _, top = " ".join(words[:-1]).rpartition(" and ")
    whole = _cardinal(before.split()) if before else Fraction(0)
    numerator = _cardinal(top.split()) if top or name != "half" else Fraction(1)
    # Twenty third is no fraction.
    if whole is None or numerator is None or (numerator != 1 and words[-1] == name):
        return None
    return whole + numerator / _PARTS[name]


def _cardinal(words: list[str]) -> Fraction | None:
    """Returns the value of words such as one, hundred, and, five."""
    if not words:
        return None
    if words[0] in ("a", "an"):
        words = ["one", *words[1:]]
    total, group, room = 0, 0, 100
    for word, next_word in zip(words, [*words[1:], ""], strict=True):
        if _SMALL.get(word, room) < room:
            group += _SMALL[word]
            room = 10 if _SMALL[word] >= 20 else 0
        elif word == "hundred" and 0 < group < 100:
            group, room = 100 * group, 100
        elif SCALES.get(word, 0) > 2 and group:
            total, group, room = total + group * 10 ** SCALES[word], 0, 100
        elif word != "and" or not group + total or not next_word:
            return None
    return Fraction(total + group)


def _in_characters(text: str) -> Fraction:
    if not set(text) & set(_PLACES):  # 二〇二四
        return Fraction("".join(str(_DIGITS[character]) for character in text))
    total = group = digit = 0
    for character in text:
        place = _PLACES.get(character, 0)
        if place >= 10_000:
            total, group, digit = total + (group + digit or 1) * place, 0, 0
        elif place:
            group, digit = group + (digit or 1) * place, 0
        else:
            digit = _DIGITS[character]
    return Fraction(total + group + digit)
