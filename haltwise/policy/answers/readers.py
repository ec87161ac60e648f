"""Reading the answer that an LM gives after its thought: the same in training and in serving.

An answer rule is a function that reads an answer from a text; `READERS` has them all by name. A new
rule is an entry there: without more, two answers are equal if it reads the same from both.
"""

import re
import string
import unicodedata
from collections.abc import Callable

from haltwise.policy.answers.characters import NAME_LETTERS, caseless, plain_characters
from haltwise.policy.answers.choice_letters import boxed_letter, told_letter
from haltwise.policy.answers.formulas import normal_latex
from haltwise.policy.answers.number_places import (
    clause,
    is_joined,
    is_part,
    last_affirmed,
    last_number,
    only_number,
)
from haltwise.policy.answers.number_words import number_in_words
from haltwise.policy.answers.places import (
    boxed,
    conclusions,
    lines,
    own_part,
    place_of_words,
    said,
    unstyled,
)
from haltwise.policy.answers.words import MINUS, POLITE_END, SCALE

# A time or ratio, a date, a mixed number, or any other, with a power of ten, % or th behind it.
_SPELT_NUMBER = re.compile(
    rf"(?<![{NAME_LETTERS}0-9_.^])(?>[0-9]{{1,9}}(?::[0-9]{{1,9}}){{1,2}}(?![0-9])(?:\s?[ap]\.?m\b\.?)?|"
    r"[0-9]{1,4}([-/.])[0-9]{1,4}(?:\1[0-9]{1,4}){1,2}(?![0-9])|"
    r"[-+]?[0-9]{1,9} [0-9]{1,9}/[0-9]{1,9}(?![0-9])|"
    r"[-+]?(?:[1-9][0-9]{0,2}(?:(?:[, ]|\{,\}|\\[,!])[0-9]{3})+(?![0-9])|"
    r"[0-9]+(?:,[0-9]+(?![0-9,]))?)"
    r"(?:\.[0-9]+)?(?:e[-+]?[0-9]{1,3}(?!\w))?"
    r"(?:(?:/| / )[0-9]+|"
    r"\s?(?:[\u00d7x*\u00b7]|\\times|\\cdot)\s?10\s?\^\s?[{(]?[-+]?[0-9]{1,3}[})]?)?"
    r"(?:\s?\\?%|(?:st|nd|rd|th)\b|\s?[ap]\.?m\b\.?)?)"
    rf"(?!\s?\^|{SCALE})(?![{NAME_LETTERS}](?![{NAME_LETTERS}']))",
    re.IGNORECASE,
)
# A list in brackets; a yes with its reason; and a remark behind a few words.
_BRACKETED = re.compile(r"\s*([(\[{][^()\[\]{}\n]{1,60},[^()\[\]{}\n]{1,60}[)\]}])[\s.*$]*")
_VERDICT = re.compile(
    r"[\s*]*(yes|no|true|false)\b[\s*]*(?:[,;:\u2014]|because|since)", re.IGNORECASE
)
_REMARK = re.compile(
    r",?\s(?:because|since)\s|,\s(?:not|as|but|which|i\s(?:think|believe|guess))\s|"
    r",\si\s(?:think|believe|guess)\b",
    re.IGNORECASE,
)
_REASON = re.compile(r",?\s(?:because|since)\s|,\sas\s|\s\(", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[^\W\d_]{3})[.!]\s")
_DECIMAL_OR_TIME = re.compile(
    r"([-+]?)([0-9]+|(?=\.[0-9]))(?:\.([0-9]*)|(:[0-9]{2}(?::[0-9]{2})?))?"
)
_GROUPED = re.compile(r"[-+]?[0-9]{1,3}(?:[ ,][0-9]{3})+(?:\.[0-9]+)?")
_BEGINS_WITH_A_NUMBER = re.compile(r"(?:[^\s0-9]{0,20}\s{0,9}){0,3}[^\s0-9]{0,20}[0-9]")
_QUOTED = re.compile(
    r"\*{1,2}([^*]+)\*{1,2}|\{([^{}]+)\}|"
    r"[\"'`\u201c\u00ab\u300c]{1,2}([^\"'`\u201c\u201d\u00ab\u00bb\u300c\u300d]+)[\"'`\u201d\u00bb\u300d]{1,2}"
)
_BESIDE_A_SIGN = re.compile(r"(?<=[-,:;/=+*<>|()\[\]{}]) | (?=[-,:;/=+*<>|()\[\]{}])")
_MINUS_BEFORE = re.compile(rf"(?<![0-9])(?<![0-9]\s){MINUS}$", re.IGNORECASE)
_TAG = re.compile(r"</?[a-z_]{1,12}>")
_EXCLAIMED = re.compile(r"!{1,9}(?=\s(?!\s?[-+*/=\\])|$)")

# An "a" that no word follows is a letter: vitamin A.
_ARTICLES = re.compile(r"(?<!\S)(?:a(?=\s+\S)|(?:an|the)(?!\S))")
_INITIALS = re.compile(r"(?<=\b[^\W\d_]\.) (?=[^\W\d_]\.)")
_DASH_IN_A_WORD = re.compile(r"(?<=[^\W\d_])[-\u2014](?=\w)|(?<=\w)[-\u2014](?=[^\W\d_])")
_THOUSANDS = re.compile(
    r"(?<![0-9.,])(?<![0-9.,] )[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?! ?[0-9]|,[0-9])"
)
# Marks that change what is said: between digits, before a number, and behind a word.
_TELLING = re.compile(
    r"(?<=[0-9])[-.,/:](?=[0-9])|(?<=\w)[\^<>](?=\w)|(?<=[0-9])'(?=[0-9]{1,2}(?![0-9]))|(?<![\w.])[-<>](?=\s?\.?[0-9])|(?<![\w.])\.(?=[0-9])|"
    r"(?<=-)\.(?=[0-9])|(?<=[^\W\d_])[-#](?!\w)|(?<=\w)\+{1,9}(?!\w)|(?<=\w)[+=]{1,9}(?=\w)|"
    r"(?<=[0-9])\*{1,9}(?=[0-9])"
)

_BEGINS_WITH_A_FORMULA = re.compile(r"[\s*_]{0,9}\${1,2}([^$]+)\$")
_FORMULA = re.compile(r"\$([^$]+)\$")
_DISPLAY = re.compile(r"(?<!\\)\\[\[\]()]")
_NEXT_FORMULA = re.compile(r"(?<!\$)\$(?:,|,?\s(?:and|or))\s\$(?!\$)")
_GOES_ON = re.compile(
    r"[.!]\s|[\u3002\uff0c]|,?\s(?:because|since|as|which|so)\s|\s?\u2014", re.IGNORECASE
)

_LATEX_COMMA = re.compile(r"(?<=[0-9])(?:\{,\}|,?\\[,!],?)(?=[0-9]{3})")
# Spellings of LaTeX and their plain ones.
_SPELLINGS = [
    (re.compile(pattern), plain)
    for pattern, plain in (
        (_LATEX_COMMA, ","),
        (r"(?<=\S)\{([,:.])\}(?=\S)", r"\1"),
        (r"\\!", ""),
        (r"\\[,;:]|(?<=\w)~(?=\w)", " "),
        (r"(?<=[0-9]) ?\\?%", "%"),
        (r"\s?(?:\^\s?\{?\s?\\circ(?![a-z])\s?\}?|\\degree(?![a-z])\s?)", "\u00b0"),
        (r"\^\{(-?[0-9]{1,30}|[A-Za-z])\}(?![0-9])", r"^\1"),
        (r"\\(?:left|right)(?![A-Za-z])|\\+(?=[%$ {}_#&])", ""),
        (r"(?<=[0-9])\s?([AaPp])\.?([Mm])(?!\w)\.?", r" \1\2"),
    )
]


def canonical(answer: str) -> str:
    r"""Returns the one spelling that equal answers share.

    Case, styles such as \text{...}, outer blanks, quotes and dollar signs, a final full stop, runs
    of blanks and those beside a sign do not matter, nor do several ways to write one character. A
    number loses its thousands separators, plus sign, leading zeros and decimals that are zero at
    its end. Nothing is calculated: 1/2 and 0.5 stay different.
    """
    text, before = _canonical_once(answer), answer
    while text != before:  # what is lost may have parted what is lost, too
        text, before = _canonical_once(text), text
    return text


def _canonical_once(answer: str) -> str:
    text = unstyled(plain_characters(answer))
    for pattern, plain in _SPELLINGS:
        text = pattern.sub(plain, text)
    text = _bare(" ".join(caseless(text).split()))
    text = re.sub(POLITE_END, "", text)
    while quoted := _QUOTED.fullmatch(text):
        text = _bare(quoted[1] or quoted[2] or quoted[3])
    text = re.sub(r"^([-+]) (?=[.0-9])", r"\1", text)
    if _GROUPED.fullmatch(text):
        text = re.sub("[ ,]", "", text)
    close = _BESIDE_A_SIGN.sub("", text)
    text = text if _GROUPED.fullmatch(close) else close  # 1, 200 is not 1,200.
    number = _DECIMAL_OR_TIME.fullmatch(text)
    if number is None:
        return text
    sign, whole, decimals, minutes = number.groups("")
    whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
    size = f"{whole}.{decimals}" if decimals else whole + minutes
    return f"-{size}" if sign == "-" and size != "0" else size


_BEFORE_IT = re.compile(r"^(?!\.[0-9])[ $.\u3002]+?(?=\.?[0-9]|[^ $.\u3002])")


def _bare(text: str) -> str:
    """Returns a text without blanks, dollar signs and full stops around it; .5 keeps its point."""
    return _BEFORE_IT.sub("", text.rstrip(" $.\u3002"))


def _spelt(text: str, found: re.Match[str]) -> str:
    """Returns a number in canonical spelling, with the minus that is said before it."""
    is_negative = _MINUS_BEFORE.search(text[max(0, found.start() - 20) : found.start()])
    return canonical(("-" if is_negative else "") + found[0].rstrip(","))


def _told_answer(line: str) -> str | None:
    """Returns the number, or the few words, that follow "the answer is"; None if there are none."""
    whole = _BRACKETED.fullmatch(line) or _VERDICT.match(line)
    if whole:
        return canonical(whole[1])
    line = _LATEX_COMMA.sub(",", line)
    told = _REASON.split(line)[0]
    if re.search(r"[^\W\d_]", told) and not re.search("[0-9]", told) and re.search("[0-9]", line):
        line = told  # Monday (84 mod 7 = 0)
    part = clause(line)
    numbers = [
        _spelt(part, found) for found in _SPELT_NUMBER.finditer(part) if not is_part(part, found)
    ]
    if numbers:
        return numbers[-1] if "=" in part or len(set(numbers)) == 1 else ""
    line = _REMARK.split(line.replace("**", ""))[0]
    for words in map(canonical, (line, _SENTENCE_END.split(line)[0])):
        if words and len(words.split()) <= 5:
            return words
    return None


def read_answer(text: str) -> str:
    """Reads the answer from the text generated after the close text.

    The last boxed answer counts. If there is none, what follows "the answer is" does, or else the
    last number, and if there is no number either, a word that stands alone, or a few in bold type.

    Args:
        text: The decoded text, without special tokens.

    Returns:
        The canonical answer, or "" if none can be read.
    """
    text = own_part(plain_characters(text))
    content = boxed(text)
    if content is not None:
        return canonical(content)
    text = _EXCLAIMED.sub(".", _TAG.sub("", text))
    for place in conclusions(text):
        told = _told_answer((lines(place) or [""])[0])
        if told is not None:
            return told
    whole = _BRACKETED.fullmatch(text) or _VERDICT.match(text)
    if whole:
        return canonical(whole[1])
    numbers, words = list(_SPELT_NUMBER.finditer(text)), text.split()
    last = last_affirmed(text, numbers)
    if last and not is_joined(text, last) and not is_part(text, last):
        return _spelt(text, last)
    is_alone = len(words) == 1 or (not numbers and _QUOTED.fullmatch(text.strip()))
    return canonical(text) if is_alone else ""


def read_strict(text: str) -> str:
    """Reads an answer as it stands: nothing but outer blanks is lost.

    The answer is what follows the last "Answer:", or else the last "answer is", up to the end of
    its line. If the text has neither, it is the last line. If there is a boxed answer in that
    place, it is that one.

    Args:
        text: The decoded text, without special tokens.

    Returns:
        The answer in NFC, or "" if none can be read.
    """
    text = own_part(unicodedata.normalize("NFC", text))
    content = boxed(place_of_words(text), may_be_open=True)
    return said(text) if content is None else unstyled(content).strip()


def normal_text(answer: str) -> str:
    """Returns the spelling that equal short texts share.

    As in SQuAD's exact match (Rajpurkar et al., 2016, arXiv:1606.05250), case, punctuation,
    articles and runs of blanks are lost. Marks that change what is said are kept: a minus sign, a
    decimal point, 5:30, 1/2, C++ and C#. Words with a hyphen are several words.
    """
    text, before = caseless(unstyled(plain_characters(answer))), ""
    while text != before:  # what is lost may have parted what is kept
        text, before = _without_marks(text), text
    return text


def _without_marks(text: str) -> str:
    text = _THOUSANDS.sub(lambda found: re.sub("[, ]", "", found[0]), text)
    text = _INITIALS.sub("", re.sub(POLITE_END, "", text))
    text = re.sub(r"(?<=\w) ([+=/:]) (?=\w)|^([-+]) (?=[.0-9])", r"\1\2", text)
    text = re.sub("(?<=[0-9])(?:\u2014| - )(?=[0-9])", "-", text)
    text = _DASH_IN_A_WORD.sub(" ", text)
    kept = {i for found in _TELLING.finditer(text) for i in range(*found.span())}
    text = "".join(
        letter for i, letter in enumerate(text)
        if i in kept
        or (letter not in string.punctuation and unicodedata.category(letter)[0] != "P")
    )  # fmt: skip
    # What was parted by a mark may be one character now.
    return unicodedata.normalize("NFC", " ".join(_ARTICLES.sub(" ", text).split()))


def read_text(text: str) -> str:
    """Reads an answer in words, in the place where `read_strict` finds it.

    Args:
        text: The decoded text, without special tokens.

    Returns:
        The answer in normal spelling, or "" if none can be read.
    """
    return normal_text(read_strict(text))


def read_number(text: str) -> str:
    r"""Reads the number of the last boxed answer, or behind "the answer is", or the last number.

    Thousands separators, units, currency and percent signs do not matter, and the exact value
    counts: 1,000 and 1000.0 and 10^3 are one number, and so are 1/2 and \frac{1}{2} and 0.5, and
    0.333... and 1/3, and 42 and forty-two. 50 % is 50. A time of day, such as 5:30, is one number.

    Args:
        text: The decoded text, without special tokens.

    Returns:
        The number as a decimal, or as p/q if that is long; "" if there is none, or if there are
        several, as in "5 or 7".
    """
    text = own_part(plain_characters(text))
    content = boxed(text, may_be_open=True)
    if content is not None:
        return only_number(unstyled(content)) or number_in_words(unstyled(content))
    text = _EXCLAIMED.sub(".", _TAG.sub("", unstyled(text)))
    for place in conclusions(text):
        line = (lines(place) or [""])[0]
        if _BEGINS_WITH_A_NUMBER.match(line):
            return only_number(line)
        in_words = number_in_words(line)
        if in_words:
            return in_words
    return last_number(text) if re.search("[0-9]", text) else number_in_words(text)


def read_choice(text: str) -> str:
    """Reads the letter of a choice: the boxed one, or the one after words such as "the answer is".

    If there is neither, it is the letter that stands alone in the last line, or the one that is
    picked, or the only one that is marked as a choice.

    Args:
        text: The decoded text, without special tokens.

    Returns:
        The letter as a capital, or "" if none can be read, or if there are several.
    """
    text = own_part(plain_characters(text))
    content = boxed(text, may_be_open=True)
    if content is not None:
        return boxed_letter(_choice_text(content))
    return told_letter(_choice_text(text))


def _choice_text(text: str) -> str:
    """Returns a text without styles, tags such as <answer>, and LaTeX's blanks and brackets."""
    text = _TAG.sub(" ", unstyled(text))
    return re.sub(r"\\[,;: ()\[\]]|~|\\q?quad(?![A-Za-z])", " ", text)


def _told_formula(place: str) -> str:
    """Returns the formula that follows "the answer is", or ""."""
    first = _BEGINS_WITH_A_FORMULA.match(place)
    if first:
        return normal_latex(first[1])
    line = (lines(place) or [""])[0]
    formulas = _FORMULA.findall(line)
    return normal_latex(formulas[-1] if formulas else _GOES_ON.split(line)[0].strip("*_. "))


def read_latex(text: str) -> str:
    r"""Reads a formula: the boxed one, or what follows "the answer is", or the last $...$.

    If there is none of these, a single word or the last number is read.

    Args:
        text: The decoded text, without special tokens.

    Returns:
        The formula in normal spelling, or "" if none can be read.
    """
    text = own_part(plain_characters(text))
    content = boxed(text, may_be_open=True)
    if content is not None:
        return normal_latex(content)
    text = _NEXT_FORMULA.sub(", ", _DISPLAY.sub("$", text))
    for place in conclusions(text):
        told = _told_formula(place)
        if told:
            return told
    formulas = list(_FORMULA.finditer(text))
    if formulas:
        last = last_affirmed(text, formulas)
        return normal_latex(last[1]) if last else ""
    return normal_latex(text.strip("* \n")) if len(text.split()) == 1 else read_number(text)


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
