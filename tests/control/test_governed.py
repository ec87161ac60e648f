"""The control audits by its key, replays audits at all prices, and never lets a request down."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from haltwise import Certificate, HaltHead, InputError, Terms, ThoughtReport, ThoughtRequest
from haltwise.control import governed as module
from haltwise.control import raters
from haltwise.control.answers import GivenAnswer
from haltwise.control.audit_traces import DenseAudit
from haltwise.control.course import tokens_at
from haltwise.control.governed import GovernedControl, Mode
from haltwise.control.groups import EVERYTHING
from haltwise.control.opening import KeptTraces, open_control
from haltwise.control.replay import prices_of
from haltwise.session.stream import StreamedThought
from haltwise.session.thought import NEVER, PointRules
from tests.heads import sure_head

# `sure_head` halts where log10(price) is at least -1.25 less the mean log probability: of these
# 12 tokens after 4 from 10^0.75, after 8 from 1, and after 12 from 0.1, the lowest price.
LOGPROBS = [-2.0] * 4 + [-1.25] * 4 + [-0.25] * 4
LATER = 10**0.75


@contextmanager
def control(folder: Path, mode: Mode = "observe", audit: float = 1.0, **more: Any) -> Iterator[Any]:
    settings: dict[str, Any] = {"target": 0.1, "usual": Terms(1.0), "most_tokens": 100}
    settings |= {"head": sure_head()} | more
    found = open_control(mode=mode, state=folder / "state", audit=audit, **settings)
    found.asks_answers = True
    yield found
    found.close()


def asked(price: float = 1.0, least: int = 0, **about: Any) -> ThoughtRequest:
    return ThoughtRequest(Terms(price, least), {"names_price": False} | about)


def run(steering: GovernedControl, request: ThoughtRequest) -> ThoughtReport:
    head = steering.head
    rules = PointRules(head.config.halting)
    thought = StreamedThought(head, rules, request, "<think>", steering)
    for logprob in LOGPROBS:
        if thought.add("a ", logprob, [logprob, *[-9.0] * 19]):
            break
    return thought.finish()


def told(steering: GovernedControl, request: ThoughtRequest, *same: int) -> None:
    """Tells an audit whose answers are the full one's at some positions."""
    audit = steering.taken(request)
    assert audit is not None
    answers: dict[int, GivenAnswer | None] = {
        at: GivenAnswer("7" if at in same else "8", "", at + 2) for at in audit.positions
    }
    steering.tell(audit, GivenAnswer("7", "", 20), answers, 6)


def rows(folder: Path, table: str, *columns: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(folder / "state") as file:
        return file.execute(f"SELECT {', '.join(columns)} FROM {table}").fetchall()


def test_an_audit_is_answered_in_full_and_replayed_at_every_price(tmp_path: Path) -> None:
    with control(tmp_path) as steering:
        request = asked(id="r", model="lm", tenant="t")
        report = run(steering, request)
        assert (report.price, report.halted, report.position) == (0.0, False, 12)
        audit = steering.taken(request)
        prices = steering.prices
        expected = np.where(prices >= LATER, 4, np.where(prices >= 1, 8, 12))
        assert audit.replay.positions.tolist() == expected.tolist()
        assert audit.positions == [4, 8, 12]
        told(steering, request, 8, 12)
        assert steering.taken(request) is None
    status = steering.status()["groups"]
    assert set(status) == {EVERYTHING, "tenant:t"}
    found = {m["price"]: m for m in status[EVERYTHING]["by_price"]}
    for price in prices.tolist():
        lost, saved = found[price]["loss"], found[price]["saving"]
        assert lost["estimate"] == (price >= LATER)
        cost = 6 if price >= LATER else 10 if price >= 1 else 14
        assert saved["estimate"] == pytest.approx(1 - cost / 20)
        assert lost["low"] <= lost["estimate"] <= lost["high"]
    assert status[EVERYTHING]["at_usual_price"]["price"] <= 1.0
    assert rows(tmp_path, "request", "id", "audited", "audit_probability", "audit_tokens") == [
        ("r", 1, 1.0, 6)
    ]
    answers = rows(tmp_path, "answer", "position", "agrees", "tokens", "lowest_price")
    assert [one[:3] for one in answers] == [(4, 0, 6), (8, 1, 10), (12, 1, 14), (12, 1, 20)]
    assert answers[0][3] >= LATER and answers[3][3] is None
    kept = (tmp_path / "state").read_bytes() + (tmp_path / "state-wal").read_bytes() * (
        tmp_path / "state-wal"
    ).exists()
    assert steering.key not in kept


def test_a_least_thought_is_respected_by_the_replay(tmp_path: Path) -> None:
    with control(tmp_path) as steering:
        request = asked(least=5)
        run(steering, request)
        assert steering.taken(request).positions == [8, 12]


def test_observe_serves_what_is_asked_and_audits_its_share(tmp_path: Path) -> None:
    with control(tmp_path, audit=0.2) as steering:
        requests = [asked(id=str(i)) for i in range(500)]
        served = [steering.terms(request).price for request in requests]
        audited = [steering.taken(request) is not None for request in requests]
        assert served == [0.0 if audit else 1.0 for audit in audited]
        assert 60 < sum(audited) < 140
        repeated = [steering.terms(asked(id=str(i))).price for i in range(500)]
        assert repeated == served
    assert steering.status()["groups"][EVERYTHING]["requests"] == 1000


def test_a_segment_is_told_at_its_own_usual_price(tmp_path: Path) -> None:
    usual = Terms(1.0, segment_prices={"easy": 10.0, "none": 0.0})
    with control(tmp_path, usual=usual) as steering:
        for segment in usual.segment_prices:
            terms = Terms.read({"segment": segment}, usual)
            request = ThoughtRequest(terms, {"id": segment, "names_price": False})
            run(steering, request)
            told(steering, request, 8, 12)
        wait(steering)
        groups = steering.status()["groups"]

        def usually(name: str, part: str) -> float:
            return float(groups[name]["at_usual_price"][part]["estimate"])

        # Halted after 4 tokens with 2 of an answer, the answer is another one, and 14 are saved.
        assert usually("segment:easy", "loss") == 1
        assert usually("segment:easy", "saving") == pytest.approx(1 - 6 / 20)
        assert usually("segment:none", "saving") == usually("segment:none", "loss") == 0
        assert usually(EVERYTHING, "loss") == 0
        steering.history.clock = lambda: 1e12  # it measures every few seconds
        steering.history.note(steering.keeper.library)
        for name in groups:
            newest = steering.history.newest(name)
            assert newest is not None
            assert newest.saving[1] == pytest.approx(usually(name, "saving"))
        steering.reprice(Terms(10.0))
        assert steering.status()["groups"][EVERYTHING]["at_usual_price"]["loss"]["estimate"] == 1


def test_observe_without_audits_changes_nothing(tmp_path: Path) -> None:
    with control(tmp_path, audit=0.0) as steering:
        assert run(steering, asked()).position == 8
        assert run(steering, asked(0.01)).position == 12
    assert len(rows(tmp_path, "request", "id")) == 2


@pytest.mark.whole
def test_apply_halts_nothing_before_the_first_certificate(tmp_path: Path) -> None:
    with control(tmp_path, "apply", audit=0.05) as steering:
        due, num = steering.status()["audits_due"], 0
        assert 20 < due < 200
        while not steering.groups.step([]):
            request = asked(id=str(num))
            assert run(steering, request).price == 0.0
            told(steering, request, 12)
            num += 1
            wait(steering)
        # Prices below 1 lose nothing, all others everything.
        assert num >= due and steering.status()["audits_due"] == 0
        top = steering.price_of(steering.groups.step([]))
        assert top == max(price for price in steering.prices if price < 1)
        calm = next(r for r in many() if not audited(steering, r))
        assert run(steering, calm).price == top
        named = next(r for r in many(0.2, names_price=True) if not audited(steering, r))
        assert run(steering, named).price == 0.2
        off = ThoughtRequest(Terms(0.0), {"names_price": True})
        assert run(steering, off).price == 0.0 and not audited(steering, off)
    assert max(one[0] for one in rows(tmp_path, "request", "price_served")) == top
    assert all(s <= c for s, c in rows(tmp_path, "request", "price_served", "price_ceiling"))


def many(price: float = 1.0, **about: Any) -> Iterator[ThoughtRequest]:
    return (asked(price, id=f"{price} {i}", **about) for i in range(1000))


def audited(steering: GovernedControl, request: ThoughtRequest) -> bool:
    steering.terms(request)
    audit = steering.taken(request)
    if audit is not None:
        steering.break_off(audit, "no answer")
    return audit is not None


def wait(steering: GovernedControl) -> None:
    """Until the books have everything."""
    while steering.keeper._notes.qsize() or steering.groups.under_way:
        pass


def certified_head() -> HaltHead:
    """Loses at most 5 points at a price of 0.5, as its certificate says."""
    head = sure_head()
    certificate = Certificate(
        "net-em-loss", 0.05, 0.9, 0.5, 0.2, 0.0, 10, 10, "t", "lm", head.digest, None, "c"
    )
    return HaltHead(replace(head.config, certificate=certificate), head.weights)


def test_a_certificate_of_the_same_promise_is_where_apply_begins(tmp_path: Path) -> None:
    certified = certified_head()
    assert 0.5 in prices_of(certified)
    with control(tmp_path, "apply", head=certified) as steering:
        assert steering.price_of(steering.groups.step([])) == 0.5
    (tmp_path / "other").mkdir()
    with control(tmp_path / "other", "apply", head=certified, target=0.04) as steering:
        assert steering.groups.step([]) == 0


def test_an_audit_that_nobody_tells_is_none(tmp_path: Path) -> None:
    with control(tmp_path) as steering:
        steering.asks_answers = False
        request = asked()
        run(steering, request)
        assert steering.taken(request) is None
        wait(steering)
    assert steering.status()["groups"][EVERYTHING]["audits"] == 0
    assert rows(tmp_path, "request", "audited") == [(1,)]


def test_where_the_lm_thinks_on_nothing_is_lost_or_saved(tmp_path: Path) -> None:
    with control(tmp_path) as steering:
        request = asked()
        run(steering, request)
        audit = steering.taken(request)
        nothing: dict[int, GivenAnswer | None] = dict.fromkeys(audit.positions)
        steering.tell(audit, GivenAnswer("", "  Seven. ", 20), nothing, 0)
    found = steering.status()["groups"][EVERYTHING]["by_price"]
    assert {(m["loss"]["estimate"], m["saving"]["estimate"]) for m in found} == {(0.0, 0.0)}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (GivenAnswer("7", "It is 7.", 1), GivenAnswer("7", "7", 2), True),
        (GivenAnswer("7", "7", 1), GivenAnswer("", "7", 1), False),
        (GivenAnswer("", "The  red one", 1), GivenAnswer("", "red one.", 1), True),
        (GivenAnswer("", "red", 1), GivenAnswer("", "blue", 1), False),
    ],
)
def test_answers_agree_as_they_are_read(one: GivenAnswer, other: GivenAnswer, same: bool) -> None:
    assert (one.compared == other.compared) is same


def boom(*_: object, **__: object) -> Any:
    raise RuntimeError("broken")


@pytest.mark.parametrize(
    "broken", ["draw_audit", "Replay.add", "Bookkeeper.put", "Record.put", "digest"]
)
@pytest.mark.parametrize(("mode", "position"), [("observe", 8), ("apply", 12)])
def test_whatever_fails_the_request_goes_on_and_it_is_counted(
    broken: str, mode: Mode, position: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, _, name = broken.rpartition(".")
    with control(tmp_path, mode, audit=1.0) as steering, monkeypatch.context() as patch:
        patch.setattr(getattr(module, owner) if owner else module, name, boom)
        request = asked(tenant="t")
        report = run(steering, request)
        assert report.position == (position if broken == "draw_audit" else 12)
        audit = steering.taken(request)
        if audit is not None:
            steering.tell(audit, GivenAnswer("7", "", 20), dict.fromkeys(audit.positions), 0)
        assert steering.failures.num >= 1 and "broken" in steering.failures.last


def test_a_broken_clock_loses_rows_alone(tmp_path: Path) -> None:
    with control(tmp_path, audit=0.0) as steering:
        steering.clock = boom
        assert run(steering, asked()).position == 8
        assert steering.failures.num == 1
    assert rows(tmp_path, "request", "id") == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"audit": 0.0, "mode": "apply"}, "audit is 0.0, expected above 0"),
        ({"audit": 1.5}, "audit is 1.5"),
        ({"audit": float("nan")}, "audit is nan"),
        ({"kept": KeptTraces(Path("x"), 0.0)}, "dense audits are 0.0 of all, expected above 0"),
        ({"target": 0.0}, "target is 0.0"),
        ({"target": float("nan")}, "target is nan"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=expected), control(tmp_path, **settings):
        pass


def test_a_bad_key_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.key").write_bytes(b"short")
    with pytest.raises(InputError, match="the key has 5 bytes"), control(tmp_path):
        pass


def test_the_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    with control(tmp_path) as first:
        pass
    with control(tmp_path) as second:
        assert second.key == first.key
    assert (tmp_path / "state.key").stat().st_mode & 0o777 == 0o600


def test_a_thought_without_points_agrees_everywhere(tmp_path: Path) -> None:
    with control(tmp_path) as steering:
        request = asked()
        steering.terms(request)
        audit = steering.taken(request)
        assert audit.positions == [] and set(audit.replay.positions) == {NEVER}
        told(steering, request)
    found = steering.status()["groups"][EVERYTHING]["by_price"]
    assert {m["loss"]["estimate"] for m in found} == {0.0}


def test_complaints_make_their_own_tenant_stricter_alone(tmp_path: Path) -> None:
    with control(tmp_path) as steering:
        for name in ("a", "b"):
            request = asked(id=name, tenant=name)
            run(steering, request)
            told(steering, request, 4, 8, 12)
        wait(steering)
        before = {n: float(steering.groups.group(n).reach) for n in steering.groups.groups}
        steering.rate("a", 0.25)
        steering.rate("b", 1)
        wait(steering)
        while steering.groups.group("tenant:a").reach == before["tenant:a"]:
            pass
        after = {n: float(steering.groups.group(n).reach) for n in steering.groups.groups}
        lower = before["tenant:a"] - 0.02 * 0.75
        assert after == before | {"tenant:a": pytest.approx(lower)}
    assert rows(tmp_path, "label", "request", "source", "value") == [
        ("a", "user", 0.25),
        ("b", "user", 1.0),
    ]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, "expected {"),
        ({"request": 7, "score": 1}, "expected {"),
        ({"request": "a", "score": 1, "more": 2}, "expected {"),
        ({"request": "a", "score": float("nan")}, "score is nan"),
        ({"request": "a", "score": "good"}, "score is 'good'"),
        ({"request": "a", "score": True}, "score is True"),
        ({"request": "a", "score": 1.1}, "score is 1.1"),
        ({"request": "nobody", "score": 1}, "request 'nobody' is unknown"),
        ({"request": "no tenant", "score": 1}, "is unknown, without user and tenant"),
        ({"request": "twice", "score": 1}, "or rated already"),
    ],
)
def test_feedback_that_makes_no_sense_is_refused_and_counted(
    said: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with control(tmp_path) as steering:
        for name, tenant in (("a", "t"), ("twice", "t"), ("no tenant", "")):
            steering.terms(asked(id=name, tenant=tenant))
        while "tenant:t" not in steering.groups.groups:
            pass
        steering.rate("twice", 0)
        with pytest.raises(InputError, match=expected):
            steering.rate(**said)
        assert steering.status()["refused"] == 1


def test_a_user_moves_its_own_dial_alone(tmp_path: Path) -> None:
    with control(tmp_path, "apply", audit=1e-9, head=certified_head()) as steering:

        def price(number: str, tenant: str, user: str) -> float:
            request = asked(price=9.0, id=number, tenant=tenant, user=user)
            return float(run(steering, request).price)

        assert price("a", "t", "u") == price("b", "t", "u") == 0.5
        full = int(np.searchsorted(steering.prices, 0.5, side="right"))
        turned = [0.5, *(steering.price_of(int(share * full)) for share in (0.75, 0.5))]

        def turns(number: str, score: float, to: int) -> None:
            steering.rate(number, score)
            until(lambda: price("", "t", "u") == turned[to])

        turns("a", 0.0, 1)
        until(lambda: len(rows(tmp_path, "request", "id")) > 3)
        steering._raters._recent.clear()
        turns("b", 0.0, 2)
        assert {price("", *other) for other in (("s", "u"), ("t", "v"), ("t", ""), ("", "u"))} == {
            0.5
        }
        price("c", "t", "u")
        turns("c", 1.0, 1)
        assert set(steering.groups.groups) == {EVERYTHING}


def test_a_session_that_doubts_is_stricter_at_once_and_alone(tmp_path: Path) -> None:
    with control(tmp_path, "apply", audit=1e-9, head=certified_head()) as steering:
        full = int(np.searchsorted(steering.prices, 0.5, side="right"))

        def price(session: str, doubted: bool = False, tenant: str = "t") -> float:
            about: dict[str, Any] = dict(session=session, doubted=doubted, tenant=tenant)
            return float(steering.terms(asked(price=9.0, **about)).price)

        assert price("s") == 0.5
        assert price("s", doubted=True) == steering.price_of(int(0.75 * full))
        until(lambda: price("s") == steering.price_of(int(0.75 * full)))
        assert {price("r"), price("s", tenant="u"), price("", doubted=True)} == {0.5}


def test_a_paced_price_lies_between_what_is_asked_and_what_is_certified(tmp_path: Path) -> None:
    with control(tmp_path, "apply", audit=1e-9, head=certified_head()) as steering:
        steps = [int(np.searchsorted(steering.prices, p, side="right")) for p in (0.1, 0.5)]

        def served(urgency: float | None, price: float = 0.1, num: int = 1) -> list[int]:
            found = [
                float(steering.terms(asked(price, id=f"{n}", urgency=urgency)).price)
                for n in range(num)
            ]
            return [int(np.searchsorted(steering.prices, one, side="right")) for one in found]

        assert served(0.0) == [steps[0]] and served(1.0) == served(None) == [steps[1]]
        assert set(served(0.0, 9.0, 50) + served(0.7, 9.0, 50)) == {steps[1]}  # never beyond
        exact = steps[0] + 0.37 * (steps[1] - steps[0])
        drawn = served(0.37, num=2_000)
        assert set(drawn) == {int(exact), int(exact) + 1}
        assert np.mean(drawn) == pytest.approx(exact, abs=0.05)
        run(steering, asked(0.1, id="r", urgency=0.37))
    ((price, probability),) = rows(tmp_path, "request", "price_served", "price_probability")
    rose = price == steering.price_of(int(exact) + 1)
    share = exact - int(exact)
    assert probability == pytest.approx(share if rose else 1 - share)


def test_a_share_explores_the_next_stricter_price_with_a_known_probability(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"head": certified_head(), "explore": 0.2}
    with control(tmp_path, "apply", audit=1e-9, **settings) as steering:
        top = int(np.searchsorted(steering.prices, 0.5, side="right"))
        drawn = [float(steering.terms(asked(9.0, id=f"{n}")).price) for n in range(2_000)]
        assert set(drawn) == {steering.price_of(top), steering.price_of(top - 1)}
        lower = [price < steering.price_of(top) for price in drawn]
        assert np.mean(lower) == pytest.approx(0.2, abs=0.03)
        mine = asked(0.1, id="named", names_price=True)
        assert steering.terms(mine).price == 0.1  # who names a lower price explores nothing
        for name in ("0", str(lower.index(True))):
            run(steering, asked(9.0, id=name))
    found = dict(rows(tmp_path, "request", "price_served", "price_probability"))
    assert found[steering.price_of(top - 1)] == 0.2
    assert set(found.values()) <= {0.2, 0.8}
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(InputError, match="explore is"), control(tmp_path, explore=share):
            pass


@pytest.mark.parametrize("price", [0.0, 0.5, 3.0, 9.0])
def test_a_request_that_is_served_is_replayed_at_all_prices(price: float, tmp_path: Path) -> None:
    """What it tells of prices from the one that was served on is what an audit tells."""
    with control(tmp_path, audit=0.0, replay_all=True) as steering:
        run(steering, asked(price, id="served"))
        prices = steering.prices
    with control(tmp_path, audit=1.0, replay_all=True) as steering:
        request = asked(price, id="audit")
        run(steering, request)
        told(steering, request)
    found = rows(tmp_path, "request", "id", "price_due", "halts")
    halts = {name: tokens_at(told, prices) for name, due, told in found if due == price}
    expected = np.where(prices >= LATER, 4, np.where(prices >= 1, 8, 12))
    assert halts["audit"].tolist() == expected.tolist()
    at_due = 4 if price >= LATER else 8 if price >= 1 else 12
    assert halts["served"].tolist() == np.minimum(halts["audit"], at_due).tolist()


def test_nothing_is_paced_where_control_only_looks(tmp_path: Path) -> None:
    with control(tmp_path, "observe", audit=0.0, head=certified_head()) as steering:
        assert steering.terms(asked(0.1, id="r", urgency=1.0)).price == 0.1


def test_feedback_before_any_audit_of_a_tenant_makes_it_known(tmp_path: Path) -> None:
    with control(tmp_path, audit=1e-9) as steering:
        steering.terms(asked(id="a", tenant="t"))
        steering.rate("a", 0)
        until(lambda: "tenant:t" in steering.groups.groups)
        everything = float(steering.groups.group("tenant:s").reach)
        assert float(steering.groups.group("tenant:t").reach) == pytest.approx(everything - 0.02)


def test_feedback_finds_requests_of_other_processes_and_long_ago(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raters, "_MOST_RECENT", 1)
    names = "abcd"
    with control(tmp_path) as before:
        for name in names:
            request = asked(id=name, tenant="t", task="sums" if name < "d" else "")
            run(before, request)
            told(before, request, 4, 8, 12)
        wait(before)
        assert list(before._raters._recent) == ["d"]
        while len(rows(tmp_path, "request", "id")) < len(names):
            pass
        with control(tmp_path) as steering:
            for name in ("a", "d"):
                steering.rate(name, 0.5)
            until(lambda: len(rows(tmp_path, "label", "request")) == 2)
            for name in ("a", "d"):
                for one in (before, steering):
                    one._raters._recent.clear()
                    with pytest.raises(InputError, match="rated already"):
                        one.rate(name, 0.0)
            full = float(steering.groups.group("task:sums").reach)
            expected = [pytest.approx(full - 0.01)] * 2

            def reaches() -> list[float]:
                groups = steering.groups
                names = ("tenant:t", "tenant:t task:sums")
                return [float(groups.group(name).reach) for name in names]

            until(lambda: reaches() == expected)


def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        time.sleep(0.01)


@pytest.mark.parametrize(("gold", "loss"), [("7", 1.0), ("8", -1.0), ("9", 0.0), (" 8.0 ", -1.0)])
def test_a_label_says_who_was_right(gold: str, loss: float, tmp_path: Path) -> None:
    with control(tmp_path, label_seconds=60.0) as steering:
        request = asked(id="r")
        run(steering, request)
        told(steering, request, 12)
        until_known(steering, 1)
        assert worst(steering) == (1.0, 0.0) and steering.status()["loss"] == "net-em-loss"
    with control(tmp_path, label_seconds=60.0) as again:
        steering = again
        steering.label("r", gold)
        until_known(steering, 0)
        assert worst(steering) == (loss, 0.0) and not steering.groups.under_way
    assert rows(tmp_path, "label", "request", "source") == [("r", "gold")]


@pytest.mark.parametrize(("right", "loss"), [((1, 0), 1.0), ((0, 1), -1.0), ((0.75, 0.5), 0.25)])
def test_a_judge_says_how_right_answers_are(
    right: tuple[float, float], loss: float, tmp_path: Path
) -> None:
    with control(tmp_path, label_seconds=60.0) as steering:
        steering.clock = lambda: 100.0
        request = asked(id="r")
        run(steering, request)
        told(steering, request, 8, 12)
        until_known(steering, 1)
        places = ["full", "4"]
        assert steering.awaited() == [{"request": "r", "places": places, "until": 160.0}]
        steering.judge("r", "judge", dict(zip(places, right, strict=True)))
        until_known(steering, 0)
        assert worst(steering) == (loss, 0.0) and not steering.awaited()
    kept = rows(tmp_path, "label", "request", "source", "position", "value")
    assert kept == [("r", "judge", 0, right[0]), ("r", "judge", 4, right[1])]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, 'expected {"request"'),
        ({"source": "gold"}, 'expected {"request"'),
        ({"right": [1, 0]}, 'expected {"request"'),
        ({"more": 1}, 'expected {"request"'),
        ({"request": "other"}, "no label of request 'other' is waited for"),
        ({"right": {"full": 1}}, "expected full, 4"),
        ({"right": {"full": 1, "4": 0, "8": 1}}, "expected full, 4"),
        ({"right": {"full": 1, "4": float("nan")}}, "right of 4 is nan"),
        ({"right": {"full": True, "4": 0}}, "right of full is True"),
        ({"right": {"full": 1, "4": "1"}}, "right of 4 is '1'"),
    ],
)
def test_verdicts_that_make_no_sense_are_refused_and_counted(
    said: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    usual = {"request": "r", "source": "test", "right": {"full": 1, "4": 0}}
    with control(tmp_path, label_seconds=60.0) as steering:
        request = asked(id="r")
        run(steering, request)
        told(steering, request, 8, 12)
        until_known(steering, 1)
        with pytest.raises(InputError, match=expected):
            steering.judge(**usual | said if said else {})
        assert steering.status()["refused"] == 1 and steering.status()["labels_due"] == 1
        steering.judge(**usual)
        with pytest.raises(InputError, match="is waited for"):
            steering.judge(**usual)


def until_known(steering: GovernedControl, num: int) -> None:
    """Until so many audits wait for labels."""
    while steering.keeper._notes.qsize() or steering.status()["labels_due"] != num:
        pass


def worst(steering: GovernedControl) -> tuple[float, float]:
    """The loss of the largest price, and of the smallest."""
    found = steering.status()["groups"][EVERYTHING]["by_price"]
    return found[-1]["loss"]["estimate"], found[0]["loss"]["estimate"]


def test_a_label_that_does_not_come_is_a_loss(tmp_path: Path) -> None:
    with control(tmp_path, label_seconds=60.0) as steering:
        steering.clock = lambda: 100.0
        request = asked(id="r")
        run(steering, request)
        told(steering, request)
        until_known(steering, 1)
        steering.terms(asked(id="early"))
        steering.clock = lambda: 161.0
        steering.terms(asked(id="late"))
        until_known(steering, 0)
        assert worst(steering) == pytest.approx((1 / 3, 1 / 3), abs=1e-6)  # of three requests
        with pytest.raises(InputError, match="too old"):
            steering.label("r", "7")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, "expected {"),
        ({"request": "r", "gold": 7}, "expected {"),
        ({"request": "r", "gold": " "}, "expected {"),
        ({"request": "r", "gold": "7", "more": 1}, "expected {"),
        ({"request": "nobody", "gold": "7"}, "no label of request 'nobody' is waited for"),
        ({"request": "agrees", "gold": "7"}, "or its answers agree"),
        ({"request": "twice", "gold": "7"}, "labelled already"),
    ],
)
def test_labels_that_make_no_sense_are_refused_and_counted(
    said: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with control(tmp_path, label_seconds=60.0) as steering:
        for name, same in (("r", ()), ("twice", ()), ("agrees", (4, 8, 12))):
            request = asked(id=name)
            run(steering, request)
            told(steering, request, *same)
        until_known(steering, 2)
        steering.label("twice", "7")
        with pytest.raises(InputError, match=expected):
            steering.label(**said)
        assert steering.status()["refused"] == 1


def test_a_trace_takes_a_label_that_nobody_waits_for(tmp_path: Path) -> None:
    kept = KeptTraces(tmp_path / "traces", share=1.0)
    with control(tmp_path, kept=kept) as steering:
        request = asked(id="r")
        run(steering, request)
        audit = steering.taken(request)
        assert audit.other_positions == [] and list(audit.looks) == [4, 8, 12]
        told(steering, request, 4, 8, 12)
        full = GivenAnswer("7", "", 20)
        points = [look.signals for look in audit.looks.values()]
        steering.keep(DenseAudit("r", points, [full] * 3, full, True, "lm", "", "?", ""))
        with pytest.raises(
            InputError, match=r"gold is '\.\.\.', expected what the answer rule can"
        ):
            steering.label("r", "...")
        with pytest.raises(InputError, match="no label of request 'other' is waited for"):
            steering.label("other", "7")
        steering.label("r", "7")
        with pytest.raises(InputError, match="labelled already"):
            steering.label("r", "7")
    assert rows(tmp_path, "label", "request", "source") == [("r", "gold")]
    assert steering.status()["traces"]["written"] == 2


def test_no_label_is_waited_for_if_none_is_wanted(tmp_path: Path) -> None:
    with control(tmp_path) as steering:
        request = asked(id="r")
        run(steering, request)
        told(steering, request)
        wait(steering)
        with pytest.raises(InputError, match="no label of request 'r' is waited for"):
            steering.label("r", "7")
    with pytest.raises(InputError, match="labels are waited for nan s"):
        open_control(
            sure_head(), "observe", tmp_path / "other", 0.1, 1.0, Terms(1.0), 100, float("nan")
        )


def test_a_breaker_is_opened_by_hand_where_something_is_halted(tmp_path: Path) -> None:
    with control(tmp_path, "apply", head=certified_head(), target=0.1) as steering:
        for said in ({}, {"group": 7}, {"group": EVERYTHING, "more": 1}):
            with pytest.raises(InputError, match=r'expected {"group": "NAME"}'):
                steering.open_breaker(**said)
        with pytest.raises(InputError, match=r"name 'every', expected one of everything$"):
            steering.open_breaker("every")
        steering.open_breaker(EVERYTHING)
        until(lambda: steering.groups.step([]) == 0)
        assert steering.status()["groups"][EVERYTHING]["breaker"] == "open"
        with pytest.raises(InputError, match="group 'everything' halts nothing"):
            steering.open_breaker(EVERYTHING)
        assert steering.status()["refused"] == 5


@pytest.mark.parametrize("audit", [0.01, 0.05, 0.4, 1.0])
def test_at_rest_half_as_many_requests_are_audited(tmp_path: Path, audit: float) -> None:
    with control(tmp_path, audit=audit) as steering:
        assert steering.groups.promise.rest == audit / 2
