"""A group that is promised less loss than everything has a certificate and a bound of its own."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haltwise import InputError
from haltwise.control import groups
from haltwise.control.ceiling import fewest_audits
from haltwise.control.governor import Promise
from haltwise.control.group_names import whole_tenant
from haltwise.control.groups import EVERYTHING, BrokenOff, Complained, Drawn, Event, Groups, Opened
from haltwise.control.targets import read_targets
from tests.control.test_governor import Request, requests
from tests.control.test_groups import K, fold, story, text, told

PROMISE = Promise(target=0.2, audit=0.1, rest=0.1, cooling=30)
STRICT = {"task:math": 0.05, "tenant:t": 0.1}
BEGUN = Groups.begin(PROMISE, K, certified=3, targets=STRICT)
TASK = "tenant:t task:code"


def drawn(state: Groups, request: str, *names: str, rate: float = 1.0) -> Drawn:
    """An audit of some groups as the control draws it."""
    return Drawn(request, state.step(names), dict.fromkeys(state.rates(names), rate))


def audited(state: Groups, *names: str, losses: tuple[float, ...] = (0.0,) * K) -> Groups:
    """The state after an audit that every group counts."""
    return fold([drawn(state, "r", *names), told("r", *losses)], state)


def test_the_level_is_shared_and_its_parts_sum_to_what_is_promised() -> None:
    """Half for everything; a sixth each for two own targets and for all other groups together."""
    own = [float(BEGUN.groups[name].level) for name in STRICT]
    assert own == pytest.approx([0.1 / 6] * 2)
    names = [f"segment:{n}" for n in range(200)]
    full = fold([Drawn(name, 0, {name: 1.0}) for name in names], BEGUN)
    assert len(full.groups) == 100
    assert float(full.groups["segment:0"].level) == pytest.approx(0.05 / 12)
    total = sum(float(one.level) for one in full.groups.values())
    assert total == pytest.approx(0.1 - 0.05 / 100) and total < 0.1
    assert float(Groups.begin(PROMISE, K).groups[EVERYTHING].level) == pytest.approx(0.05)


@pytest.mark.parametrize("group", STRICT)
def test_nothing_is_halted_before_the_groups_own_audits_vouch(group: str) -> None:
    """Whatever everything's have certified by then."""
    state, level = BEGUN, 0.9 * 0.1 / 6
    due = fewest_audits(STRICT[group], level, PROMISE.deadline)
    assert state.audits_due() == 0 and state.audits_due(group) == due
    for _ in range(due):
        assert state.step([]) >= 3 and state.step([group]) == state.ceiling([group]) == 0
        assert state.rates([group])[group] == 1.0 and state.rates([])[EVERYTHING] == 0.1
        state = audited(state, group)
    assert state.audits_due(group) == 0 and state.step([group]) == K
    assert state.rates([group])[group] == 0.1
    other = next(name for name in STRICT if name != group)
    assert state.step([other]) == state.step([group, other]) == 0


def test_each_group_is_measured_by_its_own_target() -> None:
    state = fold([Drawn("r", 2, {EVERYTHING: 0.5, "task:math": 0.5, "task:a": 0.5})], BEGUN)
    lost = fold([told("r", 0, 1, 1, 1)], state)
    for name, target in {EVERYTHING: 0.2, "task:math": 0.05, "task:a": 0.2}.items():
        fell = float(state.groups[name].reach) - float(lost.groups[name].reach)
        assert fell == pytest.approx(0.02 * 0.1 / 0.5 * (1 - target))
        alarm = np.mean([1 + bet * (1 - target) for bet in (0.5, 1, 2)])
        assert float(lost.groups[name].alarm.mean()) == pytest.approx(alarm)


def test_an_audit_that_is_none_moves_no_bet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_MOST_HELD_UP", 0)
    state = fold([drawn(BEGUN, name, "task:math") for name in "ab"], BEGUN)
    begun = BEGUN.groups["task:math"].evidence
    assert (state.groups["task:math"].evidence.log_capital < begun.log_capital).all()  # a is lost
    done = fold([BrokenOff("a"), BrokenOff("b")], state)
    for name in (EVERYTHING, "task:math"):
        assert done.groups[name].evidence.log_capital == pytest.approx(begun.log_capital)


def test_a_tenants_target_holds_for_all_that_it_asks() -> None:
    assert BEGUN.rates([TASK]) == {TASK: 0.1, "tenant:t": 1.0, EVERYTHING: 0.1}
    assert [BEGUN.promise_of(name).target for name in (TASK, "tenant:t")] == [0.1, 0.1]
    assert BEGUN.step([TASK]) == 0 and BEGUN.step(["tenant:u task:code"]) == 3
    assert BEGUN.rates(["tenant:u"]) == {"tenant:u": 0.1, EVERYTHING: 0.1}
    state = BEGUN
    while state.audits_due("tenant:t"):
        state = audited(state, TASK)
    # Its certificate is about all of its tasks together, as everything's is about all groups.
    assert state.step([TASK]) == state.step(["tenant:t task:new"]) == K
    assert fold([Opened(TASK)], state).step([TASK]) == 0
    assert fold([Complained(TASK, 1.0)] * 60, state).step(["tenant:t task:new"]) == K


def test_a_group_with_a_target_has_room_and_what_has_none_is_in_its_tenants() -> None:
    state = Groups.begin(PROMISE, K, certified=3, most_groups=3, targets=STRICT)
    state = fold([drawn(state, "r", TASK, "task:other")], state)
    assert list(state.groups) == [EVERYTHING, *STRICT] and state.num_pooled == 0
    assert not state.takes(TASK) and state.step([TASK]) == 0
    assert fold([Complained(TASK, 1.0)], state).num_refused == 1


@pytest.mark.whole
def test_a_state_with_targets_is_the_fold_of_its_events_wherever_it_is_cut() -> None:
    begun = Groups.begin(PROMISE, K, certified=3, most_groups=5, targets={"task:math": 0.05})
    events: list[Event] = [
        replace(one, groups={"task:math" if n == "math" else n: p for n, p in one.groups.items()})
        if isinstance(one, Drawn)
        else one
        for one in story(100)
    ]
    state = begun
    for event in events:
        state = Groups.from_json(json.loads(text(state))).after(event)
    assert text(state) == text(fold(events, begun))
    assert state.targets == {"task:math": 0.05} and state.groups["task:math"].reach < 0


def test_a_state_from_before_there_were_targets_is_read_as_one_without() -> None:
    state = fold(story(30), Groups.begin(PROMISE, K))
    old = json.loads(text(state))
    del old["targets"]
    assert text(Groups.from_json(old)) == text(state)


#: The groups of a request of `test_governor`.
MEMBERS = {
    (0,): ["segment:a"],
    (0, 1): ["segment:a", "task:math"],
    (0, 2): [TASK],
    (0, 1, 2): ["task:math", TASK],
}


def excess_over_bound(sequence: list[Request], longest: int, promise: Promise) -> float:
    """How far any group is ever above the bound, with its own target, that every sequence keeps."""
    state = Groups.begin(promise, K, certified=K, most_groups=6, targets=STRICT)
    waiting, worst = list[tuple[int, str, float]](), -math.inf
    allowed, lost = dict[str, float](), dict[str, float]()

    def note(name: str, rise: float) -> None:
        allowed[name] = allowed.get(name, 0.0) + rise

    for name, group in state.groups.items():
        note(name, float(group.reach))

    def after(event: Event) -> Groups:
        before, moved = state.groups, state.after(event)
        for name, group in moved.groups.items():
            rise = float(group.top) - float(before[name].top) if name in before else 0.0
            note(name, max(rise, 0.0) if name in before else float(group.reach))
        return moved

    for now, (members, loss, delay, probability, others_lose) in enumerate(sequence):
        names = MEMBERS[members]
        step = state.step(names)
        assert all(step <= state.group(name).ceiling for name in state.rates(names))
        counting = dict.fromkeys(state.rates(names), probability)
        state = after(Drawn(f"r{now}", step, counting))
        waiting.append((now + min(delay, longest), f"r{now}", loss))
        for _, request, said in [one for one in waiting if one[0] <= now]:
            audit = state.under_way[request]
            losses = [said if others_lose or at == audit.step else 0.0 for at in range(1, K + 1)]
            state = after(told(request, *losses))
            for name, p in audit.groups.items():
                target, felt = state.promise_of(name).target, said if audit.step else 0.0
                lost[name] = lost.get(name, 0.0) + promise.rest / p * (felt - target)
                bound = allowed[name] / promise.gain + (longest + 1) * (1 - target)
                worst = max(worst, lost[name] - bound)
        waiting = [one for one in waiting if one[0] > now]
    return worst


@settings(deadline=None, max_examples=30)
@given(st.lists(requests, max_size=100), st.integers(0, 20))
def test_no_sequence_loses_more_than_the_bound_of_its_own_target(
    sequence: list[Request], longest: int
) -> None:
    for promise in (PROMISE, replace(PROMISE, fire=1e300)):
        assert excess_over_bound(sequence, longest, promise) <= 1e-9


def in_turns(num: int) -> Iterator[Request]:
    """Calm until the strict groups are certified, and then losses of all that is halted."""
    for n in range(num):
        members = ((0,), (0, 1), (0, 2), (0, 1, 2))[n % 4]
        yield members, float(n > 380), 7, 0.1, False


def test_the_bound_of_an_own_target_is_nearly_reached() -> None:
    assert -9 < excess_over_bound(list(in_turns(600)), 7, replace(PROMISE, fire=1e300)) <= 1e-9


#: What each price loses, for those who are promised more and for all others.
RISKS = np.array([[0.01, 0.02, 0.08, 0.16], [0.0, 0.0, 0.01, 0.02]])


def mean_losses(seed: int, num: int, targets: dict[str, float]) -> np.ndarray:
    """The mean loss of a third of the requests, of task:math, and that of the others."""
    rng = np.random.default_rng(seed)
    state = Groups.begin(Promise(target=0.1), K, targets=targets)
    lost, asked = np.zeros(2), np.zeros(2)
    for n in range(num):
        kind = int(rng.random() > 1 / 3)
        names = ["task:math"] if kind == 0 else []
        step, rates, at, drawn_at = state.step(names), state.rates(names), *rng.random(2)
        losses = (at < RISKS[kind]).astype(float)
        counting = {name: rate for name, rate in rates.items() if drawn_at < rate}
        asked[kind] += 1
        if counting:
            state = fold([Drawn(f"r{n}", step, counting), told(f"r{n}", *losses.tolist())], state)
        elif step:
            lost[kind] += losses[step - 1]
    share: np.ndarray = lost / asked
    return share


@pytest.mark.parametrize("seeds", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_groups_loss_keeps_to_its_own_target_while_everythings_is_laxer(seeds: int) -> None:
    """By everything's certificate alone, math would lose three times what it is promised."""
    alone = np.array([mean_losses(seed, 4500, {}) for seed in range(seeds)])
    strict = np.array([mean_losses(seed, 4500, {"task:math": 0.05}) for seed in range(seeds)])
    assert alone[:, 0].mean() > 0.06 and (alone.mean(axis=1) < 0.1).all()
    assert (strict[:, 0] <= 0.05).mean() >= 0.9 and strict[:, 0].mean() > 0
    assert (strict[:, 1] > 0).all()  # the others are halted as before


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ({"task:math": 0.3}, "target of task:math is 0.3, expected above 0 and at most 0.2, which"),
        ({"task:math": 0.0}, "at most 0.2, which is everything's"),
        ({"task:math": 1.0}, "at most 0.2, which is everything's"),
        ({"task:math": math.nan}, "target of task:math is nan, expected"),
        ({"task:math": -0.1}, "expected above 0"),
        ({"tenant:t": 0.1, TASK: 0.15}, "is 0.15, expected above 0 and at most 0.1, which is its"),
        ({EVERYTHING: 0.1}, "'everything' can have no target, expected task:..., segment:..., "),
        ({"math": 0.1}, "'math' can have no target"),
        ({"task:": 0.1}, "'task:' can have no target"),
        ({"task: math": 0.1}, "can have no target"),
        ({"tenant:t task:": 0.1}, "can have no target"),
        ({f"segment:{'x' * 101}": 0.1}, "can have no target"),
        ({f"task:{n}": 0.1 for n in range(100)}, "100 groups have a target of .*, expected at mo"),
    ],
)
def test_a_target_that_nobody_could_keep_is_refused(targets: Any, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        Groups.begin(PROMISE, K, targets=targets)


def test_targets_are_read_from_words() -> None:
    words = ["task:a=b=0.01", "tenant:t task:code=0.05", "segment:s=1e-3"]
    expected = {"task:a=b": 0.01, "tenant:t task:code": 0.05, "segment:s": 0.001}
    assert read_targets(words) == expected and read_targets([]) == {}
    names = ["tenant:t task:code", "tenant:t", "task:x task:y", EVERYTHING]
    assert [whole_tenant(n) for n in names] == ["tenant:t", "tenant:t", "task:x task:y", EVERYTHING]


@pytest.mark.parametrize("words", [["task:math"], ["=0.1"], ["task:a="], ["task:a=x"], [""]])
def test_words_that_are_no_target(words: list[str]) -> None:
    with pytest.raises(InputError, match="is no target of a group, expected like task:math"):
        read_targets(words)


def test_a_group_has_one_target() -> None:
    with pytest.raises(InputError, match="task:a has two targets, expected one"):
        read_targets(["task:a=0.1", "task:a=0.1"])


def test_the_guide_tells_how_many_audits_a_target_of_its_own_takes() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "CONTROL.md").read_text()
    whole = Groups.begin(Promise(), K)
    assert f"({whole.audits_due()} for a target of 0.02)" in guide
    for num, said in ((1, "that takes {} audits"), (20, "each needs {:,} audits")):
        targets = {f"task:{n}": 0.01 for n in range(num)}
        due = Groups.begin(Promise(), K, targets=targets).audits_due("task:0")
        assert said.format(due) in guide
