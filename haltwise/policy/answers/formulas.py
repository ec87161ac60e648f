r"""Formulas in LaTeX, in a spelling that most equal ones share."""

import re

from haltwise.policy.answers.characters import plain_characters
from haltwise.policy.answers.number_spellings import NUMBER, exact_value, plain_numbers
from haltwise.policy.answers.places import unstyled

_SIGNS = str.maketrans(
    {
        "\u221e": r"\infty ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ",
        "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ", "\u00f7": r"\div ",
        "\u00b1": r"\pm ", "\u03c0": r"\pi ", "\u222a": r"\cup ", "\u2229": r"\cap ",
        "\u2208": r"\in ", "\u00b0": r"^\circ ", "\u211d": r"\mathbb{R}", "\u2205": r"\emptyset ",
    }
)  # fmt: skip
_ROOT = re.compile("\u221a([0-9]{1,30}|[A-Za-z])")
_JOINT = re.compile(
    r",?\s{0,9}\\(?:text|mathrm|mbox)\s?\{\s{0,9},?\s{0,9}(?:or|and)\s{0,9}\}\s{0,9}|"
    r"(?<=[0-9)}])\s{1,9}(?:or|and)\s{1,9}(?=[-+0-9(\\])"
)
_ROW_END = re.compile(r"\\\\(?:\s?\[[0-9][^\]]{0,9}\])?")
_LAST_ROW_END = re.compile(r"\\\\\s{0,9}(?=\\end)")
_SPACING = re.compile(
    r"(?:\\(?:left|right|displaystyle|q?quad)(?![A-Za-z])|\\[!,;: ]|\\?\$|[\s~]){1,99}"
)
_KEPT_BLANK = re.compile(r"(\\[A-Za-z]{1,20} (?=[A-Za-z]))| ")
# 1, 234 is a list, and no number.
_NEXT_IN_LIST = re.compile(r"(?<=[0-9],)(?=[0-9]{3}(?![0-9]))")
_SIGN_BEHIND = re.compile(r"\s?(?:\\?%|\^\s?\{?\s?\\circ\s?\}?\s?[CFK]?)$")
_GROUPED = re.compile(r"(?<![0-9])[0-9]{1,3}(?:(?:\{,\}|,?\\[,!],?|\\ )[0-9]{3})+(?![0-9])")
# 60\frac{\text{km}}{\text{h}}
_UNIT_FRACTION = re.compile(
    r"(?<=[0-9\s}])\\[dt]?frac\s?\{\s?\\(?:text|mathrm)\{([^{}]{1,20})\}\s?\}\s?"
    r"\{\s?\\(?:text|mathrm)\{([^{}]{1,20})\}\s?\}"
)
_NATURAL_LOG = re.compile(r"\\log_\s?(?:e|\{\s?e\s?\})")
_DEGREE = re.compile(r"\\degree(?![a-z])")
_SYNONYMS = [
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\(?:[dtc]|[sn]ice|s)frac(?![a-z])", r"\\frac"),
        (r"\{([-+])\}", r"\1"),
        (r"\\(frac|binom)([0-9])([0-9])", r"\\\1{\2}{\3}"),
        (r"(\\sqrt\[[^\[\]]{1,9}\])([0-9A-Za-z])", r"\1{\2}"),
        (r"([\^_])\{([0-9A-Za-z])\}(?![0-9A-Za-z])", r"\1\2"),
        (r"\\(pmod|vec|hat|bar)\s?([0-9]+|[A-Za-z])", r"\\\1{\2}"),
        (r"\\varnothing(?![A-Za-z])|\\\{\\\}", r"\\emptyset"),
    )
]
# A number and what it measures: any words in \text{...}; otherwise a unit, or words of 4 letters.
_SHORT_UNITS = "cm|mm|km|kg|mg|ml|km/h|m/s|ft|mi|lbs?|oz|hrs?|mins?|sec|mph|usd|eur"
_MEASURED = re.compile(
    r"(.{1,99}?)(?:\\(?:text|mathrm|mbox)\s?\{[\s~]{0,9}([A-Za-z][^{}0-9\\]{0,40}?)\s{0,9}\}|"
    rf"(?<=[0-9\s~}}])((?:{_SHORT_UNITS})|[A-Za-z]{{4,20}}(?:\s[A-Za-z]{{2,20}}){{0,3}}))"
    r"\s?(?:\^\s?\{?\s?([23])\s?\}?)?[\s.]*"
)
_MEASURE = re.compile(r"(.+)(\\text\{[^{}]*\}(?:\^[23])?)")
_SAME_UNIT = {
    "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km", "centimeter": "cm",
    "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "gram": "g", "kilogram": "kg",
    "liter": "l", "litre": "l", "hour": "h", "hr": "h", "minute": "min", "second": "s", "sec": "s",
    "foot": "ft", "feet": "ft", "inche": "inch", "in": "inch", "mile": "mi", "pound": "lb",
    "lb": "lb", "yard": "yd", "ounce": "oz", "degree": "", "percent": "", "unit": "",
    "radian": "rad", "mile per hour": "mph", "kilometer per hour": "km/h",
    "meter per second": "m/s",
}  # fmt: skip
_UNITS = frozenset([*_SAME_UNIT.values(), "day", "week", "year", "dollar"])


def _unit(words: str, power: str | None) -> str:
    r"""Returns the one name of a unit: \text{cm}^2 for square centimeters."""
    words = " ".join(words.casefold().strip(" .").split())
    for prefix, exponent in (("square ", "2"), ("sq ", "2"), ("cubic ", "3")):
        if words.startswith(prefix):
            words, power = words.removeprefix(prefix), exponent
    words = words.replace("s per ", " per ")
    name = words.removesuffix("s") if len(words) > 2 else words
    name = _SAME_UNIT.get(name, name)
    return f"\\text{{{name}}}" + (f"^{power}" if power else "") if name else ""


def measure(formula: str) -> tuple[str, str]:
    """Returns the number of a formula as `normal_latex` gives it, and what is measured.

    What is measured is "" if the formula does not say so.
    """
    found = _MEASURE.fullmatch(formula)
    return (found[1], found[2]) if found else (formula, "")


def _number(text: str) -> str:
    """Returns the value of a text that is a number, with or without a currency, or ""."""
    plain = _SPACING.sub(" ", plain_numbers(text, is_formula=True)).strip().rstrip(" .")
    number = NUMBER.fullmatch(_SIGN_BEHIND.sub("", plain))
    return exact_value(number[0]) if number else ""


def _normal_row(text: str) -> str:
    number = _number(unstyled(text))
    if number:
        return number
    found = _MEASURED.fullmatch(text.strip(" $")) or _MEASURED.fullmatch(unstyled(text))
    if found:
        unit = _unit(found[2] or found[3], found[4])
        number = _number(unstyled(found[1]))
        if number:
            return number + unit
        if found[2] and (not unit or unit.removeprefix(r"\text{").partition("}")[0] in _UNITS):
            return _normal_row(found[1]) + unit
    text = _GROUPED.sub(lambda digits: re.sub(r"[^0-9]", "", digits[0]), unstyled(text))
    parts = _SPACING.sub(" ", text).strip().rstrip(".").split(", ")
    text = ",".join(_KEPT_BLANK.sub(r"\1", part) for part in parts)
    if len(parts) > 1 and not re.search(r"[()\[\]{}]", text):
        text = _NEXT_IN_LIST.sub(" ", text)
    for pattern, plain in _SYNONYMS:
        text = pattern.sub(plain, text)
    return text.casefold() if re.fullmatch(r"[^\W\d_]{3,}[0-9]*|(?i:no|on|yes|ok)", text) else text


def normal_latex(answer: str) -> str:
    r"""Returns a spelling that most equal formulas share.

    Blanks, dollar signs, \left, \right, \text, the size of fractions and a final full stop do
    not matter. Nothing is calculated but plain numbers. A number with words behind it keeps them,
    as in 36\text{cm}^2.
    """
    answer = _DEGREE.sub(r"^\\circ ", _NATURAL_LOG.sub(r"\\ln ", answer))
    text = plain_characters(_ROOT.sub(r"\\sqrt{\1}", answer.translate(_SIGNS)))
    text = _UNIT_FRACTION.sub(r"\\text{\1/\2}", _JOINT.sub(", ", text))
    return r"\\".join(map(_normal_row, _ROW_END.split(_LAST_ROW_END.sub("", text))))
