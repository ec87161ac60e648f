r"""The spellings of a number: 1,000 and 10^3 are one number, and so are 1/2, \frac12 and 0.5."""

import re
from collections.abc import Callable
from decimal import Decimal, Inexact, localcontext
from fractions import Fraction

from haltwise.policy.answers.characters import NAME_LETTERS
from haltwise.policy.answers.words import AFTERNOON, FORENOON, MINUS, SCALE, SCALES

_Found = re.Match[str]
_Step = tuple[str, str | Callable[[_Found], str]]

# A number of more characters is compared as it is spelt: nobody asks for its value.
_LONGEST_NUMBER = 300

_OUTSIDE_NAMES = rf"(?<![{NAME_LETTERS}0-9_.])"
_SIZE = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3}){1,99}(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
#: A number in plain spelling. The base of a power is none by itself, but a number of degrees
#: (90^\circ) is one. A time of day or a ratio (5:30) is one number, too; 1.5.2 is none.
NUMBER = re.compile(
    rf"{_OUTSIDE_NAMES}(?<!\^)(?<!\^[-{{])(?<!\^\{{-)"
    r"(?>[0-9]{1,9}(?::[0-9]{1,9}){1,3}(?![0-9])|"
    rf"[-+]?(?:{_SIZE})(?:[eE][-+]?[0-9]{{1,3}}(?![0-9]))?(?:/[0-9]+)?)"
    r"(?!\s?\^(?!\s?\{?\\circ)|\.[0-9])"
)
_THIN = r"\\[,!;: ]"  # LaTeX's blanks
_SCALE_WORD = re.compile(SCALE, re.IGNORECASE)


def _digits(found: _Found) -> str:
    return re.sub(r"[^0-9]", "", found[0])


def _spaceless(found: _Found) -> str:
    return re.sub(_THIN, "", found[0])


def _ungrouped(number: str) -> str:
    return number.replace(",", "")


def _as_fraction(found: _Found) -> str:
    whole, top, digit, bottom, last_digit = found.groups()
    numerator = Fraction(_ungrouped(top or digit))
    divisor = Fraction(_ungrouped(bottom or last_digit))
    if divisor == 0 or (whole and numerator >= divisor):
        return found[0]  # no number; a product, or two numbers
    value = int(whole or 0) + numerator / divisor
    return f"{value.numerator}/{value.denominator}"


def _as_power_of_ten(found: _Found) -> str:
    is_factor = found.start() and not found[0].startswith("10")
    return f"{'' if is_factor else 1}e{found[1] or found[2]}"


def _as_bracket(found: _Found) -> str:
    """Returns a decimal with its repeating digits, which have a line above, in brackets."""
    return f"{found[1]}({re.sub(r'[^0-9]', '', found[2])})"


def _as_repeating(found: _Found) -> str:
    whole, first, *blocks = found.groups()
    return _repeating(whole, first, next(filter(None, blocks)))


def _repeating(whole: str, first: str, block: str) -> str:
    top = int(whole + first + block) - int(whole + first)
    return f"{top}/{10 ** len(first) * (10 ** len(block) - 1)}"


def _as_and_so_on(found: _Found) -> str:
    """Returns a decimal that ends in "..." as a fraction, if its last digits repeat."""
    whole, decimals = found.groups()
    for size in range(1, len(decimals) // 2 + 1):
        block, first = decimals[-size:], decimals
        while first.endswith(block):
            first = first[:-size]
        times = (len(decimals) - len(first)) // size
        if times >= (2 if size > 1 or not first else 3):
            return _repeating(whole, first, block)
    return found[0]


def _as_time_of_day(found: _Found) -> str:
    hour, minutes, half = found.groups()
    return f"{int(hour) % 12 + (12 if half in 'pP' else 0)}:{minutes}"


def _as_named_time(found: _Found) -> str:
    half, time = found.groups()
    return f"{time} {'p' if re.fullmatch(AFTERNOON, half) else 'a'}m"


def _as_scaled(found: _Found) -> str:
    """Returns 1.5 million as 1.5e6."""
    words = _SCALE_WORD.findall(found[3])
    zeros = sum(SCALES[word.strip().casefold()] for word in words)
    size = re.sub(r",(?=[0-9]{1,2}$)", ".", found[1])
    return f"{size}e{zeros}{found[2] or ''}"


def _as_part(found: _Found) -> str:
    return f" 1/{2 if found[1].casefold() == 'half' else 4}"


_ZEROS = {"K": 3, "M": 6, "B": 9}


def _as_money(found: _Found) -> str:
    sign, size, *letters = found.groups("")
    return f"{sign}{size}e{_ZEROS[''.join(letters)[0].upper()]}"


def _as_power(found: _Found) -> str:
    base, power = found[1], int(found[2] or found[3])
    if len(base) * abs(power) > _LONGEST_NUMBER or (power < 0 and not int(base)):
        return found[0]
    return str(int(base) ** power) if power >= 0 else f"1/{int(base) ** -power}"


def _with_a_point(found: _Found) -> str:
    return found[0].replace(".", "").replace(",", ".")


def _compiled(steps: list[_Step]) -> list[tuple[re.Pattern[str], str | Callable[[_Found], str]]]:
    return [(re.compile(pattern, re.IGNORECASE), plain) for pattern, plain in steps]


_WHOLE = rf"(?:{_OUTSIDE_NAMES}(?<!,)([0-9]{{1,30}})"
_BRACED = r"\{\s?(-?[0-9]{1,30}(?:,[0-9]{3}){0,9}(?:\.[0-9]{1,30})?)\s?\}"
_LINE = r"\\(?:overline|bar|dot)\s?"

# How numbers are made plain, one step after another, if it means the same in a formula.
_PLAIN = _compiled(
    [
        # {-}5 and -{5}; \cfrac; 3{,}5 and 0{,}125; 0.000\,001.
        (r"\{([-+])\}", r"\1"),
        (r"([-+]\s?)\{([0-9.]{1,30})\}", r"\1\2"),
        (r"\\(?:cfrac|[sn]icefrac|sfrac)(?![a-z])", r"\\frac"),
        (
            r"(?:(?<=[0-9])\{,\}(?=(?:[0-9]{1,2}|[0-9]{4,30})(?![0-9{]))|(?<=(?<![0-9])0)\{,\}(?=[0-9]))",
            ".",
        ),
        (
            rf"(?<![0-9])[0-9]{{1,30}}\.[0-9]{{3}}(?:{_THIN}[0-9]{{3}}){{0,9}}{_THIN}[0-9]{{1,3}}(?![0-9.])",
            _spaceless,
        ),
        # 1{,}000 and 1\,000; 1 000 and 1'000; other blanks; 5{:}30 and 5 : 30.
        (r"(?<=[0-9])(?:\{,\}(?=[0-9]{2})|,?\\[,!],?(?=[0-9]{3}))", ","),
        (rf"{_OUTSIDE_NAMES}[0-9]{{1,3}}(?:(?:\\?[ ~'_]|\\[;:])[0-9]{{3}})+(?![0-9/])", _digits),
        (r"\\[,;: ]|(?<=\S)~(?![0-9\s])|~(?=[0-9]{1,9}/)|\\q?quad(?![A-Za-z])", " "),
        (
            r"(?<=[0-9])(?:\s?\{:\}\s?|\s:\s|\\[!,]:\\[!,]|\s?\\colon(?![a-z])\s?)(?=[0-9])",
            ":",
        ),
        # US$ 3, Rp 3; minus 3; -$3, and x = - 3.
        (
            rf"(?<![{NAME_LETTERS}])(?:[A-Z]{{1,3}}\\?\$|(?-i:Rp|R[sM]|USD|EUR|GBP|CHF|INR)\.?)(?=[0-9])",
            " ",
        ),
        (
            rf"(?<![0-9])(?<![0-9]\s){MINUS}(?=[0-9])",
            "-",
        ),
        (r"([-+])\s?\\?[$\u20ac\u00a3\u00a5]\s?(?=[.0-9])", r"\1"),
        (r"((?:^|[=({:])\s{0,9})-\s{1,9}(?=[.0-9])", r"\1-"),
        (r"(?<![0-9])\.(?=[0-9]{0,30}\\(?:overline|bar|dot))", "0."),
        (r"(?<![0-9.,])0,(?=[0-9]{2,99}\s?(?:\.{3}|\u2026|\\[lc]?dots))", "0."),
        (r"([0-9]{1,30})\.()([0-9]{1,30})\s(?:recurring|repeating)(?!\w)", _as_repeating),
        # 0.16 with a line above the 6; 0.1\dot{6}, 0.1\overline{6} and 0.1(6); 0.1666...
        ("([0-9]\\.[0-9]{0,30}?)((?:[0-9][\u0304\u0305\u0307]){1,30})", _as_bracket),
        (r"\\dot\s?\{?([0-9])\}?([0-9]{0,30})\\dot\s?\{?([0-9])\}?", r"(\1\2\3)"),
        (
            rf"([0-9]{{1,30}})(?:[.,]|\{{,\}})([0-9]{{0,30}})(?:{_LINE}(?:\{{\s?([0-9]{{1,30}})\s?\}}|([0-9]))|"
            r"\(([0-9]{1,30})\))",
            _as_repeating,
        ),
        (r"([0-9]{1,30})\.([0-9]{2,99})\s?(?:\.{3}|\u2026|\\[lc]?dots)", _as_and_so_on),
        # 2 and a half.
        (r"(?<=[0-9])\sand\s(?:a|one)\s(half|quarter)(?!\w)", _as_part),
        # 12th and 12^{th}.
        (r"(?<=[0-9])\s?\^?\s?\{?\s?(?:st|nd|rd|th)\b\s?\}?", ""),
        # 1.5 \times 10^3, and 10^3 by itself.
        (
            r"(?:(?<=[0-9])\s?(?:\\times|\\cdot|[\u00d7\u00b7\u22c5x*])\s?|(?<![\w.]))10\s?\^\s?"
            r"(?:[{(]\s?([-+]?[0-9]{1,3})\s?[})]|([-+]?[0-9]{1,3}))(?![0-9])",
            _as_power_of_ten,
        ),
        # 3{\frac12}; 5 / 8.
        (r"(?<=[0-9])\s{0,3}/\s{0,3}(?=[0-9])", "/"),
        (
            r"(?<=[-+0-9])\s?\{\s?(\\[dt]?frac\s?(?:\{[0-9\s]{1,30}\}|[0-9])\s?(?:\{[0-9\s]{1,30}\}|[0-9]))\s?\}",
            r"\1",
        ),
        # \frac12 and 3\frac{1}{2}, 3 1/2, 5:30 pm, 1.5 million.
        (
            rf"{_WHOLE}\s?)?\\[dt]?frac\s?(?:{_BRACED}|([0-9]))\s?(?:{_BRACED}|([0-9]))",
            _as_fraction,
        ),
        (
            rf"{_WHOLE}\s{{1,3}}(?:and\s)?)([0-9]{{1,30}})()/([0-9]{{1,30}})()(?![0-9])",
            _as_fraction,
        ),
        # -(2/3).
        (r"-\s?(?:\\left)?\(\s?([0-9./]{1,60})\s?(?:\\right)?\)(?!\s?\^)", r"-\1"),
        # 15h30 and 15.30 Uhr.
        (
            r"(?<![0-9:.,])(1[0-9]|2[0-3]|0?[0-9])(?:h(?=[0-9]{2}(?:min)?(?![0-9a-z]))|"
            r"[\u65f6\u6642\u70b9\u9ede\uc2dc]\s?(?=[0-9]{2}\s?[\u5206\ubd84])|\.(?=[0-9]{2}\sUhr))"
            r"([0-5][0-9])(?:min|\s?[\u5206\ubd84]|\sUhr)?",
            r"\1:\2",
        ),
        (rf"({FORENOON}|{AFTERNOON})\s?([0-9]{{1,2}}:[0-5][0-9])(?![0-9:])", _as_named_time),
        (
            r"(?<![0-9:.,])(1[0-9]|2[0-3]|0?[0-9])[:.]([0-5][0-9])\s{0,3}([ap])\.?m\b\.?",
            _as_time_of_day,
        ),
        (
            rf"(?<![0-9,./e])((?>[0-9]{{1,30}},[0-9]{{1,2}}(?![0-9])|{_SIZE}))((?>/[0-9]+))?((?:{SCALE}){{1,3}})(?!\s?[0-9])",
            _as_scaled,
        ),
    ]
)
# The same, if it would mean something else in a formula.
_PLAIN_OUTSIDE_FORMULAS = _compiled(
    [
        # x_1, 1011_2.
        (r"(?<=[A-Za-z0-9)])_(?:\{[^{}]{0,20}\}|[0-9A-Za-z])", ""),
        # 1.000.000 and 1.234,5; 1,00,000; 3,5.
        (
            rf"{_OUTSIDE_NAMES}(?<!,)[0-9]{{1,3}}(?:(?:\.[0-9]{{3}}){{2,9}}(?:,[0-9]{{1,9}})?|"
            r"\.[0-9]{3},[0-9]{1,9})(?![0-9])",
            _with_a_point,
        ),
        (rf"{_OUTSIDE_NAMES}(?<!,)[0-9]{{1,2}}(?:,[0-9]{{2}}){{1,9}},[0-9]{{3}}(?![0-9])", _digits),
        (
            rf"{_OUTSIDE_NAMES}(?<![,(\[{{])([0-9]{{1,30}}),([0-9]{{1,2}}|[0-9]{{4,30}}|(?<=(?<![0-9])0,)[0-9]{{3}})"
            r"(?![0-9,)\]}]|\.[0-9])",
            r"\1.\2",
        ),
        # 5 \div 8; $5M and $5bn.
        (r"(?<=[0-9])\s?(?:\u00f7|\\div(?![a-z]))\s?(?=[0-9])", "/"),
        (
            rf"([$\u20ac\u00a3\u00a5]\s?)((?>{_SIZE}))\s?(?-i:([KMB])|(mn|bn))(?![\w$])",
            _as_money,
        ),
        # 10k, but 10 K are a temperature.
        (rf"(?<![{NAME_LETTERS}0-9_.,/])({_SIZE})(?-i:k)(?![\w/'])", r"\1e3"),
        # 2^{10}.
        (
            rf"{_OUTSIDE_NAMES}(?<![\^)}}])([0-9]{{1,30}})\s?\^\s?"
            r"(?:\{\s?(-?[0-9]{1,3})\s?\}|([0-9]{1,3}))(?![\w.])",
            _as_power,
        ),
    ]
)


def plain_numbers(text: str, is_formula: bool = False) -> str:
    r"""Returns a text with its numbers in plain spelling: 1e3, 1/2 and 1,000.

    Args:
        text: A text in plain characters, without styles.
        is_formula: If 2^{10}, x_1 and (3,5) are to stay what they are.
    """
    for pattern, plain in _PLAIN if is_formula else _PLAIN + _PLAIN_OUTSIDE_FORMULAS:
        text = pattern.sub(plain, text)
    return text


def exact_value(number: str) -> str:
    """Returns the spelling that equal numbers share: as a decimal if it is finite and short.

    Args:
        number: What `NUMBER` has found.

    Returns:
        The spelling; "" if it is divided by zero.
    """
    if ":" in number:
        first, _, rest = number.partition(":")
        return f"{int(first)}:{rest}"
    number = number.replace(",", "")
    if len(number) > _LONGEST_NUMBER:
        return number
    top, _, bottom = number.partition("/")
    try:
        value = Fraction(top) / Fraction(bottom or 1)
    except ZeroDivisionError:
        return ""
    with localcontext(prec=60) as context:
        context.traps[Inexact] = True
        try:
            decimal = Decimal(value.numerator) / Decimal(value.denominator)
        except Inexact:
            return str(value)
    return str(value) if value.denominator == 1 else f"{decimal:f}"
