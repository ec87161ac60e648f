import numpy as np
import pytest

from haltwise import InputError
from haltwise.policy.question import Question, QuestionReader


def test_characters_words_and_numbers_are_counted() -> None:
    assert Question("sum : 12 + 3").counts == pytest.approx(np.log1p([12, 5, 2]).tolist())
    assert Question().counts == (0, 0, 0)


def test_what_is_frequent_is_told_apart() -> None:
    questions = [Question("a b", "t", "easy")] * 3 + [Question("a", "u", "easy")] * 2
    questions += [Question("", "rare", "")]
    reader = QuestionReader.fit(questions, fewest=2)
    assert reader.names == (
        "task t",
        "task u",
        "t/easy",
        "u/easy",
        "log_characters",
        "log_words",
        "log_numbers",
    )
    rows = reader.read([Question("a b", "u", "easy"), Question("", "t"), Question("a", "rare")])
    assert rows[:, :4].tolist() == [[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    words = np.log1p([2, 2, 2, 1, 1])
    assert rows[0, 5] == pytest.approx((words[0] - words.mean()) / words.std(), rel=1e-5)
    assert rows[1, 4:].tolist() == [0, 0, 0]  # of no text nothing is known
    assert rows[:, 6].tolist() == [0, 0, 0]  # none has a number


def test_one_task_without_text_tells_nothing() -> None:
    reader = QuestionReader.fit([Question(task="t")] * 30)
    assert reader.names == ()
    assert reader.read([Question("a", "t")]).shape == (1, 0)


def test_a_reader_that_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="found 1 means and 1 scales of a question, expected 3"):
        QuestionReader(mean=(1.0,), scale=(1.0,))
    with pytest.raises(InputError, match="not positive"):
        QuestionReader(mean=(1.0,) * 3, scale=(0.0,) * 3)
