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

_NOT = """
not never neither
nicht weder
pas ni
не
"""
_NOT_UNSPACED = "不是 并非 並非"
_NOT_BEFORE_IS = "no não non не nie niet inte ikke"
_BUT = """
but_rather but rather
sondern
mais
sino
mas
ma bensì
а
maar men
"""
_BUT_UNSPACED = "而是"
_MINUS = """
minus negative
moins
menos
meno
минус мінус
"""
_MINUS_UNSPACED = "マイナス 마이너스 零下 负 負"

_SCALES = {
    2: "hundred",
    3: "thousand thousands tausend mille mil тысяча тысячи тысяч тыс tsd",
    5: "lakh lakhs",
    6: "million millions millionen millón millones milhão milhões milioni миллион миллиона млн mln "
    "mio",
    7: "crore crores",
    9: "billion billions milliard milliards milliarden miliardi миллиард миллиарда млрд mrd",
    12: "trillion trillions",
}
_SCALES_UNSPACED = {3: "千천", 4: "万萬만", 8: "亿億억"}


_UNITS_WITH_PARTS = """
hours hour hrs hr h minutes minute mins min days day weeks week months month years year
feet foot ft pounds pound lbs lb dollars dollar degrees degree
stunden stunde minuten tage tag heures heure jours jour horas hora minutos ore minuti giorni
часов часа час минут дней
"""
_UNITS_WITH_PARTS_UNSPACED = "小时 小時 时 時 点 點 時間 分 年 月 天 元 角 시간 시 년 월"


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
#: "Not", "but", and what stands behind what is denied in Japanese and Korean.
_ONLY = r"(?:only|just|nur|seulement|s[oó]lo|только)\b"
NOT = rf"(?:(?<!\w)(?:{any_of(_NOT)})(?!\w|\s{_ONLY})|{any_of(_NOT_UNSPACED)})"
NOT_BEFORE_IS = rf"(?:{any_of(_NOT_BEFORE_IS)})(?!\w)"
BUT = rf"(?:\s(?:{any_of(_BUT)})(?!\w)|\s?(?:{any_of(_BUT_UNSPACED)}|,\s?是))"
INSTEAD_OF = r"(?:ではなくて?|じゃなくて?|[가이]\s?아니[라고])[,、]?\s?"
#: "Minus" before a number, but not "al menos", which is "at least".
MINUS = (
    rf"(?:\b(?:{any_of(_MINUS)})(?<!\bal\smenos)(?<!\blo\smenos)(?<!\bau\smoins)\s{{1,3}}|"
    rf"(?:{any_of(_MINUS_UNSPACED)})\s?)"
)
#: What stands before a time in the morning, and in the afternoon.
FORENOON = "上午|凌晨|早上|午前|오전"
AFTERNOON = "下午|晚上|午後|오후"
#: Words that take an answer back, up to the number or letter that takes its place.
RETRACTED = (
    r"(?=[a-z不等])(?:(?<![\s\S])|(?<=[.,;:!?(\u2014]\s)|(?<=[,\n\u2014\u3002])|(?<=\sor\s))"
    r"(?:(?:wait|oh|(?:but\s)?(?:it(?:'s|\sis)\s)?actually|sorry|oops|correction|hmm|i\smean|"
    r"i\swas\swrong|my\smistake|on\ssecond\sthought|scratch\sthat|digo|perdón)(?!\w)|no(?=[,.;:!\u2014]|\s(?:\u2014|wait|it|actually))|不对|不對|等等)[\s,.:;!?\u2014]{0,5}"
    r"(?:(?:no|oh|wait|actually|hmm|sorry|it(?:'s|\sis)|that's|should\sbe|must\sbe|rather)(?!\w)"
    r"[\s,.:;!\u2014]{0,5}|应?该?是){0,6}"
    r"(?=[\\$\u20ac\u00a3]{0,2}[-+]?[0-9][0-9.,/:]{0,30}%?\$?(?:\s[^\W\d]{1,20})?\s*(?:[.,;!)\n\u3002]|$)|"
    r"\(?(?-i:[A-Z])\)?\s*(?:[.,;!\n]|$))"
)
OR = rf"(?:\s(?:{any_of(_OR)})(?=[\s$(])|\s?(?:{any_of(_OR_UNSPACED)}))"

#: Units that are told with a smaller one behind them: 5 feet 7 inches.
UNIT_WITH_PARTS = rf"(?:{any_of(_UNITS_WITH_PARTS)})(?!\w)|{any_of(_UNITS_WITH_PARTS_UNSPACED)}钟?"

#: The words of `OR`, one by one.
OR_WORDS = one_of(f"{_OR} {_OR_UNSPACED}")

#: What stands before the letter of a choice, and behind it.
OPTION = (
    r"(?:option|choice|letter|opci[oó]n|opção|opzione|alternativa|variante|вариант|letra|lettera|"
    r"lettre|antwort|буква|विकल्प|선택지)"
)
OPTION_BEHIND = "(?:选项|選項|项|項|番|번|şıkkı)"

#: What may stand between "the answer is" and the letter of a choice.
FILLERS = one_of("""
therefore thus hence clearly definitely certainly most likely probably indeed simply then still also
maybe perhaps possibly even only
actually rather the correct right best letter option options choice choices answer statement
alternative i think believe guess would say it it's is must be to
donc la le el il a die réponse respuesta resposta risposta antwort
opción opção opzione alternativa вариант letra lettera lettre buchstabe
选项 選項 選択肢 选 選
( [ :
""") | {"\n"}
#: What may stand behind a letter that is also a word, and what denies that letter.
GOES_ON = one_of(
    "because since as is and or not with for by from due given which rather based so but only"
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
