import pytest

from haltwise import MEAN_LOGPROB, Halting
from haltwise.session.thought import LONGEST_OPENING, PointRules, Thought

RULES = PointRules(Halting("at_halt", "every 4 tokens", "</think>", MEAN_LOGPROB))


@pytest.mark.parametrize(
    ("before", "begins"), [(LONGEST_OPENING - 1, True), (LONGEST_OPENING, False)]
)
def test_a_thought_begins_early_or_is_only_mentioned(before: int, begins: bool) -> None:
    progress = Thought(RULES, "q <think></think>")
    for text in [*["a"] * before, "<think>", *["b"] * 8]:
        progress.add(text)
    assert progress.begun == begins
    assert progress.num_points == 2 * begins
    assert progress.position == (before + 9 if begins else LONGEST_OPENING)
    assert progress.num_tokens == before + 9


@pytest.mark.parametrize(
    ("tokens", "points"),
    [
        (["a", "\n\nWait", "b"], [2]),
        (["a", "\n\n", "Wa", "it", "b"], [4]),
        (["\n\nWai", "tx\n\nWait", "\n\nWai", "x"], [2]),
        (["\n", "\n", "W", "a", "i", "t", "t"], [6]),
        (["\n\nWa", "</think>", "it"], []),
    ],
    ids=repr,
)
def test_a_text_that_a_point_follows_may_have_several_tokens(
    tokens: list[str], points: list[int]
) -> None:
    rules = PointRules(Halting("at_halt", "after \n\nWait", "</think>", MEAN_LOGPROB))
    progress, found = Thought(rules, "<think>"), []
    for token in tokens:
        progress.add(token)
        found += [progress.position] * progress.at_point
    assert found == points and progress.num_points == len(points)
