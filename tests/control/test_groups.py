"""The state of all groups is a fold of events; groups are kept apart, and nonsense is counted."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
import pytest

from haltwise import InputError
from haltwise.control import groups
from haltwise.control.governor import Promise
from haltwise.control.groups import (
    EVERYTHING,
    BrokenOff,
    Complained,
    Drawn,
    Event,
    Expired,
    Gone,
    Groups,
    Opened,
    Rated,
    Told,
    event_from_json,
    event_to_json,
)

PROMISE = Promise(audit=0.1, rest=0.1)
K = 4
BEGUN = Groups.begin(PROMISE, K, certified=3, most_groups=3)
KNOWN = (False,) * K


def drawn(request: str, *names: str, step: int = 2, rate: float = 0.1) -> Drawn:
    return Drawn(request, step, dict.fromkeys([EVERYTHING, *names], rate))


def told(request: str, *losses: float, due: tuple[bool, ...] = KNOWN) -> Told:
    return Told(request, losses, due)


def fold(events: Sequence[Event], state: Groups = BEGUN) -> Groups:
    return reduce(Groups.after, events, state)


def text(state: Groups) -> str:
    return json.dumps(state.to_json())


def story(num: int = 300, seed: int = 0) -> list[Event]:
    """Audits of a few groups that tell late, with labels that come later, or never, or twice."""
    rng, events = np.random.default_rng(seed), list[Event]()
    for n in range(num):
        names = rng.choice(["math", "code", "tenant", "late"], 2, replace=False).tolist()
        events.append(drawn(f"r{n}", *names, step=int(rng.integers(0, 5))))
        other = f"r{int(rng.integers(0, n + 1))}"
        losses = tuple(np.sort(rng.random(K) < 0.2).astype(float).tolist())
        due = tuple(bool(loss) and bool(rng.random() < 0.5) for loss in losses)
        events.append(told(other, *losses, due=due))
        endings: list[Event] = [Expired(other), BrokenOff(f"r{n}"), Complained("math", 0.5)]
        events.append(endings[n % 3])
        events += [Opened("code")] if n == num // 2 else []
    return events


@pytest.mark.whole
def test_a_state_is_the_fold_of_its_events_wherever_it_is_cut() -> None:
    whole, state = fold(story()), BEGUN
    for event in story():
        state = Groups.from_json(json.loads(text(state)))
        state = state.after(event_from_json(json.loads(json.dumps(event_to_json(event)))))
    assert text(state) == text(whole)
    assert whole.num_refused > 0 and whole.num_pooled > 0 and set(whole.groups) > {EVERYTHING}


def test_a_request_is_served_the_strictest_of_its_groups() -> None:
    state = fold([drawn("a", "math"), told("a", 1, 1, 1, 1), Opened("math")])
    assert (state.step([]), state.step(["code"]), state.step(["math", "code"])) == (3, 3, 0)
    assert state.rates(["math"]) == {"math": 1.0, EVERYTHING: 0.1}
    assert state.rates([]) == {EVERYTHING: 0.1}


def test_groups_that_are_too_many_are_pooled_and_told() -> None:
    state = fold([drawn(f"r{n}", f"segment {n}") for n in range(10_000)][:200])
    assert len(state.groups) == 3 and state.num_pooled == 198
    assert state.rates(["segment 77"]) == {EVERYTHING: 0.1}


def test_who_is_gone_tells_no_more_of_its_audits() -> None:
    events = [replace(drawn(name), process=name[0]) for name in ("a1", "a2", "b1")]
    due = told("a2", 0, 0, 1, 1, due=(False, False, True, True))
    state = fold([*events, due, Gone("a")])
    assert set(state.under_way) == {"a2", "b1"}  # anybody may tell its label
    assert text(state) == text(fold([*events, due, BrokenOff("a1")]))
    assert text(fold([Gone("a"), Expired("a1")], state)) == text(state)


def capital(state: Groups) -> list[Any]:
    logs: list[Any] = state.groups[EVERYTHING].evidence.log_capital.tolist()
    return logs


def test_what_waits_for_labels_counts_as_lost_until_they_come() -> None:
    begun = drawn("a")
    waiting = fold([begun, told("a", 1, 1, 1, 1, due=(True,) * K)])
    lost = fold([begun, told("a", 1, 1, 1, 1)])
    won = fold([begun, told("a", 0, 0, 0, 0)])
    assert capital(waiting) == capital(lost) < capital(won)
    # The reach waits for what the served step lost.
    reach = [float(state.groups[EVERYTHING].reach) for state in (waiting, lost, won)]
    assert reach[1] < reach[0] and reach[2] == reach[0]


def test_audits_are_evidence_in_the_order_of_their_draws_whenever_they_tell() -> None:
    """So who tells first chooses nothing, and what is still under way costs nothing."""
    rng = np.random.default_rng(0)
    losses = {f"r{n}": np.sort(rng.random(K) < 0.1).astype(float).tolist() for n in range(60)}
    in_order = fold([*map(drawn, losses), *(told(r, *losses[r]) for r in losses)])
    for _ in range(5):
        late = [told(str(r), *losses[str(r)]) for r in rng.permutation(list(losses))]
        state = fold([drawn(r) for r in losses])
        assert capital(state) == capital(BEGUN)
        state = fold(late, state)
        assert capital(state) == capital(in_order) and not state.under_way
        passed = [one.groups[EVERYTHING].evidence.passed.tolist() for one in (state, in_order)]
        assert passed[0] == passed[1]


def test_what_is_bet_on_an_audit_hangs_on_nothing_that_is_told_behind_its_draw() -> None:
    state = fold([drawn("a", "math"), drawn("b", "math")])
    bets = state.under_way["b"].stakes
    assert set(bets) == {EVERYTHING, "math"} and len(bets["math"]) == K
    state = fold([told("a", 1, 1, 1, 1), drawn("c", "math")], state)
    assert state.under_way["b"].stakes == bets
    assert set(state.under_way["c"].stakes["math"]).isdisjoint(bets["math"])


def test_one_that_has_not_told_holds_up_those_behind_it() -> None:
    events: list[Event] = [*map(drawn, "abc"), told("b", 0, 0, 0, 1), told("c", 0, 0, 0, 0)]
    held = fold(events)
    assert capital(held) == capital(BEGUN) and set(held.under_way) == set("abc")
    assert held.after(told("b", 0, 0, 0, 0)) == replace(held, num_refused=1)  # it has told all
    freed = held.after(BrokenOff("a"))
    assert capital(freed) == capital(fold([e for e in events if e != drawn("a")]))
    assert not freed.under_way and int(freed.groups[EVERYTHING].num_audits) == 2


def test_one_that_holds_up_too_many_counts_as_lost_until_it_tells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(groups, "_MOST_HELD_UP", 1)
    state = fold([*map(drawn, "abc")])
    assert capital(state) == capital(fold([drawn("a"), told("a", 1, 1, 1, 1)]))
    assert fold([told("a", 0, 0, 0, 1)], state).groups[EVERYTHING].num_audits == 1
    for ending in (told("a", 0, 0, 0, 0), BrokenOff("a")):
        late = fold([ending, told("b", 0, 0, 0, 0), told("c", 0, 0, 0, 0)], state)
        assert not late.under_way and int(late.groups[EVERYTHING].num_audits) == 3
    assert capital(fold([BrokenOff("a")], state)) == pytest.approx(np.array(capital(BEGUN)))


def test_many_requests_at_once_certify_in_their_first_epoch() -> None:
    """All of them are audits at first, and always 300 are under way."""
    state, num = Groups.begin(PROMISE, K, most_groups=1), 0
    due = state.audits_due()
    while state.step([]) == 0:
        state = state.after(drawn(f"r{num}", step=0, rate=1.0))
        if num >= 300:
            state = state.after(told(f"r{num - 300}", 0, 0, 0, 0))
        num += 1
    everything = state.groups[EVERYTHING]
    assert due + 300 <= num <= due + 350 and int(everything.epoch) == 0


def test_labels_may_come_late_once_or_never() -> None:
    due = told("a", 0, 1, 1, 1, due=(False, True, True, True))
    waiting = fold([drawn("a"), due])
    assert float(waiting.groups[EVERYTHING].reach) == float(BEGUN.groups[EVERYTHING].reach)
    never = waiting.after(Expired("a"))
    labelled = waiting.after(told("a", 0, 0, 0, 1))
    at_once = fold([drawn("a"), told("a", 0, 0, 0, 1)])
    assert never.groups[EVERYTHING].reach < labelled.groups[EVERYTHING].reach
    assert labelled.groups[EVERYTHING].reach == at_once.groups[EVERYTHING].reach
    lost = fold([drawn("a"), told("a", 0, 1, 1, 1)])
    for one, other in ((labelled, at_once), (never, lost)):
        found, expected = (vars(each.groups[EVERYTHING].evidence) for each in (one, other))
        for name, value in found.items():
            assert value == pytest.approx(expected[name], abs=1e-12), name
    for state in (never, labelled):
        again = state.after(told("a", 0, 0, 0, 0))
        assert again == replace(state, num_refused=1)


def test_what_an_audit_lost_is_felt_after_the_breaker_has_opened() -> None:
    """But it is no evidence about the new epoch."""
    state = fold([drawn("a"), Opened(EVERYTHING)])
    for loss in (0.0, 1.0):
        after = state.after(told("a", *[loss] * K))
        assert capital(after) == capital(BEGUN)
    assert after.groups[EVERYTHING].reach < state.groups[EVERYTHING].reach


def test_false_feedback_moves_its_own_group_alone_and_only_down() -> None:
    calm: list[Event] = [drawn("a", "honest"), drawn("b", "liar"), told("a", 0, 0, 0, 0)]
    before, lies = fold(calm), [Complained("liar", w) for w in (1.0, 0.0, 1.0, 5.0, -1.0, math.nan)]
    after = fold([*calm, *lies, *[Complained("liar", 1.0)] * 100])
    assert after.num_refused == 3
    assert after.step(["liar"]) == 0 and after.step(["honest"]) == before.step(["honest"]) == 3
    for name in ("honest", EVERYTHING):
        assert after.groups[name].to_json() == before.groups[name].to_json()
    assert fold([Complained(EVERYTHING, 1.0)]).num_refused == 1  # nobody speaks for all


def test_a_dial_is_its_users_own_and_never_laxer_than_its_groups() -> None:
    def steps(*scores: float) -> tuple[int, int]:
        state = fold([Rated("u", score) for score in scores])
        assert state.groups == BEGUN.groups
        return state.step([], ["u"]), state.step([], ["v"])

    assert steps() == steps(1, 1) == steps(0, 1, 1) == steps(0.5) == (3, 3)
    assert [steps(*[0] * n) for n in (1, 2, 3, 4, 9)] == [(2, 3), (1, 3), (0, 3), (0, 3), (0, 3)]
    assert steps(*[0] * 9, 1, 1) == (1, 3)
    both = fold([Rated("u", 0), Rated("v", 0), Rated("v", 0)])
    assert both.step([], ["u", "v"]) == both.step([], ["v"]) == 1


def test_the_dial_that_was_moved_longest_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_MOST_DIALS", 2)
    assert list(fold([Rated(user, 0) for user in "abac"]).dials) == ["a", "c"]


def test_it_says_how_many_audits_are_due() -> None:
    state = Groups.begin(PROMISE, K)
    due = state.audits_due()
    for n in range(due):
        assert state.step([]) == 0 and state.rates([]) == {EVERYTHING: 1.0}
        state = fold([drawn(f"r{n}", step=0, rate=1.0), told(f"r{n}", 0, 0, 0, 0)], state)
    assert state.step([]) == K and state.audits_due() == 0


@pytest.mark.parametrize(
    "event",
    [
        told("unknown", 0, 0, 0, 0),
        told("a", 0, 0, 0),
        told("a", 0, 0, 0, math.nan),
        told("a", 0, 0, 0, 2),
        told("a", -2, 0, 0, 0),
        BrokenOff("unknown"),
        Opened("unknown"),
        Complained("unknown", 2.0),
        Rated("", 1.0),
        Rated("u", 1.1),
        Rated("u", math.nan),
        drawn("a"),
        drawn("b", step=9),
        drawn("b", rate=0.01),
        drawn("b", rate=math.nan),
    ],
    ids=str,
)
def test_an_event_that_makes_no_sense_is_counted_and_changes_nothing(event: Event) -> None:
    state = fold([drawn("a")])
    assert text(state.after(event)) == text(replace(state, num_refused=1))


@pytest.mark.parametrize(
    "wrong",
    [dict(confidence=1.0), dict(num_prices=0), dict(most_groups=0), dict(certified=9)],
)
def test_a_beginning_that_is_none(wrong: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"promise": PROMISE, "num_prices": K}
    with pytest.raises(InputError, match="expected"):
        Groups.begin(**asked | wrong)


@pytest.mark.parametrize("data", [{}, {"event": "Slept"}, {"event": "Told", "mood": 1}])
def test_what_is_no_event(data: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="event is not readable"):
        event_from_json(data)
    with pytest.raises(InputError, match="not readable"):
        Groups.from_json(data)
