"""Which number of a text is its answer: the only one that is told, or the last."""

import re

from haltwise.policy.answers.characters import NAME_LETTERS
from haltwise.policy.answers.number_spellings import NUMBER, exact_value, plain_numbers
from haltwise.policy.answers.words import IS, NOT, NOT_BEFORE_IS, OR, SCALE, UNIT_WITH_PARTS

# What stands before or behind a number that is a part of a formula, or only bounds the answer.
_BEFORE = re.compile(
    r"(?:\\(?:sqrt|pm|mp|log|ln|sin|cos|tan|pi|times|cdot|div|lfloor|lceil|max|min|gcd|lcm|exp|b?mod)(?:\[[0-9]\])?\s?|"
    r"(?<![A-Za-z\\])(?:sqrt|log|ln|sin|cos|tan|exp|mod)\s?|"
    r"\\[dt]?frac\s?\{|\}\s?\{|(?<![A-Za-z])[A-Za-z]\(|[-+]\s?\(|"
    r"[|<>\u2260\u00b1\u221a^*/\u00d7\u00f7\u00b7\u2264\u2265]\s?|"
    r"(?:[0-9)}!]|(?<![A-Za-z])[A-Za-z])\s?[-+]\s?|"
    r"(?<!\b[Nn]o\s)(?<!\bnot\s)\b(?:less|fewer|smaller|more|greater|larger)\sthan\s\\?[$\u20ac\u00a3]?)[{(]?\s?$"
)
_BEHIND = re.compile(
    r"\s?[)}\]]{0,3}\s?(?:[-+]\s?(?:[0-9(\\]|[A-Za-z](?![A-Za-z]))|[*\u00d7\u00f7\u00b7/]\s?[0-9(\\]|"
    r"/\s?[xyzn](?![A-Za-z])|[<>\u2260\u00b1|]|\^(?!\s?\{?\\circ)|!|\\(?:pm|mp|times|cdot|div|sqrt|pi|log|ln|sin|cos|tan|b?mod)(?![a-z])|mod(?![a-z])|"
    r"\\[dt]?frac(?!\s?\{\s?(?:[A-Za-z]{2,20}|[mgl])\s?\})|"
    rf"[\u03c0\u221a]|[xyzn](?![{NAME_LETTERS}'])|(?<=[0-9])[abeiqruvw](?![{NAME_LETTERS}']))"
)
# The number before the last one, and what joins them: 5 or 7, 5 red and 7, 5 (or 7), 5 to 7.
_TO = (
    r"\s(?:to|out\sof|up\sto|through|until|bis(?:\szu)?|a|\u00e0|hasta|at\u00e9|\u0434\u043e)(?=\s)|"
    r"\s(?:vs\.?|versus)(?=\s)|\s?(?:[\u81f3\u5230~\u301c]|\u304b\u3089)"
)
_JOINED = re.compile(
    rf"[0-9][^\s0-9]{{0,9}}(?:(?:\s[^\W\d]{{1,20}}){{0,2}}(?:{OR}|\s\((?:or|and)(?=\s)|\s?&)|{_TO})"
    r"\s?(?:(?:either|maybe|perhaps|possibly|probably|even)\s){0,2}(?:[A-Za-z]\s?=\s?)?"
    r"\\?[$\u20ac\u00a3(]{0,2}$",
    re.IGNORECASE,
)
_DASH = re.compile(r"[0-9]\s?-\s?$")
# One measure in two units, 5 feet 7; a list in brackets, or of numbers alone; x = 5, y = 7.
_UNIT_BETWEEN = re.compile(rf"[0-9]\s?(?:{UNIT_WITH_PARTS}|{SCALE})\.?\s?$", re.IGNORECASE)
_LISTED = re.compile(r"(?:^|[(\[{])[-+0-9.,;\s$]{0,60}[0-9]\s?[,;]\s?[-+$]{0,2}$")
_SEVERAL_VALUES = re.compile(
    rf"=\s?[-+]?[0-9./]{{1,30}}\s?(?:,|;|&|{OR})\s{{0,3}}(?:(?:and|or)\s)?[A-Za-z]\s?=\s?[-+]?$",
    re.IGNORECASE,
)
# "5 rather than 7" and "5 of the 7 birds".
_WHERE_ANOTHER_IS = (
    r"(?:[\s,](?:rather\sthan|instead\sof|as\sopposed\sto)|(?<=[0-9])\s(?:out\s)?of\s(?:the|these|those))"
    r"\s[$\u20ac\u00a3\\(]{0,3}"
)
# What is denied, "not 7", or whole, "20% of 7"; and where it stands beside an answer: "5, not 7".
_DENIED = re.compile(
    rf"(?:{NOT}|(?<!\w){NOT_BEFORE_IS}(?={IS})|n't|cannot)"
    rf"(?:{IS}|\s?(?:be|equals?|to)(?!\w)){{0,2}}\s?[$\u20ac\u00a3\\(]{{0,3}}[-+]?$|"
    rf"{_WHERE_ANOTHER_IS}$|%\sof\s(?:the\s)?[$\u20ac\u00a3\\(]{{0,3}}$",
    re.IGNORECASE,
)
_INSTEAD = re.compile(
    rf"(?:[,;.(]|\u800c)\s?(?:and\s)?[^\s,(]{{1,9}}\s?[$\u20ac\u00a3\\(]{{0,3}}$|{_WHERE_ANOTHER_IS}$",
    re.IGNORECASE,
)
_RELATIONS = {
    r"\\l(?:e|eq|t)(?![a-z])|<=": "<",
    r"\\g(?:e|eq|t)(?![a-z])|>=": ">",
    r"\\neq?(?![a-z])|!=": "\u2260",
    r"\\(?:approx|simeq|doteq)(?![a-z])": "\u2248",
    r"\\(?:[Rr]ightarrow|implies|equiv|to)(?![A-Za-z])|[=-]>|[\u2192\u21d2\u27f9\u2261]": "=",
}
# What a sentence goes on with behind its number: reasons, conditions and remarks.
_GOES_ON = re.compile(
    r"\n|[\u3002;\uff1b\u2014?]|\.(?=\s|$)|"
    r"[,\u3001](?!\s?(?:(?:and|or)\s)?[-$]{0,2}[0-9.,/]{1,20}\s?(?:$|[,.;)\]\\}]|(?:and|or)\s))(?!\s?[a-z]\s?=)"
    r"(?![0-9])|"
    r"\s(?:because|since|as|so|for|per|in|out|after|by|at|over|with|from|on|when|if|where|while|"
    r"which|that|is|are|of|not|but|given|due|using|rather|checked)\b|(?:\s{1,3}\(|\((?=[^\W\d_]{2}))[^()=]{0,99}\)",
    re.IGNORECASE,
)
# "5 times 3, which is 15", "20% of 50, or 10", but not "5 or 7": what it says is no number yet.
_SHARE = re.compile(r"(?:[0-9]\s?\\?%|\b(?:half|third|quarter))\sof\b", re.IGNORECASE)
_CALCULATION = re.compile(r"[\u00d7\u00f7*+]|\b(?:times|plus|minus|of)\b", re.IGNORECASE)
_THAT_IS = re.compile(
    r"\b(?:(?:which|that)\s(?:is|equals|makes|gives)|i\.e\.,?|or|giving)\s(?=[-$]{0,2}[0-9])",
    re.IGNORECASE,
)
_SEVERAL = re.compile(
    rf"=[^=]{{1,99}}(?:,|;|&|{OR})\s{{0,3}}(?:(?:and|or)\s)?[A-Za-z]\s?=", re.IGNORECASE
)


_POWER = re.compile(r"(?<=[0-9)])\*\*(?=[-+(]?[0-9])")  # 10**3
# 3 \pmod 5.
_MODULUS = re.compile(r"\\pmod\s?(?:[0-9]{1,9}|\{[^{}]{0,20}\})|\(\s?\\?mod\s[^()]{1,20}\)")
_ITALIC = re.compile(r"(?<![^\s(])(?<![0-9)]\s)\*(?=[^\s*])([^*\n]{1,60})(?<!\s)\*(?![\w*])")


def _prepared(text: str) -> str:
    text = _POWER.sub("^", text)
    text = plain_numbers(_ITALIC.sub(r"\1", _MODULUS.sub("", text)))
    for pattern, sign in _RELATIONS.items():
        text = re.sub(pattern, sign, text)
    return re.sub(r"\*\*|\$|__+|(?<!\w)_(?=[-+.0-9])", "", text)


def is_part(text: str, found: re.Match[str]) -> bool:
    """Says whether a number is only a part of a formula or bounds the answer."""
    before = text[max(0, found.start() - 30) : found.start()]
    return bool(
        _BEFORE.search(before) or _BEHIND.match(text, found.end()) or _DENIED.search(before)
    )


def _sole(text: str) -> str:
    """Returns the value of all numbers of a text, if they have one, and are no parts of others."""
    found = list(NUMBER.finditer(text))
    values = {exact_value(number[0]) for number in found}
    if len(values) != 1 or any(is_part(text, number) for number in found):
        return ""
    return values.pop()


def clause(content: str) -> str:
    """Returns a text up to where it goes on behind its first number, with reasons or remarks."""
    first = NUMBER.search(content)
    end = _GOES_ON.search(content, first.end()) if first else None
    return content[: end.start()] if end else content


def only_number(content: str) -> str:
    """Reads the number that a box holds, or a sentence that tells the answer.

    It is the side of an equation that is a number, the last if there are several. What follows the
    number for a reason or as a remark does not matter.

    Args:
        content: A text in plain characters, without styles.

    Returns:
        Its value; "" if there is none, or several that differ.
    """
    content = _prepared(content)
    value = _clause_value(clause(content))
    result = _THAT_IS.search(content)
    before = content[: result.start()] if result else ""
    if result and _CALCULATION.search(before) and (not value or _SHARE.search(before)):
        return _clause_value(clause(content[result.end() :])) or value
    return value


def _clause_value(content: str) -> str:
    if _SEVERAL.search(content):
        return ""
    exact, *rounded = content.split("\u2248")
    values = [value for value in map(_sole, exact.split("=")) if value]
    if values or not rounded:
        return values[-1] if values else ""
    return _sole(rounded[-1])


def is_joined(text: str, number: re.Match[str]) -> bool:
    """Says whether a number is one of several: joined by "or" and the like, a dash, or a unit."""
    before = text[max(0, number.start() - 80) : number.start()]
    joints = (_JOINED, _DASH, _UNIT_BETWEEN, _LISTED, _SEVERAL_VALUES)
    return any(joint.search(before) for joint in joints)


def last_affirmed(text: str, found: list[re.Match[str]]) -> re.Match[str] | None:
    """Returns the last of what is found in a text; of "5, not 7" the 5, and of "not 7" nothing."""
    for match in reversed(found):
        before = text[max(0, match.start() - 30) : match.start()]
        if not _DENIED.search(before):
            return match
        if not _INSTEAD.search(before):
            return None
    return None


def last_number(text: str) -> str:
    """Reads the last number of a text.

    Args:
        text: A text in plain characters, without styles.

    Returns:
        Its value; "" if there is none, if it is a part of a formula, or one of two that are joined
        by "or" and the like.
    """
    text = _prepared(text)
    found = list(NUMBER.finditer(text))
    last = last_affirmed(text, found)
    if last is None or is_part(text, last):
        return ""
    if last != found[0] and is_joined(text, last):
        return _sole(text[found[found.index(last) - 1].start() : last.end()])
    return exact_value(last[0])
