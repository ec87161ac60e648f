"""The letter of a choice, in a box, behind the words that tell it, or in a line of its own."""

import re

from haltwise.policy.answers.characters import NAME_LETTERS
from haltwise.policy.answers.places import affirmed, conclusions, lines
from haltwise.policy.answers.words import (
    BUT,
    DENIALS,
    FILLERS,
    GOES_ON,
    NOT,
    NOT_BEFORE_IS,
    OPTION,
    OPTION_BEHIND,
    OR_WORDS,
)

# A word or number, a word in a script without blanks, the end of a line, or a mark.
_TOKEN = re.compile(rf"[0-9{NAME_LETTERS}']+|[^\W\d_{NAME_LETTERS}]+|\n|[^\w\s]")
_MARKUP = re.compile(
    r"\b(?:i\.e|e\.g)\.|(?<!\w)'|'(?!\w)|[*_`$\"{}\u201c-\u201f\u300c-\u300f\u3010\u3011]"
)

_PUNCTUATION = frozenset([*").,:;!?]'-/&+|\u2014\u3002\u3001", "\n", ""])
_FORMULA_SIGNS = frozenset("^=<>*_\\")

_PICKED = re.compile(
    rf"(?:{NOT}|(?<!\w){NOT_BEFORE_IS})\s[^.\n]{{1,40}}?{BUT}|"
    r"\b(?:it(?:'s|\sis|\smust\sbe|\shas\sto\sbe)|"
    r"(?:which|that|this)\sis|corresponds\sto|matches|le(?:av(?:es|ing)|ft\swith)|(?:c')?est?\sl[ae]|only|guess|"
    r"pick|choose|chose|select|go(?:ing)?\swith|opt\sfor|say|therefore|thus|hence|so|"
    r"(?:choice|option|pick|letter|alternative|statement|one|answer|correcta?|final|selected|\u0432\u0430\u0440\u0438\u0430\u043d\u0442)"
    r"(?:\s(?:is|(?:must|should|would|might|may|could)\sbe|\u2014)|\s?(?=:))|\u0935\u093f\u0915\u0932\u094d\u092a|(?:opci\u00f3n|op\u00e7\u00e3o|opzione|alternativa|option)\s(?:\w{1,12}\s)?(?:est?|\u00e9|\u00e8)"
    r"|richtig\sist|(?:answer|antwort|r\u00e9ponse|respuesta|resposta|cevap|\u0909\u0924\u094d\u0924\u0930|\u7b54\u6848|\uc815\ub2f5)(?=\s\(?[A-Z](?!\w)))(?!\w),?|"
    r"n't\s[^.\n]{1,40}?\bbut(?!\w)|"
    r"\u4e0d\u662f[^\u3002\n]{1,20}\u662f|\u6b63[\u786e\u78ba]\u7684\u662f|\u6b63\u3057\u3044(?:\u306e|\u9078\u629e\u80a2)\u306f|(?<!\u4e0d)[\u9009\u9078](?:\u62e9|\u64c7|\u9879|\u9805|\u662f|\u4e3a|\u70ba){0,3}",
    re.IGNORECASE,
)
# "I don't think it is C", and "I wouldn't pick C".
_DOUBTED = re.compile(
    r"(?:n't|\bnot|\bnever)\s(?:(?:think|believe|say|sure)\s(?:(?:that|if|whether)\s)?)?$",
    re.IGNORECASE,
)
_CALLED_RIGHT = re.compile(
    rf"(?<![{NAME_LETTERS}0-9_'])(?<!except\s)"
    r"\(?([A-Z])\)?(?:\s(?:is|ist|est|es|\u00e9|\u00e8|must\sbe)\s(?:the\s)?"
    r"(?:only\s|most\s|best\s)?(?:(?:correct|right|best|true|richtig|answer)(?!\w)|corre[ct])|"
    r"\s?(?:\u9009\u9879|\u9078\u9805|\u9879)?\u662f?\u6b63[\u786e\u78ba]|"
    r"\s(?:\u0432\u0435\u0440\u043d|\u043f\u0440\u0430\u0432\u0438\u043b\u044c\u043d)|"
    r"\s?\u304c\u6b63(?:\u3057\u3044|\u89e3)|\ubc88?[\uac00\uc774]?\s?(?:\uc815\ub2f5|\ub9de))"
)
_DENIED = re.compile(
    r"(?i:\bnot|n't|\bnever|cannot)(?i:\s(?:be|is|the|answer|option|choice)){0,4}\s\(?([A-Z])(?![\w'])"
)
_LETTERED = re.compile(
    r"\W{0,9}(?:(?i:option|choice)\W{1,9}[A-Za-z](?!\w).*|[A-Za-z](?:\W*|[.):\]]\W*\s.*)|"
    r"[B-HJ-Z]\s?[-,\u2014]\s.*|[A-HJ-Z]\s(?:(?:because|since|rather|instead|as)\s.*|\([^()]*\)\W*)|"
    r"[A-Z][.:\u3001]\W{0,3}(?![\x00-\x7f]).*)"
)
# "Is it B? No, it is C."
_ASKED = re.compile(r"[\s*(]{0,9}[A-Za-z][*)]{0,3}\?\s{0,9}\S")
_BARE = re.compile(
    rf"\W*(?:(?:the\s|la\s)?{OPTION}\W+)?([A-Za-z])(?:\s?{OPTION_BEHIND})?\W*", re.IGNORECASE
)
# "By elimination, C." and "The one that fits is C."
_AT_THE_END = re.compile(
    r"(?:^|[a-z][,:]\s|\b(?:is|be|with|to|[Pp]robably|likely)\s)\(?([A-HJ-Z])\)?\W{0,9}$"
)
_CAPITAL = re.compile(r"\b[A-HJ-Z]\b")
_SENTENCE_END = re.compile(r"(?<=[a-z][.!?])\s")
_DENIES = re.compile(rf"{NOT}|n't|\bcannot\b", re.IGNORECASE)
_NAMED_BEHIND = re.compile(r"\s\(([A-Z])\)\W{0,9}$")  # 12 (D)
_IN_BRACKETS = re.compile(r"\(([A-Z])\)")


def _is_letter(tokens: list[str], i: int) -> bool:
    """Says whether a token is the letter of a choice, and no word or variable."""
    letter, behind = tokens[i], tokens[i + 1]
    if len(letter) != 1 or not (letter.isascii() and letter.isalpha()) or behind in _FORMULA_SIGNS:
        return False
    if behind in ("isn't", "cannot") or (behind == "is" and tokens[i + 2] in DENIALS):
        return False
    if letter.isupper():
        return letter not in "AI" or not behind.islower() or behind in GOES_ON
    return behind in _PUNCTUATION or (letter not in "aeiouy" and behind in GOES_ON)


def _is_list_end(tokens: list[str], i: int) -> bool:
    """Says whether a token is a letter with no more words behind it."""
    return i + 2 < len(tokens) and _is_letter([*tokens, ""], i) and tokens[i + 1] in _PUNCTUATION


def _letter_at(text: str) -> str | None:
    """Returns the letter that a text begins with; "" if it begins with several, None with none."""
    tokens = [*_TOKEN.findall(_MARKUP.sub("", text[:200])), "", "", ""]
    i = 0
    while tokens[i].casefold() in FILLERS and not _is_letter(tokens, i):
        i += 1
    if not _is_letter(tokens, i):
        return None
    letter = tokens[i].upper()
    i += 2 if tokens[i + 1] == ")" else 1
    joint = tokens[i]
    while not _is_letter(tokens, i) and (
        tokens[i].casefold() in OR_WORDS | FILLERS or tokens[i] in tuple(",/&+-\u3001")
    ):
        i += 1
    is_list = joint.casefold() in OR_WORDS or (
        tokens[i + 1] in _PUNCTUATION
        or (tokens[i + 1].casefold() in OR_WORDS and _is_list_end(tokens, i + 2))
    )
    is_several = (tokens[i] != joint or joint.isupper()) and is_list and _is_letter(tokens, i)
    return "" if is_several and tokens[i].upper() != letter else letter


def boxed_letter(content: str) -> str:
    """Returns the letter that a box holds, or "" if it holds something else.

    Args:
        content: A text in plain characters, without styles.
    """
    places = conclusions(content) or [content]
    letter = _letter_at(affirmed(places[0]))
    if letter is None:
        named = _NAMED_BEHIND.search(content)
        letter = named[1] if named else ""
    return letter


def _picked_letter(text: str) -> str:
    """Returns the capital that is picked, or called right, last."""
    found = [(match.start(), match[1]) for match in _CALLED_RIGHT.finditer(text)]
    for match in _PICKED.finditer(text):
        if _DOUBTED.search(text[max(0, match.start() - 30) : match.start()]):
            continue
        letter = _letter_at(text[match.end() : match.end() + 60])
        if letter and re.search(rf"{letter}|\b{letter.lower()}\)", text[match.end() :][:60]):
            found.append((match.start(), letter))
    return max(found)[1] if found else ""


def _closing_letter(line: str) -> str:
    """Returns the capital that the last sentence of a line ends with, if it has no other."""
    sentence = _SENTENCE_END.split(line[-100:])[-1]
    found = _AT_THE_END.search(sentence)
    is_sole = len({*_CAPITAL.findall(sentence)}) == 1 and not _DENIES.search(sentence)
    return found[1] if found and is_sole else ""


def told_letter(text: str) -> str:
    """Returns the letter that a text without a box tells, or "" if it tells none or several.

    Args:
        text: A text in plain characters, without styles.
    """
    for place in conclusions(text):
        letter = _letter_at(place)
        if letter is not None and not _ASKED.match(place):
            return letter
    last = (lines(text) or [""])[-1]
    bare = _BARE.fullmatch(last)
    if bare:
        return bare[1].upper()
    picked = _picked_letter(text) or _closing_letter(last)
    if picked:
        return picked
    # All choices said once more are no answer.
    lettered = [
        _letter_at(line.lstrip("#>*-= ")) for line in lines(text) if _LETTERED.fullmatch(line)
    ]
    letters = {*filter(None, lettered), *_IN_BRACKETS.findall(text)} - {*_DENIED.findall(text)}
    return letters.pop() if len(letters) == 1 else ""
