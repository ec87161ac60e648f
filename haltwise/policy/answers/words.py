"""The words by which an answer is told, in the languages that LMs answer in.

The words of one language stand on one line; those of scripts without blanks between words apart.
"""
# ruff: noqa: RUF001

import re

_ANSWER = """
answer
antwort lösung ergebnis
réponse
respuesta resposta
risposta
antwoord
svar svaret
odpowiedź odpowiedzią odpověď odpoveď
ответ
відповідь
cevap yanıt
jawaban jawabannya jawapan jawapannya
đáp_án đáp_số câu_trả_lời
răspuns răspunsul
válasz
vastaus
απάντηση
الإجابة الاجابة الجواب جواب پاسخ
תשובה התשובה
उत्तर
"""
_ANSWER_UNSPACED = "答案 正解 答え 解答 回答 정답 답변 คำตอบ"

_IS = """
is are was equals becomes should_be must_be would_be will_be can_only_be has_to_be
ist lautet wäre
est
es sería é
è
är er
jest je
это равен
adalah ialah
là
este
είναι
هي هو است
היא הוא
है
"""
_IS_UNSPACED = "就是 是 为 為 は 은 는 คือ"

_OR = """
or and
oder und
ou et
o y u e
en
или и
або та
atau dan
và hoặc
أو و
"""
_OR_UNSPACED = "或者 或是 或 和 与 または と か 또는 와"

_SCALES = {
    2: "hundred",
    3: "thousand thousands tausend mille mil тысяча тысячи тысяч",
    5: "lakh lakhs",
    6: "million millions millionen millón millones milhão milhões milioni миллион миллиона",
    7: "crore crores",
    9: "billion billions milliard milliards milliarden miliardi миллиард миллиарда",
    12: "trillion trillions",
}
_SCALES_UNSPACED = {3: "千천", 4: "万萬만", 8: "亿億억"}


def one_of(words: str) -> frozenset[str]:
    """Returns the words of a text."""
    return frozenset(words.split())


def any_of(words: str) -> str:
    """Returns a pattern for any one of some words; an underscore in a word is a blank."""
    longest_first = sorted(words.split(), key=len, reverse=True)
    first_letters = "".join(sorted({word[0] for word in longest_first}))
    patterns = "|".join(re.escape(word).replace("_", r"\s") for word in longest_first)
    return f"(?=[{first_letters}])(?:{patterns})"  # the first letters rule out most places at once


#: Patterns for "answer", for "is", "must be" and the like behind it, and for "or" and "and".
ANSWER = (
    rf"(?:(?<![^\W_])(?:{any_of(_ANSWER)})(?!\w)|{any_of(_ANSWER_UNSPACED)}|[答답](?=[:\s은])|"
    r"(?<![^\n*#])ans\.?(?=[\s*]{0,3}:))"
)
IS = rf"(?:\s{{0,9}}(?:\b(?:{any_of(_IS)})(?!\w)|(?:应该?|應該)?(?:{any_of(_IS_UNSPACED)}))|'s\b)"
OR = rf"(?:\s(?:{any_of(_OR)})(?=[\s$(])|\s?(?:{any_of(_OR_UNSPACED)}))"

#: The words of `OR`, one by one.
OR_WORDS = one_of(f"{_OR} {_OR_UNSPACED}")

#: What may stand between "the answer is" and the letter of a choice.
FILLERS = one_of("""
therefore thus hence clearly definitely certainly most likely probably indeed simply then still also
maybe perhaps possibly even
actually rather the correct right best letter option options choice choices answer statement
alternative i think believe guess would say it it's is must be to
donc la le el il a die réponse respuesta resposta risposta antwort
opción opção opzione alternativa вариант letra lettera lettre buchstabe
选项 選項 選択肢 选 選
( [ :
""") | {"\n"}
#: What may stand behind a letter that is also a word, and what denies that letter.
GOES_ON = one_of(
    "because since as is and or not with for by from due given which rather based so but"
)
DENIALS = one_of("wrong incorrect false not impossible out excluded")

#: What makes a sentence of an answer, at its end: 答えは東京です.
POLITE_END = r"(?<=.)(?:です|でした|である|입니다|이에요|예요)[.。]?$"

#: By how many zeros each word makes a number longer.
SCALES = {
    word: zeros
    for table, split in ((_SCALES, str.split), (_SCALES_UNSPACED, list))
    for zeros, words in table.items()
    for word in split(words)
}
#: A pattern for one of them, right behind a number.
SCALE = (
    rf"(?:\s{{0,3}}(?:{any_of(' '.join(_SCALES.values()))})(?!\w)|"
    rf"\s?[{''.join(_SCALES_UNSPACED.values())}](?![米克瓦卡]))"  # 5千米 is 5 km.
)
