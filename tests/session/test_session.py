from dataclasses import replace

import numpy as np
import pytest

from haltwise import HaltHead, Session, Signals, Terms, ThoughtRequest, answer_keys
from haltwise.session.control import ConstantControl
from haltwise.session.thought import NEVER, PointRules, Thought
from tests.heads import random_head

ALWAYS, NEVER_HALTS = 10.0, 0.1


def running(
    head: HaltHead, terms: Terms, text: str = "", prompt: str = "<think>"
) -> tuple[Session, Thought]:
    """A session with one request in row 1 of 2, after some tokens of a letter each."""
    session, thought = Session(head, 2), Thought(PointRules(head.config.halting), prompt)
    session.join(1, ThoughtRequest(terms), thought)
    for token in text:
        thought.add(token)
    session.look(1)
    return session, thought


def seen(_: object, thoughts: list[Thought]) -> Signals:
    (thought,) = thoughts
    return Signals(np.array([thought.position]), answer=answer_keys(["a"]))


def unseen(_: object, thoughts: list[Thought]) -> Signals:
    return Signals(np.array([thought.position for thought in thoughts]))


def unasked(*_: object) -> Signals:
    raise AssertionError("there is no decision point")


def test_a_head_is_asked_at_points_and_a_report_tells_what_came_of_it(run_head: HaltHead) -> None:
    # The head halts at a price of 10 at the first answer; a point is every 50 tokens.
    session, _ = running(run_head, Terms(ALWAYS), "x" * 50)
    assert session.points([0, 1]).tolist() == session.waiting([1]) == [1]
    assert session.decide([1], seen) == [1]
    assert not session.open.any() and session.next_look.tolist() == [NEVER, NEVER]
    report = session.finish(1)
    found = (report.reason, report.position, report.num_points, report.decided_at, report.price)
    assert found == ("halted", 50, 1, 50, ALWAYS)
    assert report.halted and not session.running


@pytest.mark.parametrize(
    ("terms", "prompt", "text", "expected"),
    [
        (Terms(NEVER_HALTS), "<think>", "x" * 50, [50, 100]),
        (Terms(0.0), "<think>", "x" * 50, [NEVER, NEVER]),
        (Terms(0.0, max_tokens=70), "<think>", "x" * 50, [70, 70]),
        (Terms(ALWAYS, max_tokens=70), "<think>", "x" * 55, [50, 70]),
        # The cap of a thought that has not begun may be reached with any token.
        (Terms(ALWAYS, max_tokens=3), "", "x" * 7, [3, 8]),
        # It never begins.
        (Terms(ALWAYS, max_tokens=3), "", "x" * 64, [3, NEVER]),
    ],
)
def test_a_row_need_not_be_looked_at_before_something_is_to_be_decided(
    run_head: HaltHead, terms: Terms, prompt: str, text: str, expected: list[int]
) -> None:
    session, thought = running(run_head, terms, "", prompt)
    looks = [int(session.next_look[1])]
    for token in text:
        thought.add(token)
    session.look(1)
    assert [*looks, int(session.next_look[1])] == expected
    assert session.next_look[0] == NEVER


def test_a_cap_holds_between_points_and_where_the_head_may_not_halt(run_head: HaltHead) -> None:
    session, thought = running(run_head, Terms(ALWAYS, min_tokens=60, max_tokens=60), "x" * 50)
    assert session.decide([1], seen) == []
    for token in "x" * 10:
        thought.add(token)
    assert (session.points([1]).tolist(), session.waiting([1])) == ([], [1])
    assert session.decide([1], unasked) == [1]
    report = session.finish(1)
    assert (report.reason, report.position) == ("capped", 60)


def test_a_thought_that_has_not_begun_has_no_cap_to_reach(run_head: HaltHead) -> None:
    session, thought = running(run_head, Terms(ALWAYS, max_tokens=3), "x" * 7, prompt="")
    assert session.waiting([1]) == session.decide([1], unasked) == []
    thought.add("<think>")
    assert session.decide(session.waiting([1]), seen) == [1]
    assert (session.report(1).reason, session.report(1).position) == ("capped", 8)


def test_there_is_nothing_to_decide_at_the_last_token(run_head: HaltHead) -> None:
    session, thought = running(run_head, Terms(ALWAYS, max_tokens=50), "x" * 50)
    thought.end(by_lm=True)
    assert session.waiting([1]) == []
    session.look(1)
    assert not session.open.any()
    assert session.finish(1).reason == "closed by the LM"


def test_a_missing_signal_halts_nothing_and_is_counted(run_head: HaltHead) -> None:
    session, thought = running(run_head, Terms(ALWAYS), "x" * 50)
    assert session.decide([1], unseen) == []
    assert session.report(1).num_bad_signals == session.num_bad_signals == 1
    session.skip(1)
    assert session.waiting([1]) == [] and not thought.at_point
    assert session.finish(1).num_bad_signals == 2


def test_a_halted_row_can_be_left_to_its_lm_or_tried_again(run_head: HaltHead) -> None:
    session, thought = running(run_head, Terms(ALWAYS), "x" * 50)
    session.decide([1], seen)
    session.undo(1)
    assert session.open[1] and session.report(1).reason == "cut off"
    assert session.decide([1], seen) == [1]
    session.release(1, "late")
    assert not session.open.any() and session.decide([1], seen) == []
    thought.end(by_lm=True)
    report = session.finish(1)
    found = (report.reason, report.halted, report.decided_at, report.fallback)
    assert found == ("closed by the LM", False, 50, "late")


def test_a_row_that_is_released_is_not_even_capped(run_head: HaltHead) -> None:
    session, thought = running(run_head, Terms(ALWAYS, max_tokens=50), "x" * 49)
    session.release(1)
    thought.add("x")
    assert not session.open.any() and session.decide([1], unasked) == []
    assert session.report(1).reason == "cut off"


def test_a_row_that_was_not_seen_whole_keeps_its_cap(run_head: HaltHead) -> None:
    session, _ = running(run_head, Terms(ALWAYS, max_tokens=70), "x" * 50)
    session.lose(1)
    assert (session.points([1]).tolist(), session.next_look[1]) == ([], 70)
    session, _ = running(run_head, Terms(ALWAYS), "x" * 50)
    session.lose(1)
    assert not session.open.any()


@pytest.mark.parametrize(
    ("prompt", "text", "ends", "reason"),
    [
        ("<think>", ["x", "</think>", "7"], None, "closed by the LM"),
        ("<think>", ["x", "y"], True, "closed by the LM"),
        ("<think>", ["x", "y"], False, "token budget"),
        ("<think>", ["x", "y"], None, "cut off"),
        ("", ["x", "y"], None, "cut off"),
        ("", ["x", "y"], True, "no thought"),
        ("", ["x"] * 64, None, "no thought"),
        ("<think></think>", ["x", "<thi", "nk>", "</think>"], None, "closed by the LM"),
        # A second thought is part of the answer.
        ("<think>", ["</think>", "<think>", "x"], None, "closed by the LM"),
    ],
)
def test_one_vocabulary_says_why_a_thought_ended(
    prompt: str, text: list[str], ends: bool | None, reason: str
) -> None:
    session, thought = running(random_head(0), Terms(NEVER_HALTS), "", prompt)
    for token in text:
        thought.add(token)
    if ends is not None:
        thought.end(by_lm=ends)
    report = session.finish(1)
    assert (report.reason, report.halted) == (reason, False)


def test_a_thought_that_opens_again_is_not_halted_again(run_head: HaltHead) -> None:
    session, thought = running(run_head, Terms(ALWAYS, max_tokens=50))
    for token in ["x", "</think>", "<think>", *"x" * 97]:
        thought.add(token)
    assert (thought.position, thought.num_tokens, thought.num_points) == (2, 100, 0)
    assert session.waiting([1]) == session.decide([1], unasked) == []
    assert session.finish(1).position == 2


@pytest.mark.parametrize("looked_at", [True, False])
def test_a_control_may_look_at_a_request_that_it_never_halts(
    run_head: HaltHead, looked_at: bool
) -> None:
    class Looking(ConstantControl):
        def terms(self, request: ThoughtRequest) -> Terms:
            return replace(request.terms, price=0.0, looked_at=looked_at)

    session, thought = Session(run_head, 1, Looking()), Thought(PointRules(run_head.config.halting))
    assert session.join(0, ThoughtRequest(Terms(ALWAYS)), thought) == looked_at
    for token in "x" * 40:
        thought.add(token)
        session.look(0)
        assert len(session.points([0])) == (looked_at and thought.at_point)


def test_a_row_that_is_joined_anew_finishes_who_was_there(run_head: HaltHead) -> None:
    told = []

    class Telling:
        moves_prices = False

        def terms(self, request: ThoughtRequest) -> Terms:
            return Terms(request.terms.price / 2)

        def price(self, running: object) -> float:
            return 1.0

        def finished(self, report: object) -> None:
            told.append(report)

    session, rules = Session(run_head, 1, Telling()), PointRules(run_head.config.halting)
    for _ in range(2):
        assert session.join(0, ThoughtRequest(Terms(4.0)), Thought(rules))
    assert session.running[0].terms.price == 2.0
    assert len(told) == 1
    assert not session.join(0, ThoughtRequest(Terms(0.0)), Thought(rules))
