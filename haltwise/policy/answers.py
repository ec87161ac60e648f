"""Reading the answer that an LM gives after its thought: the same in training and in serving.

An answer rule is a function that reads an answer from a text; `READERS` has them all by name. A new
rule is an entry there: without more, two answers are equal if it reads the same from both.
"""

import re
import string
import unicodedata
from collections.abc import Callable
from decimal import Decimal, Inexact, localcontext
from fractions import Fraction

_BOXED = re.compile(r"\\boxed\s*\{")
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?")

_BLANKS = r"[\s*_]*"
# Here bold type may end, or begin; a single star or underscore may be a part of the answer.
_BOLD = r"(?:\*\*)?\s*(?:\*\*(?=\S))?"
_MARK = re.compile(rf"\banswer{_BLANKS}:{_BOLD}", re.IGNORECASE)
_STYLED = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf)|mbox)\s*\{([^{}]*)\}")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")

_SIZE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
# The base of a power is no number by itself, but a number of degrees (90^\circ) is one.
_EXACT = re.compile(
    rf"(?<![\w.^])(?<!\^\{{)"
    rf"(?>[-+]?(?:{_SIZE})(?:[eE][-+]?[0-9]{{1,3}}(?![0-9]))?(?:/[0-9]+)?)"
    rf"(?!\s?\^(?!\s?\{{?\\circ))"
)
_PARTED = re.compile(r"(?<=[0-9])(?:\{,\}|,?\\[,!],?|\u202f|\u2009)(?=[0-9]{3})")
_SIGNED = re.compile(r"([-+])\s?\\?[$\u20ac\u00a3\u00a5]\s?(?=[.0-9])")
_LOOSE_SIGN = re.compile(r"((?:^|[=({:])\s*)-\s+(?=[.0-9])")
_WHOLE = r"(?:(?<![\w.,])([0-9]{1,30})"
_FRACTION = re.compile(
    _WHOLE + r"\s*)?\\[dt]?frac\s*(?:\{\s*(-?[0-9]{1,30})\s*\}|([0-9]))"
    r"\s*(?:\{\s*([0-9]{1,30})\s*\}|([0-9]))"
)
_MIXED = re.compile(_WHOLE + r"\s+)([0-9]{1,30})()/([0-9]{1,30})()(?![0-9])")
_POWER = re.compile(
    r"(?:(?<=[0-9])\s*(?:\\times|\\cdot|[\u00d7x*])\s*|(?<![\w.]))10\s*\^\s*"
    r"(?:\{\s*([-+]?[0-9]{1,3})\s*\}|([-+]?[0-9]{1,3}))(?![0-9])"
)
# A number of more characters is compared as it is spelt: nobody asks for its value.
_LONGEST_NUMBER = 300

_SAID = re.compile(
    rf"(?i:\b(?:answer|(?:correct|best|right)\s(?:choice|option))\b{_BLANKS}(?:is\b|:)"
    r"[\s*_:]{0,8}(?:(?:option|choice)\s)?)[\s*_$(\[\"']{0,8}([A-Z]\b(?!')|[a-z](?=\)))"
)
_ALONE = re.compile(r"\W*([A-Za-z])(?:\W*|[.):\]]\W*\s.*)")
_BARE = re.compile(r"\W*([A-Za-z])\W*")
_IN_BRACKETS = re.compile(r"\(([A-Z])\)")

_FORMULA = re.compile(r"\$([^$]+)\$")
_CONCLUDED = re.compile(rf"\banswer{_BLANKS}(?:is\b(?:\s*(?:\*\*)?\s*:)?|:){_BOLD}", re.IGNORECASE)
_SPACING = re.compile(r"\\(?:left|right)(?![A-Za-z])|\\[!,;: ]|\\?\$|\s")
_SHORT_FRACTION = re.compile(r"\\frac([0-9])([0-9])")


def _boxed(text: str, may_be_open: bool = False) -> str | None:
    """Returns what is in the last boxed{...}, with balanced braces; None if there is none.

    Args:
        text: The decoded text, without special tokens.
        may_be_open: If nothing closes the last one, the rest of its line is what is in it.
    """
    starts = [match.end() for match in _BOXED.finditer(text)]
    if not starts:
        return None
    depth = 1
    for i in range(starts[-1], len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[starts[-1] : i]
    return text[starts[-1] :].partition("\n")[0] if may_be_open else None


def canonical(answer: str) -> str:
    """Returns the one spelling that equal answers share.

    Case, outer blanks, dollar signs, a final full stop and runs of blanks do not matter. A number
    loses its thousands separators, plus sign, leading zeros and decimals that are zero at its
    end. Nothing is calculated: 1/2 and 0.5 stay different.
    """
    text = " ".join(answer.replace("\u2212", "-").casefold().split()).strip(" $.")
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    number = re.fullmatch(r"([-+]?)0*(\d+)(?:\.(\d*?)0*)?", text)
    if number is None:
        return text
    sign, whole, decimals = number.groups()
    size = f"{whole}.{decimals}" if decimals else whole
    return f"-{size}" if sign == "-" and size != "0" else size


def read_answer(text: str) -> str:
    """Reads the answer from the text generated after the close text.

    The last boxed answer counts. If there is none, the last number does, and if there is no number
    either, a word that stands alone.

    Args:
        text: The decoded text, without special tokens.

    Returns:
        The canonical answer, or "" if none can be read.
    """
    boxed = _boxed(text)
    if boxed is not None:
        return canonical(boxed)
    numbers = _NUMBER.findall(text.replace("\u2212", "-"))
    if numbers:
        return canonical(numbers[-1].rstrip(","))
    words = text.split()
    return canonical(words[0]) if len(words) == 1 else ""


def _unstyled(text: str) -> str:
    """Returns a text without LaTeX's text{...} and mathrm{...} around its parts."""
    return _STYLED.sub(r"\1", text)


def _lines(text: str) -> list[str]:
    """Returns the lines that are not blank, stripped."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_strict(text: str) -> str:
    """Reads an answer as it stands: nothing but outer blanks is lost.

    The answer is what follows the last "Answer:", or else the last "answer is", up to the end of
    its line. If the text has neither, it is the last line. If there is a boxed answer in that
    place, it is that one.

    Args:
        text: The decoded text, without special tokens.

    Returns:
        The answer, or "" if none can be read.
    """
    marks = list(_MARK.finditer(text)) or list(_CONCLUDED.finditer(text))
    said = text[marks[-1].end() :] if marks else text
    boxed = _boxed(said, may_be_open=True)
    if boxed is not None:
        return _unstyled(boxed).strip()
    lines = _lines(said)
    if marks and lines:
        return lines[0].removesuffix("**")
    return lines[-1] if lines else ""


def normal_text(answer: str) -> str:
    """Returns the spelling that equal short texts share.

    It is in lower case and has no punctuation, articles and runs of blanks, as in SQuAD's exact
    match (Rajpurkar et al., 2016, arXiv:1606.05250). A minus sign and a decimal point are lost too.
    """
    kept = "".join(
        letter for letter in answer.lower()
        if letter not in string.punctuation and unicodedata.category(letter)[0] != "P"
    )  # fmt: skip
    return " ".join(_ARTICLES.sub(" ", kept).split())


def read_text(text: str) -> str:
    """Reads an answer in words, in the place where `read_strict` finds it.

    Args:
        text: The decoded text, without special tokens.

    Returns:
        The answer in normal spelling, or "" if none can be read.
    """
    return normal_text(read_strict(text))


def _as_fraction(found: re.Match[str]) -> str:
    whole, top, digit, bottom, last_digit = found.groups()
    divisor = int(bottom or last_digit)
    return f"{int(whole or 0) * divisor + int(top or digit)}/{divisor}"


def _plain_numbers(text: str) -> str:
    """Returns a text with its numbers in plain spelling: 1e3, 1/2 and 1,000."""
    text = _PARTED.sub(",", text.replace("\u2212", "-"))
    text = _LOOSE_SIGN.sub(r"\1-", _SIGNED.sub(r"\1", text))
    text = _MIXED.sub(_as_fraction, _FRACTION.sub(_as_fraction, text))

    def shifted(found: re.Match[str]) -> str:
        is_factor = found.start() and not found[0].startswith("10")
        return f"{'' if is_factor else 1}e{found[1] or found[2]}"

    return _POWER.sub(shifted, text)


def _spelt(number: str) -> str:
    """Returns the spelling that equal numbers share: as a decimal if it is finite and short."""
    if len(number) > _LONGEST_NUMBER:
        return canonical(number)
    top, _, bottom = number.replace(",", "").partition("/")
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


def read_number(text: str) -> str:
    r"""Reads the last number of the last boxed answer, or of the whole text if nothing is boxed.

    Thousands separators, currency and percent signs do not matter, and the exact value counts:
    1,000 and 1000.0 and 10^3 are one number, and so are 1/2 and \frac{1}{2} and 0.5. 50 % is 50.

    Args:
        text: The decoded text, without special tokens.

    Returns:
        The number as a decimal, or as p/q if that is long; "" if there is none.
    """
    boxed = _boxed(text, may_be_open=True)
    numbers = _EXACT.findall(_plain_numbers(text if boxed is None else _unstyled(boxed)))
    return _spelt(numbers[-1]) if numbers else ""


def read_choice(text: str) -> str:
    """Reads the letter of a choice: the boxed one, or the one after words such as "the answer is".

    If there is neither, it is the letter that stands alone in the last line, or the only one that
    is marked as a choice.

    Args:
        text: The decoded text, without special tokens.

    Returns:
        The letter as a capital, or "" if none can be read.
    """
    boxed = _boxed(text, may_be_open=True)
    if boxed is not None:
        alone = _ALONE.fullmatch(_unstyled(boxed).strip())
        return alone[1].upper() if alone else ""
    text = _unstyled(text)
    said = _SAID.findall(text)
    if said:
        return str(said[-1]).upper()
    lines = _lines(text)
    bare = _BARE.fullmatch(lines[-1]) if lines else None
    if bare:
        return bare[1].upper()
    # All choices said once more are no answer.
    lettered = [found[1].upper() for found in map(_ALONE.fullmatch, lines) if found]
    letters = {*lettered, *_IN_BRACKETS.findall(text)}
    return letters.pop() if len(letters) == 1 else ""


def normal_latex(answer: str) -> str:
    r"""Returns a spelling that most equal formulas share.

    Blanks, dollar signs, \left, \right, \text, the size of fractions and a final full stop do
    not matter. Nothing is calculated but plain numbers.
    """
    text = _PARTED.sub(",", _unstyled(answer.replace("\u2212", "-")))
    plain = _SPACING.sub(" ", _plain_numbers(text)).strip(" .")
    number = _EXACT.fullmatch(re.sub(r"\s?\\?%$", "", plain))
    if number:
        return _spelt(number[0])
    text = re.sub(r"\\[dt]frac", r"\\frac", _SPACING.sub("", text)).rstrip(".")
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text)
    return text.casefold() if re.fullmatch(r"[A-Za-z]{3,}", text) else text


def read_latex(text: str) -> str:
    r"""Reads a formula: the boxed one, or what follows "the answer is", or the last $...$.

    If there is none of these, a single word or the last number is read.

    Args:
        text: The decoded text, without special tokens.

    Returns:
        The formula in normal spelling, or "" if none can be read.
    """
    boxed = _boxed(text, may_be_open=True)
    if boxed is not None:
        return normal_latex(boxed)
    marks = list(_CONCLUDED.finditer(text))
    lines = _lines(text[marks[-1].end() :]) if marks else []
    said = lines[0].lstrip("*_ ").rstrip("*_. ") if lines else text
    formulas = _FORMULA.findall(said)
    if formulas:
        return normal_latex(formulas[-1])
    return normal_latex(said) if lines or len(said.split()) == 1 else read_number(said)


#: The function that reads an answer by each answer rule. It returns "" if there is no answer, and
#: the same text for equal answers.
READERS: dict[str, Callable[[str], str]] = {
    "short": read_answer,
    "strict": read_strict,
    "text": read_text,
    "number": read_number,
    "choice": read_choice,
    "latex": read_latex,
}
