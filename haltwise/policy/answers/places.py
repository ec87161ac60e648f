"""Where an answer stands in what an LM has written: in a box, behind words, or in a line."""

import re
from itertools import pairwise

from haltwise.policy.answers.words import ANSWER, BUT, INSTEAD_OF, IS, NOT, NOT_BEFORE_IS, RETRACTED

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s{0,9}\{|\\.|[{}]", re.DOTALL)
_MINUS_BEFORE = re.compile(r"(?:[$=]|\\[\[(])\s{0,3}[-\u2212]\\boxed\s{0,9}\{$")
_BOX_OF_A_WORD = re.compile(r"\\boxed\s{1,9}([^\s{}$]{1,99})")
_HOLLOW = re.compile(r"\\(?:text|math|[lc]?dots|q?quad|square)[a-z]{0,9}")

_STYLES = (
    r"text(?:bf|it|rm|sf|tt|sc|up|md|normal)?|math(?:rm|bf|sf|it|tt|normal)|boldsymbol|bm|emph"
)
_STYLED = re.compile(
    rf"\\(?:{_STYLES}|bf|it|rm|tt|mbox|hbox|underline|operatorname)\*?\s{{0,9}}\{{([^{{}}]*)\}}"
)
_STYLE = re.compile(
    r"\\(?:text)?color\s?\{[A-Za-z]{1,20}\}|"
    rf"\\(?:{_STYLES}|bf|it|rm|tt|(?:display|text)style|[lL]arge)(?![A-Za-z{{])\s?|"
    r"\\(?:left|right)\s?\."
)

_BLANKS = r"[\s*_]{0,9}"
# Here bold type may end, or a list or bold type begin; a single star or underscore may be a part of
# the answer.
_BOLD = r"(?:\*\*)?\s*(?:(?<=\n)[-*\u2022]\s+)?(?:\*\*(?=\S))?"

# "The answer to the first question is", and "la respuesta correcta es".
_TO = rf"(?:\s(?:to|for|of)\b[^.:?\n]{{0,60}}?|(?:\s(?!{NOT_BEFORE_IS})\w{{1,15}}){{1,2}})?"

# "### Final Answer", with the answer below it.
_HEADING = (
    rf"^\s{{0,3}}(?:\#{{1,6}}|\*\*)[^\w\n]{{0,9}}(?:(?:the|my|final|correct)\s|\u6700[\u7ec8\u7d42]){{0,2}}{ANSWER}"
    rf"(?:\sfinale?)?[*#\s]{{0,9}}$(?=\s*\S)"
)
_MARK = re.compile(
    rf"{_HEADING}{_BOLD}|"
    rf"{ANSWER}[\"']?{_BLANKS}[:\uff1a\u3011]{_BOLD}",
    re.IGNORECASE | re.MULTILINE,
)
_CONCLUDED = re.compile(
    rf"{_HEADING}{_BOLD}|"
    rf"{ANSWER}(?:{_BLANKS}{_TO}(?P<denied>\s{NOT_BEFORE_IS}|不)?{IS}(?:\s{{0,9}}(?:\*\*)?\s{{0,9}}:)?|(?:\s\w{{1,15}})?[\"']?{_BLANKS}[:\uff1a\u3011]|\s[-=\u2013\u2014]\s){_BOLD}|"
    rf"^\#{{2,6}}(?=\s{{0,3}}[-+$]{{0,2}}[0-9])|(?P<anew>{RETRACTED})",
    re.IGNORECASE | re.MULTILINE,
)
_NOT = re.compile(rf"\s{{0,9}}{NOT}", re.IGNORECASE)
# "Not 5 but 7"; in Japanese and Korean, "not" and "but" are one word behind the 5.
_CONTRAST = re.compile(
    rf"\s{{0,9}}{NOT}[^.\n\u3002]{{1,60}}?{BUT}|[^.\n\u3002]{{1,40}}?{INSTEAD_OF}", re.IGNORECASE
)
_LETTER = re.compile(r"\(?[A-Z]")
_SURE = re.compile(
    r"[0-9.]{1,9}\s?\\?%\s(?:sure|certain|confident|confidence|certainty)\b", re.IGNORECASE
)
_THEREFORE = re.compile(
    r"(?:therefore|thus|hence|consequently|so)\b[^.:=?\n]{0,80}?\b(?:is|are|was|were)\s{1,9}",
    re.IGNORECASE,
)
_ASIDE = re.compile(r"\.?\s{0,9}I\s(?:hope|believe|think)\s(?:it|this|that)\sis\scorrect\W{0,9}$")
_CONFIDENCE = re.compile(r"\n\W{0,9}(?:confidence|certainty)\b[^\n]*", re.IGNORECASE)
_TAG = re.compile("<(?:final_?)?answer>")
_END_TAG = re.compile("</(?:final_?)?answer>")
# A line that opens or closes a block of code.
_FENCE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})[ \t]*[\w+-]*[ \t]*$\n?", re.MULTILINE)
# A line that is the answer, and below it "Explanation:".
_EXPLAINED = re.compile(
    r"\s*([^\n]{1,60})(?<!:)\n[\s#*_>]{0,9}(?:explanation|note|justification|explicaci\u00f3n|explication|"
    r"erkl\u00e4rung|\u043e\u0431\u044a\u044f\u0441\u043d\u0435\u043d\u0438\u0435|\u8bf4\u660e|\u89e3\u91ca|\u89e3\u6790|\u89e3\u8aac|\uc124\uba85)[*_]{0,3}\s?[:\uff1a]",
    re.IGNORECASE,
)
_NEXT_QUESTION = re.compile(
    r"\n\s{0,9}[#*\s]{0,6}(?:question|problem|q|human|user)\s?[0-9]{0,3}[*\s]{0,3}:", re.IGNORECASE
)


def _is_hollow(content: str) -> bool:
    """Says whether a box has nothing but dots, question marks and the like."""
    # \{\} is the empty set.
    return r"\{" not in content and not _HOLLOW.sub("", content).strip(" \t\r\n$.\u2026_?~,;:{}\\!")


def boxed(text: str, may_be_open: bool = False) -> str | None:
    """Returns what is in the last boxed{...} that is not empty, with balanced braces.

    Args:
        text: The decoded text, without special tokens.
        may_be_open: If nothing closes that one, the rest of its line is what is in it; otherwise it
            is no box.

    Returns:
        The content; "" if all boxes are empty, and None if there is none.
    """
    starts: list[int] = []
    ends: dict[int, int] = {}
    braces: list[int | None] = []  # the box that each open brace opens
    for found in _BOX.finditer(text):
        if found[0] == "}" and braces:
            box = braces.pop()
            if box is not None:
                ends[box] = found.start()
        elif found[0] == "{":
            braces.append(None)
        elif found[0][-1] == "{" and found[0] != r"\{":
            starts.append(found.end())
            braces.append(found.end())
    for start, after in reversed(list(pairwise([*starts, len(text)]))):
        content = text[start : ends.get(start, after)]
        if start not in ends:
            content = content.partition("\n")[0]
        if not _is_hollow(content):
            minus = "-" if _MINUS_BEFORE.search(text, max(0, start - 30), start) else ""
            return minus + content if may_be_open or start in ends else None
    bare = None if starts else _BOX_OF_A_WORD.findall(text)
    if bare:
        return str(bare[-1]).rstrip(".,;:")
    return "" if starts else None


def unstyled(text: str) -> str:
    r"""Returns a text without LaTeX's \text{...}, \mathbf{...} and the like around its parts."""
    text = _STYLE.sub("", text)
    for _ in range(4):  # as deep as anyone nests them
        text, count = _STYLED.subn(r"\1", text)
        if not count:
            break
    return _STYLE.sub("", text)


def lines(text: str) -> list[str]:
    """Returns the lines that are not blank, stripped."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def own_part(text: str) -> str:
    """Returns what is in <answer>...</answer>, or else a text up to the next question.

    Some LMs ask themselves one after their answer, explain it, or say how sure they are: that is
    left out, too, and so are the fences of a block of code, closed or not.
    """
    text = _FENCE.sub("", _SURE.sub("", _CONFIDENCE.sub("", text)))
    _, *tagged = _TAG.split(text)
    inner = _END_TAG.split(tagged[-1])[0] if tagged else ""
    if inner.strip():
        return inner
    asked = _NEXT_QUESTION.search(text)
    before = text[: asked.start()] if asked else ""
    if asked and _is_told(before):
        return before
    explained = _EXPLAINED.match(text)
    return explained[1] if explained and not _is_told(text) else text


def _is_told(text: str) -> bool:
    """Says whether a text tells its answer in a box or behind words."""
    return r"\boxed" in text or bool(_CONCLUDED.search(text))


def conclusions(text: str) -> list[str]:
    """Returns what follows each "the answer is" up to the next one, the last of them first.

    Words that take an answer back begin another one: "The answer is 12. Wait, no, it's 13."
    """
    found = list(_CONCLUDED.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    places: list[str] = []
    for match, end in zip(found, ends, strict=False):
        if match["anew"] and not places and not _LETTER.match(text, match.end()):
            continue  # Nothing was told before.
        place = ("not " if match["denied"] else "") + text[match.end() : end]
        told = affirmed(place)
        is_marked = match[0].rstrip(" *")[-1:] in tuple(":\uff1a\u3011")
        if is_marked or told != place or not _NOT.match(place):
            places.append(told)
    return places[::-1]


def affirmed(place: str) -> str:
    """Returns a text from "but" on if it begins with "not ... but", and as it is otherwise."""
    contrast = _CONTRAST.match(place)
    return place[contrast.end() :] if contrast else place


def place_of_words(text: str) -> str:
    """Returns what follows the last "Answer:", or else the last "answer is", or else the text."""
    marks = list(_MARK.finditer(text))
    return text[marks[-1].end() :] if marks else (conclusions(text) or [text])[0]


def said(text: str) -> str:
    """Returns the line that is the answer, if it is in words.

    It is what follows the last "Answer:", or else the last "answer is", up to the end of its line.
    If the text has neither, it is the last line, from "therefore ... is" on.
    """
    place = place_of_words(text)
    if place == text:
        last = (lines(text) or [""])[-1]
        therefore = _THEREFORE.match(last)
        return last[therefore.end() :] if therefore else last
    line = (lines(place) or [""])[0].removesuffix("**")
    # "Final answer: The final answer is ..."
    line = (conclusions(line) or [line])[0].strip()
    return _ASIDE.sub("", line)
