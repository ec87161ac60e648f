"""Budgets: what may be spent in a window of time, which no number of requests at once can exceed.

    reserve (as much as a request can cost at most)  ->  it runs  ->  settle (what it has cost)

Both are transactions of the store, in every account of the request or in none. What is held back
counts as spent until it is settled; what a process held that has died, counts as spent for good, as
nobody knows what its requests have cost. So the sum of all that was spent is never above a budget,
as long as no request costs more than was reserved for it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from haltwise.control.groups import EVERYTHING
from haltwise.control.record import TABLES
from haltwise.control.store import Connection, Store, Transactions
from haltwise.control.tariffs import NANO
from haltwise.errors import InputError

log = logging.getLogger("haltwise.control")

T = TypeVar("T")

# Seconds for which a process answers for what it holds, and after which it says so again.
_LEASE, _RENEWS = 60.0, 15.0
# Seconds for which accounts are kept behind the end of their window.
_KEPT = 30 * 86_400.0
#: The most of anything, which all stores can hold with room for sums.
MOST = 10**18
# The least of a window: a second, and a request.
_LEAST = {"hours": 0.0003, "requests": 1}
_KEYS = ("dollars", "tokens", "hours", "requests")
# Columns of an account that its operator is told.
_TOLD = ("id", "until", "requests", "spent_nano", "held_nano", "spent_tokens", "held_tokens")


@dataclass(frozen=True)
class Amount:
    """What something costs."""

    nano: int = 0
    """In nano-dollars."""
    tokens: int = 0
    """Tokens of prompts and answers."""

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: If one is negative, no whole number or beyond all reason.
        """
        for value in (self.nano, self.tokens):
            if not isinstance(value, int) or not 0 <= value <= MOST:
                raise InputError(f"amount is {value!r:.40}, expected a whole number, 0 to {MOST}")


@dataclass(frozen=True)
class Budget:
    """What may be spent in every window of time; None is no limit."""

    nano: int | None = None
    """In nano-dollars."""
    tokens: int | None = None
    seconds: float = math.inf
    """Length of a window; windows begin at multiples of it since 1970."""
    requests: int | None = None
    """Requests that are expected in a window: then its spending is paced."""

    @classmethod
    def read(cls, told: Any) -> Budget:
        """Reads what an operator says of a budget.

        Args:
            told: Any of "dollars", "tokens", of which one is needed, "hours" and "requests".

        Raises:
            InputError: If a key is missing or unknown, or a value makes no sense.
        """
        known = isinstance(told, dict) and set(told) <= set(_KEYS)
        if not known or not {"dollars", "tokens"} & set(told):
            raise InputError("expected dollars or tokens, and perhaps hours and requests")
        for key, value in told.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value < math.inf:
                raise InputError(f"{key} is {value!r:.40}, expected a number above 0")
            if key in ("tokens", "requests") and value != int(value):
                raise InputError(f"{key} is {value}, expected a whole number")
            least = _LEAST.get(key)
            if least is not None and not least <= value <= MOST:
                raise InputError(f"{key} is {value!r:.40}, expected {least} to {MOST:.0e}")
        if "requests" in told and "hours" not in told:
            raise InputError("requests are given, expected hours too, the window to pace")
        dollars, tokens = told.get("dollars"), told.get("tokens")
        nano = None if dollars is None else round(min(dollars * NANO, MOST))
        if nano == 0:
            raise InputError(f"dollars is {dollars}, expected a billionth at least")
        return cls(
            nano,
            None if tokens is None else min(int(tokens), MOST),
            3600.0 * told.get("hours", math.inf),
            None if told.get("requests") is None else int(told["requests"]),
        )

    def window(self, now: float) -> tuple[int, float]:
        """Returns the number of the window at a time, and when it ends, in seconds since 1970."""
        if self.seconds == math.inf:
            return 0, math.inf
        number = math.floor(now / self.seconds)
        return number, (number + 1) * self.seconds


@dataclass(frozen=True)
class Account:
    """Somebody's budget."""

    name: str
    """Whose: a scope, and digests of who is meant; no content and no key."""
    budget: Budget

    @property
    def scope(self) -> str:
        """The scope."""
        return self.name.partition(" ")[0]


@dataclass(frozen=True)
class Standing:
    """How an account stands."""

    account: Account
    left: Amount
    """What is neither spent nor held back; `MOST` where there is no limit."""
    requests: int
    """Requests of this window so far."""
    until: float
    """Seconds since 1970 at which the window ends."""
    passed: float
    """The share of the window that has passed; 0 if it never ends."""


class ShortError(Exception):
    """A budget has not enough left for a request."""

    def __init__(self, standing: Standing, amount: Amount) -> None:
        """Takes the first account that is short, and the most that the request can cost.

        What is left is not told: the account may be that of others too.
        """
        left, is_money = standing.left, standing.left.nano < amount.nano
        told = f"the budget of {standing.account.scope} is spent"
        if (left.nano if is_money else left.tokens) > 0:
            most = f"{amount.nano / NANO:.6g} dollars" if is_money else f"{amount.tokens:,} tokens"
            told = (
                f"the budget of {standing.account.scope} has too little left for this request, "
                f"which may take {most}: expected a smaller max_tokens"
            )
        super().__init__(told)
        self.standing = standing


class Budgets:
    """Accounts in a store that several processes may use. To be closed.

    Any thread may call. Where the store is away, nothing can be reserved; what cannot be settled
    is settled once the store is back.

    Args:
        store: The store.
        clock: Seconds since 1970.

    Raises:
        InputError: If the store cannot be used.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        """Opens the store."""
        self._transactions, self._clock = Transactions(store, TABLES), clock
        self._lock = threading.Lock()
        self._process = uuid.uuid4().hex
        self._unsettled: dict[str, Amount] = {}
        #: Requests that have cost more than was reserved for them.
        self.num_over = 0
        #: Why the store could not be used, the last time; empty if it could.
        self.trouble = ""
        self._ends = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="haltwise budgets", daemon=True)
        self._renewing.start()

    def reserve(self, request: str, accounts: Sequence[Account], amount: Amount) -> list[Standing]:
        """Holds back what a request can cost at most, in all of its accounts or in none.

        Args:
            request: Its id, which no other request has.
            accounts: Whose budgets it is to keep to.
            amount: The most that it can cost.

        Returns:
            How the accounts stood before.

        Raises:
            ShortError: If one has not enough left; nothing is held back then.
            InputError: If the store cannot be used.
        """
        now = self.now()

        def write(opened: Connection) -> list[Standing]:
            standings = [_standing(opened, account, now) for account in accounts]
            for one in standings:
                if one.left.nano < amount.nano or one.left.tokens < amount.tokens:
                    raise ShortError(one, amount)
            for one in standings:
                self._hold(opened, request, one, amount, now)
            return standings

        return self._run(write)

    def _hold(
        self, opened: Connection, request: str, standing: Standing, amount: Amount, now: float
    ) -> None:
        row = _row_of(standing.account, now)
        opened.execute(
            "INSERT INTO account VALUES (?, ?, 0, 0, 0, 0, 0) ON CONFLICT DO NOTHING",
            row,
            standing.until,
        )
        opened.execute(
            "UPDATE account SET requests = requests + 1, held_nano = held_nano + ?, "
            "held_tokens = held_tokens + ? WHERE id = ?",
            amount.nano,
            amount.tokens,
            row,
        )
        opened.execute(
            "INSERT INTO hold VALUES (?, ?, ?, ?, ?, ?, ?)",
            f"{request} {row}",
            request,
            row,
            self._process,
            now + _LEASE,
            amount.nano,
            amount.tokens,
        )

    def settle(self, request: str, spent: Amount) -> None:
        """Takes in what a request has cost; does nothing if nothing is held back for it any more.

        Args:
            request: Its id.
            spent: What it has cost.
        """
        with self._lock:
            self._unsettled[request] = spent
        self._settle_all()

    def _settle_all(self) -> None:
        """Settles what is unsettled, as soon as the store can be used."""
        with self._lock:
            waiting = dict(self._unsettled)

        def write(opened: Connection) -> int:
            return sum(_settled(opened, request, spent) for request, spent in waiting.items())

        try:
            over = self._run(write)
        except InputError as error:
            log.warning("a budget cannot be written: %s", error)
            return
        with self._lock:
            self.num_over += over
            for request in waiting:
                self._unsettled.pop(request, None)

    def standing(self, account: Account) -> Standing:
        """Returns how an account stands.

        Raises:
            InputError: If the store cannot be used.
        """
        now = self.now()
        return self._run(lambda opened: _standing(opened, account, now))

    def now(self) -> float:
        """Returns the time, in seconds since 1970."""
        return float(self._clock())

    def spent(self, account: Account) -> Amount:
        """Returns what an account has spent in the window that runs, without what is held back.

        Raises:
            InputError: If the store cannot be used.
        """
        row = _row_of(account, self.now())
        asked = "SELECT spent_nano, spent_tokens FROM account WHERE id = ?"
        found = self._run(lambda opened: opened.execute(asked, row))
        return Amount(*found[0]) if found else Amount()

    def largest(
        self, budget_of: Callable[[str], Budget | None], num: int = 100
    ) -> tuple[list[dict[str, Any]], int]:
        """Returns the accounts that have spent most in windows that run, everything's first.

        Args:
            budget_of: Tells the budget of an account by its name; None if it has none any more.
            num: The most accounts.

        Returns:
            The accounts as JSON objects, and how many there are in all.

        Raises:
            InputError: If the store cannot be used.
        """
        now = self.now()
        asked = (
            f"SELECT {', '.join(_TOLD)}, COUNT(*) OVER () FROM account WHERE until > ? "
            "ORDER BY CASE WHEN id LIKE ? THEN 0 ELSE 1 END, "
            "spent_nano + held_nano DESC, spent_tokens + held_tokens DESC LIMIT ?"
        )
        found = self._run(lambda opened: opened.execute(asked, now, f"{EVERYTHING} %", num))
        rows = [dict(zip(_TOLD, row, strict=False)) for row in found]
        return [_told(row, budget_of, now) for row in rows], found[0][-1] if found else 0

    def close(self) -> None:
        """Settles what can be settled, and closes the store."""
        self._ends.set()
        self._renewing.join()
        if self._unsettled:
            self._settle_all()
        with self._lock:
            self._transactions.close()

    def _renew(self) -> None:
        """Answers for what is held back, and takes in what dead processes held, until the end."""
        while not self._ends.wait(_RENEWS):
            self.renew()
            if self._unsettled:
                self._settle_all()

    def renew(self) -> None:
        """Does so once."""
        now = self.now()

        def write(opened: Connection) -> None:
            ours = "UPDATE hold SET until = ? WHERE process = ?"
            opened.execute(ours, now + _LEASE, self._process)
            for (request,) in opened.execute(
                "SELECT DISTINCT request FROM hold WHERE until < ?", now
            ):
                _settled(opened, request, None)
            opened.execute("DELETE FROM account WHERE until < ?", now - _KEPT)

        try:
            self._run(write)
        except InputError as error:
            log.warning("a budget cannot be written: %s", error)

    def _run(self, do: Callable[[Connection], T]) -> T:
        with self._lock:
            try:
                done = self._transactions.run(do)
            except InputError as error:
                self.trouble = str(error)
                raise
            self.trouble = ""
            return done


def _row_of(account: Account, now: float) -> str:
    return f"{account.name} {account.budget.window(now)[0]}"


def _standing(opened: Connection, account: Account, now: float) -> Standing:
    budget, until = account.budget, account.budget.window(now)[1]
    found = opened.execute(
        "SELECT spent_nano + held_nano, spent_tokens + held_tokens, requests FROM account "
        "WHERE id = ?",
        _row_of(account, now),
    )
    nano, tokens, requests = found[0] if found else (0, 0, 0)
    left = Amount(_left(budget.nano, nano), _left(budget.tokens, tokens))
    passed = 0.0 if until == math.inf else 1 - (until - now) / budget.seconds
    return Standing(account, left, requests, until, passed)


def _told(
    row: dict[str, Any], budget_of: Callable[[str], Budget | None], now: float
) -> dict[str, Any]:
    """Returns an account as its operator is told of it.

    Its limits are those of its budget; a window that began under another one has none.
    """
    name = row["id"].rpartition(" ")[0]
    budget = budget_of(name)
    if budget is None or _row_of(Account(name, budget), now) != row["id"]:
        budget = Budget()
    limits = {"limit_nano": budget.nano, "limit_tokens": budget.tokens}
    return row | {"id": name, "until": _finite(row["until"])} | limits


def _finite(until: float) -> float | None:
    """Returns the end of a window as JSON has it: null if there is none."""
    return None if until == math.inf else until


def _left(limit: int | None, gone: int) -> int:
    return MOST if limit is None else max(limit - gone, 0)


def _settled(opened: Connection, request: str, spent: Amount | None) -> bool:
    """Puts what a request has cost in the place of what is held back for it.

    Args:
        opened: The store.
        request: The request.
        spent: What it has cost; None takes all that is held back.

    Returns:
        Whether that is more than was held back.
    """
    held = opened.execute("SELECT account, nano, tokens FROM hold WHERE request = ?", request)
    opened.execute("DELETE FROM hold WHERE request = ?", request)
    is_over = False
    for account, nano, tokens in held:
        cost = Amount(nano, tokens) if spent is None else spent
        is_over |= cost.nano > nano or cost.tokens > tokens
        opened.execute(
            # What is spent beyond all reason grows no further, so that all stores can hold it.
            "UPDATE account SET held_nano = held_nano - ?, held_tokens = held_tokens - ?, "
            "spent_nano = spent_nano + CASE WHEN spent_nano < ? THEN ? ELSE 0 END, "
            "spent_tokens = spent_tokens + CASE WHEN spent_tokens < ? THEN ? ELSE 0 END "
            "WHERE id = ?",
            nano,
            tokens,
            MOST,
            cost.nano,
            MOST,
            cost.tokens,
            account,
        )
    return is_over
