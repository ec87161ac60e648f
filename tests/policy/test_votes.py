import itertools

import pytest

from haltwise.policy.votes import elected, is_settled


@pytest.mark.parametrize(
    ("answers", "expected"),
    [(["7"], 0), (["7", "8", "8"], 1), (["7", "8"], 0), (["", "8"], 1), (["", ""], 0)],
)
def test_most_answers_win_and_of_equals_the_earliest(answers: list[str], expected: int) -> None:
    assert elected(answers) == expected


@pytest.mark.parametrize("num", [1, 2, 3, 4, 5])
def test_what_is_settled_is_what_no_further_thought_could_change(num: int) -> None:
    for so_far in range(1, num + 1):
        for answers in itertools.product(["", "7", "8"], repeat=so_far):
            further = itertools.product(["", "7", "8", "9"], repeat=num - so_far)
            winners = {(*answers, *more)[elected([*answers, *more])] for more in further}
            if is_settled(answers, num):
                assert winners == {answers[elected(answers)]}
    assert is_settled(["7", "7"], 3) and not is_settled(["7", "8"], 3)
    assert not is_settled(["7", ""], 3) and is_settled(["7", "7", ""], 4)
