import pytest

from haltwise import MEAN_LOGPROB, DecisionRule, Halting, InputError


@pytest.mark.parametrize(
    ("rule", "every", "every_repeated"),
    [
        ("every 8 tokens", 8, 8),
        ("every 8 tokens, every 4 while the answer repeats, at most 9", 8, 4),
        ("after every 8 tokens", None, None),
    ],
)
def test_a_rule_says_how_far_apart_points_lie(
    rule: str, every: int | None, every_repeated: int | None
) -> None:
    found = DecisionRule(rule)
    assert (found.every, found.every_repeated) == (every, every_repeated)
    assert found.looks_at_answers == (every != every_repeated)
    found.check_runnable()


@pytest.mark.parametrize(
    "rule",
    [
        "every 0 tokens",
        "every 8 tokens, at most 0",
        "every 8 tokens, every 3 while the answer repeats",
        "every 8 tokens, every 0 while the answer repeats",
        "every 4 tokens, every 8 while the answer repeats",
        "every 8 tokens, every 4",
        "boundaries",
        "",
    ],
)
def test_a_rule_that_makes_no_sense_is_not_run(rule: str) -> None:
    with pytest.raises(InputError, match="is none that can be run"):
        DecisionRule(rule).check_runnable()


def test_who_does_not_look_at_answers_has_no_rule_that_does() -> None:
    rule = "every 8 tokens, every 4 while the answer repeats"
    with pytest.raises(InputError, match="looks at answers, but probing is at_halt"):
        Halting("at_halt", rule, "</think>", MEAN_LOGPROB)
