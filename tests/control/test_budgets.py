"""No number of requests at once, and no crash, spends more than a budget."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from haltwise import InputError
from haltwise.control.budgets import Account, Amount, Budget, Budgets, ShortError
from haltwise.control.record import TABLES
from haltwise.control.store import Store, store_of
from tests.stores import NewName

HOUR = 3600.0
ALL = Account("everything", Budget(nano=1_000, seconds=HOUR))
MINE = Account("tenant t", Budget(nano=600, tokens=50))


class Clock:
    def __init__(self, now: float = 10 * HOUR) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@contextmanager
def opened(store: Store, num: int = 1, clock: Clock | None = None) -> Iterator[list[Budgets]]:
    """As many as processes, each with its own connection."""
    with ExitStack() as stack:
        yield [stack.enter_context(closing(Budgets(store, clock or Clock()))) for _ in range(num)]


def gone(budgets: Budgets, account: Account) -> int:
    """What is spent or held back, in nano-dollars."""
    assert account.budget.nano is not None
    return account.budget.nano - budgets.standing(account).left.nano


def held(store: Store) -> int:
    with closing(store.connect(TABLES)) as looked:
        return len(looked.execute("SELECT id FROM hold"))


def test_of_64_requests_at_once_as_many_run_as_there_is_room_for(store: Store) -> None:
    """Each holds back 300 of 1,000 and costs 299: room for 3."""
    with opened(store, 4) as processes, ThreadPoolExecutor(64) as pool:

        def ask(number: int) -> bool:
            budgets, request = processes[number % 4], f"r{number}"
            try:
                budgets.reserve(request, [ALL], Amount(300))
            except ShortError:
                return False
            return True

        running = [f"r{n}" for n, ran in enumerate(pool.map(ask, range(64))) if ran]
        assert len(running) == 3 and gone(processes[0], ALL) == 900
        for request in running:
            processes[int(request[1:]) % 4].settle(request, Amount(299))
        assert gone(processes[1], ALL) == 3 * 299 and held(store) == 0


def test_it_is_held_back_in_all_accounts_or_in_none(store: Store) -> None:
    with opened(store) as (budgets,):
        budgets.reserve("a", [ALL, MINE], Amount(400, 10))
        for accounts in ([ALL, MINE], [MINE, ALL]):
            told = "tenant has too little left for this request, which may take 3e-07 dollars: expe"
            with pytest.raises(ShortError, match=told) as short:
                budgets.reserve("b", accounts, Amount(300, 10))
            assert short.value.standing.left == Amount(200, 40)
        with pytest.raises(ShortError, match="may take 41 tokens"):
            budgets.reserve("c", [MINE], Amount(1, 41))  # tokens are a limit too
        budgets.reserve("d", [MINE], Amount(200, 0))
        with pytest.raises(ShortError, match="the budget of tenant is spent"):
            budgets.reserve("e", [MINE], Amount(1, 0))
        budgets.settle("d", Amount(0, 0))
        assert (gone(budgets, ALL), gone(budgets, MINE), held(store)) == (400, 400, 2)
        budgets.settle("a", Amount(100, 5))
        budgets.settle("a", Amount(100, 5))  # told twice
        budgets.settle("nobody", Amount(100, 5))
        assert (gone(budgets, ALL), gone(budgets, MINE), held(store)) == (100, 100, 0)


def test_no_order_of_requests_crashes_and_windows_spends_more(store: Store) -> None:
    rng, clock = np.random.default_rng(0), Clock()
    with opened(store, 3, clock) as processes:
        running: list[tuple[Budgets, str, int]] = []
        spent = dict.fromkeys(range(4), 0)
        for n in range(300):
            budgets, most = processes[int(rng.integers(3))], int(rng.integers(1, 300))
            choice = rng.random()
            if choice < 0.5:
                try:
                    budgets.reserve(f"r{n}", [ALL, MINE], Amount(most))
                except ShortError:
                    continue
                running.append((budgets, f"r{n}", most))
                spent[int(clock.now // HOUR) - 10] += most
            elif choice < 0.9 and running:
                owner, request, most = running.pop(int(rng.integers(len(running))))
                owner.settle(request, Amount(int(rng.integers(0, most + 1))))
            elif clock.now < 13 * HOUR:
                clock.now += 240
                budgets.renew()  # answers for its own; those of others run out
                budgets.renew()
            for account in (ALL, MINE):
                assert account.budget.nano is not None
                assert 0 <= gone(budgets, account) <= account.budget.nano


def test_what_a_dead_process_held_back_counts_as_spent(store: Store) -> None:
    clock = Clock()
    with opened(store, 2, clock) as (dead, other):
        dead.reserve("a", [ALL], Amount(700))
        other.reserve("b", [ALL], Amount(200))
        for seconds in (20, 20, 19):
            clock.now += seconds
            other.renew()
            assert held(store) == 2
        clock.now += 2
        other.renew()
        assert held(store) == 1 and gone(other, ALL) == 900
        dead.settle("a", Amount(1))  # it was not dead: what it says comes too late
        assert gone(other, ALL) == 900


def test_a_kill_between_reserve_and_settle_leaves_no_room(new_name: NewName) -> None:
    name = new_name()
    store = store_of(name)
    script = f"""
import time
from haltwise.control.budgets import *
from haltwise.control.store import store_of
budgets = Budgets(store_of({name!r}), clock=lambda: 36000.0)
budgets.reserve("a", [Account("everything", Budget(nano=1_000))], Amount(900))
print("held", flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    whole = Account("everything", Budget(nano=1_000))
    clock = Clock()
    with opened(store, 1, clock) as (budgets,):
        for now in (0.0, 61.0):
            clock.now = 36000.0 + now
            budgets.renew()
            with pytest.raises(ShortError):
                budgets.reserve("b", [whole], Amount(101))
        assert gone(budgets, whole) == 900 and held(store) == 0
        budgets.reserve("b", [whole], Amount(100))


def test_every_window_has_its_own_and_settles_what_began_in_it(store: Store) -> None:
    clock = Clock()
    with opened(store, 1, clock) as (budgets,):
        budgets.reserve("a", [ALL], Amount(1_000))
        before = budgets.standing(ALL)
        assert (before.left.nano, before.requests, before.until) == (0, 1, 11 * HOUR)
        clock.now += 1.25 * HOUR
        after = budgets.standing(ALL)
        assert (after.left.nano, after.requests, after.passed) == (1_000, 0, 0.25)
        budgets.settle("a", Amount(10))
        assert gone(budgets, ALL) == 0
        clock.now -= HOUR
        assert gone(budgets, ALL) == 10
        clock.now += 60 * 24 * HOUR
        budgets.renew()
        with closing(store.connect(TABLES)) as looked:
            assert looked.execute("SELECT id FROM account") == []


def test_what_costs_more_than_it_could_is_told(store: Store) -> None:
    with opened(store) as (budgets,):
        budgets.reserve("a", [ALL], Amount(10))
        budgets.settle("a", Amount(11))
        assert (budgets.num_over, gone(budgets, ALL)) == (1, 11)


def test_where_the_store_is_away_nothing_is_reserved_and_settled_later(tmp_path: Path) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    with opened(store_of(folder / "state", patience=0.1)) as (budgets,):
        budgets.reserve("a", [ALL], Amount(500))
        with closing(store_of(folder / "state").connect(TABLES)) as other, other.transaction():
            budgets.settle("a", Amount(100))
            with pytest.raises(InputError, match="locked"):
                budgets.reserve("b", [ALL], Amount(1))
            assert "locked" in budgets.trouble
        budgets.settle("nobody", Amount())
        assert gone(budgets, ALL) == 100 and budgets.trouble == ""


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"dollars": 0.5}, Budget(500_000_000)),
        ({"tokens": 7.0, "hours": 0.5}, Budget(None, 7, 1800.0)),
        ({"dollars": 1, "tokens": 2, "hours": 24, "requests": 9}, Budget(10**9, 2, 86400.0, 9)),
        ({"dollars": 1e300}, Budget(10**18)),
    ],
)
def test_what_an_operator_says_of_a_budget(told: dict[str, Any], expected: Budget) -> None:
    assert Budget.read(told) == expected


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (None, "expected dollars or tokens"),
        ({"hours": 1}, "expected dollars or tokens"),
        ({"dollars": 1, "days": 1}, "expected dollars or tokens"),
        ({"dollars": -1}, "dollars is -1, expected a number above 0"),
        ({"dollars": math.nan}, "dollars is nan"),
        ({"dollars": "5"}, "dollars is '5'"),
        ({"dollars": 1e-10}, "expected a billionth"),
        ({"tokens": 1.5}, "tokens is 1.5, expected a whole number"),
        ({"tokens": True}, "tokens is True"),
        ({"dollars": 1, "hours": 0}, "hours is 0"),
        ({"dollars": 1, "hours": 1e-320}, "hours is 1e-320, expected 0.0003 to"),
        ({"dollars": 1, "hours": 10**400}, "hours is 1000"),
        ({"dollars": 1, "hours": 1, "requests": 10**400}, "requests is 1000"),
        ({"dollars": 1, "requests": 5}, "expected hours too"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(told: Any, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        Budget.read(told)
    for wrong in (-1, 0.5, 2**63):
        with pytest.raises(InputError, match="amount is"):
            Amount(wrong)  # type: ignore[arg-type]


def test_those_that_have_spent_most_are_told_behind_everything(store: Store) -> None:
    """What was spent under another budget, or by whom nobody knows any more, has no limit."""
    hour, mine = Budget(nano=1_000, seconds=HOUR), Account("tenant b", Budget(tokens=90))
    accounts = [Account("tenant a", hour), mine, Account("tenant c", hour), ALL]
    with opened(store) as (budgets,):
        for number, account in enumerate(accounts):
            budgets.reserve(f"r{number}", [account], Amount(100 + number, 7))
        budgets.settle("r1", Amount(50, 5))
        budgets_of = {"everything": ALL.budget, "tenant a": Budget(nano=5), "tenant b": mine.budget}
        told, num = budgets.largest(budgets_of.get, 4)
        assert [one["id"] for one in told] == ["everything", "tenant c", "tenant a", "tenant b"]
        assert [(one["limit_nano"], one["limit_tokens"]) for one in told] == [
            *[(1_000, None), (None, None), (None, None), (None, 90)]
        ]
        assert [one["until"] for one in told] == [11 * HOUR, 11 * HOUR, 11 * HOUR, None]
        assert (num, budgets.largest(budgets_of.get, 1)) == (4, (told[:1], 4))
        assert budgets.spent(mine) == Amount(50, 5)
        assert budgets.spent(ALL) == budgets.spent(Account("nobody", hour)) == Amount()


def test_what_is_spent_beyond_all_reason_is_written_all_the_same(store: Store) -> None:
    free = Account("everything", Budget(tokens=10))
    with opened(store) as (budgets,):
        for number in range(20):
            budgets.reserve(f"r{number}", [free], Amount())
            budgets.settle(f"r{number}", Amount(nano=10**18))
        assert not budgets.trouble
    assert held(store) == 0
