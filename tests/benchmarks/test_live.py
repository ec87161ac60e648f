"""What the live benchmark asks, and what it makes of what it has seen."""

from typing import Any

import pytest

from benchmarks.live import LiveConfig, Look, Run, Served, _part, _reaction, _stream
from haltwise import InputError
from lms.tasks import questions

CONFIG = LiveConfig(requests=9, shift=5, before="sum:short", after="let")


def test_the_questions_become_harder_at_the_shift() -> None:
    asked = list(_stream(CONFIG))
    assert [one.task for one in asked] == ["sum"] * 5 + ["let"] * 4
    assert {one.segment for one in asked[:5]} == {"short"}
    assert {one.split for one in asked} == {"test"} and len({one.text for one in asked}) == 9


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([(7, 1.0, 0), (8, 0.0, 1), (9, 0.5, 1)], (2, 3, 4)),
        ([(7, 2.0, 0), (8, 0.0, 1), (9, 0.0, 1)], (3, 3, None)),
        ([(7, 3.0, 0)], (None, None, None)),
    ],
)
def test_the_reaction_is_counted_from_the_shift(
    seen: list[tuple[int, float, int]], expected: tuple[Any, ...]
) -> None:
    interval = {"low": 0.0, "estimate": 0.0, "high": 0.0}
    looks = [(0, 0.0, 0), (3, 1.0, 0), (4, 2.0, 0), (5, 2.0, 0), *seen]
    run = Run(looks=[Look(*one, 10, interval, interval) for one in looks])
    told = _reaction(run, CONFIG)
    names = ("price_fell_after", "breaker_opened_after", "certified_anew_after")
    assert tuple(told[name] for name in names) == expected
    assert (told["first_halt_after"], told["price_at_shift"]) == (3, 2.0)


def test_what_was_lost_is_that_the_full_answer_is_right_and_the_served_one_is_not() -> None:
    (question,) = questions("sum", "test", 1)
    served = {n: Served(question, "wrong" if n < 2 else question.gold, n < 3, 50) for n in range(5)}
    full = {n: Served(question, question.gold, False, 100) for n in range(4)}
    told = _part(Run(served, full), range(5), range(4))
    assert told["requests"] == 5 and told["halted"] == told["em"] == 0.6
    assert told["loss"] == told["saving"] == 0.5
    # The variance of two of four is 1/3, and that of their mean a quarter of it.
    assert told["loss_high"] - 0.5 == pytest.approx(1.96 * (1 / 12) ** 0.5)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"shift": 0}, "--shift is 0"),
        ({"at_once": 0}, "--at-once is 0"),
        ({"requests": 5}, "--requests is 5, expected more than 5"),
        ({"before": "sums"}, "--before is 'sums', expected one of sum, let, leap, leap:long"),
        ({"after": "sum:huge"}, "--after is 'sum:huge', expected one of"),
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, Any], expected: str) -> None:
    settings: dict[str, Any] = {"requests": 9, "shift": 5}
    with pytest.raises(InputError, match=expected):
        LiveConfig(**settings | wrong).check()
