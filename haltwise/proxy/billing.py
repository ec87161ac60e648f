"""What requests may spend: before one runs, as much as it can cost is held back in its budgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from heapq import nlargest
from pathlib import Path
from typing import Any

import anyio.to_thread

from haltwise import InputError
from haltwise.control.budgets import (
    MOST,
    Account,
    Amount,
    Budget,
    Budgets,
    ShortError,
    Standing,
)
from haltwise.control.groups import EVERYTHING
from haltwise.control.pacing import Pace
from haltwise.control.tariffs import NANO, Tariff, Tariffs, read_object
from haltwise.proxy.client import RefusedError
from haltwise.proxy.client_terms import unknown_tariff
from haltwise.proxy.metrics import Metrics
from haltwise.proxy.wire import Json, RawHeaders
from haltwise.session.request import Spent
from haltwise.session.thought import PointRules

_SCOPES = (EVERYTHING, "tenant", "session", "request")
# Tokens that a template adds to a request, beside those of its body.
_OF_TEMPLATE = 256
# Tokens that a thought is closed with.
_OF_CLOSE = 64
# Tokens below which an answer is not begun that a budget would cut.
_FEWEST = 256
# The longest time after which a client is told to come again.
_LATEST = 86_400
# Accounts of which the status tells at least how urgent they are.
_MOST_URGENT = 100
# By endpoint, the fields that limit what is generated there; others may not be heeded.
_LIMITS = {
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
}
# How paths end where nothing is generated.
_ONLY_READ = ("/embeddings", "/rerank", "/score", "/classify", "/pooling", "/moderations")
# Fields by which a prompt has more than its body.
_REFERRING = ("previous_response_id", "conversation", "chat_template")
# What is text of a body's own, among the parts of messages and among an input's items.
_TEXTS = ("text", "input_text", "output_text")
_ITEMS = ("message", "function_call")


class BudgetFile:
    """What everybody may spend.

    Args:
        path: A JSON file that gives any of everything, each tenant, each session and each request a
            budget, such as {"everything": {"dollars": 500, "hours": 24}}.

    Raises:
        InputError: If it cannot be read, or a budget makes no sense.
    """

    def __init__(self, path: Path) -> None:
        """Reads the file."""
        told = read_object(path, "budgets")
        if not told or not set(told) <= set(_SCOPES):
            raise InputError(f"budgets {path}: expected budgets of {', '.join(_SCOPES)}")
        self.by_scope: dict[str, Budget] = {}
        for scope, entry in told.items():
            try:
                self.by_scope[scope] = Budget.read(entry)
            except InputError as error:
                raise InputError(f"budgets {path}, {scope}: {error}") from None
        if self.by_scope.get("request", Budget()).seconds < math.inf:
            raise InputError(f"budgets {path}, request: hours are given, expected none")

    @property
    def counts_money(self) -> bool:
        """Whether any budget is one of money."""
        return any(budget.nano is not None for budget in self.by_scope.values())

    @property
    def paces(self) -> bool:
        """Whether the spending of any is paced."""
        return any(budget.requests is not None for budget in self.by_scope.values())


def read_budgets(path: Path, tariffs: Tariffs | None) -> BudgetFile:
    """Reads what everybody may spend.

    Raises:
        InputError: If the file makes no sense, or counts money that nobody knows.
    """
    file = BudgetFile(path)
    if file.counts_money and tariffs is None:
        raise InputError(f"budgets {path}: dollars are given, expected --tariffs")
    return file


@dataclass(frozen=True)
class Size:
    """The most that a request can take."""

    num_input: int
    """Tokens of its prompt."""
    num_output: int
    """Tokens that it may generate."""
    num_choices: int = 1
    num_goes_on: int = 0
    """Requests that go on from its prompt and thought: the second leg, and looks at answers."""
    num_looked: int = 0
    """Tokens of a look at an answer."""
    num_thoughts: int = 1
    """Times that all of this may be taken."""

    def spent(self) -> Spent:
        """Returns what it takes if it takes all.

        Until a second leg begins, the first one goes on: each token that may be generated is a part
        of the second one's prompt or may be generated twice, which costs more.
        """
        num_looks = max(self.num_goes_on - 1, 0)
        again = self.num_goes_on * (self.num_input + _OF_CLOSE) + num_looks * self.num_output
        num_answers = self.num_choices + bool(self.num_goes_on)
        output = num_answers * self.num_output + num_looks * self.num_looked
        num_input = self.num_input + again
        return Spent(
            input_tokens=self.num_thoughts * num_input, output_tokens=self.num_thoughts * output
        )


@dataclass
class Bill:
    """What is held back for one request."""

    request: str
    """Its id."""
    tariff: Tariff | None
    held: Spent
    num_input: int
    """Tokens of its prompt, at most."""
    max_tokens: int | None = None
    """Tokens that it may generate, fewer than it asks for; None if it may have what it asks for."""
    urgency: float | None = None
    """How urgent it is that it costs less, in [0, 1]; None if no budget of it is paced."""
    standings: list[Standing] = field(default_factory=list)
    spent: Spent | None = None
    """What it has taken; None if nobody has counted it."""
    is_free: bool = False
    """Whether nothing was generated for it."""
    large: Bill | None = None
    """What is held back for the large LM; None if that is not to be asked."""
    is_unescalated: bool = False
    """Whether the large LM is not to be asked since a budget has no room for it."""

    def count(self, spent: Spent, num_asked: int) -> None:
        """Takes in what it has taken; prompts that nobody has counted are as long as they can be.

        Args:
            spent: What is known of it.
            num_asked: Requests that may have been sent for it.
        """
        self.is_free = False
        if spent.input_tokens is None:
            longest = self.num_input + (spent.output_tokens or 0) + _OF_CLOSE
            most = min(num_asked * longest, self.held.input_tokens or 0)
            spent = replace(spent, input_tokens=most)
        self.spent = spent

    def share(self, num_thoughts: int) -> Bill:
        """Returns the bill of one of so many thoughts, for each of which as much is held back."""
        held = Spent(
            input_tokens=(self.held.input_tokens or 0) // num_thoughts,
            output_tokens=(self.held.output_tokens or 0) // num_thoughts,
        )
        return replace(self, held=held, standings=[], spent=None)

    def count_shares(self, shares: Sequence[Bill]) -> None:
        """Takes in what all thoughts have taken; one that nobody has counted took all it could."""
        taken = [one.spent or one.held for one in shares]
        self.spent = Spent(
            input_tokens=sum(one.input_tokens or 0 for one in taken),
            cached_tokens=sum(one.cached_tokens or 0 for one in taken),
            output_tokens=sum(one.output_tokens or 0 for one in taken),
        )

    def leave_to_large(self) -> None:
        """Takes in that the large LM is asked, and nobody counts what it takes."""
        if self.large is not None:
            self.large.is_free = False

    def cost(self) -> Amount:
        """Returns what it costs; what nobody has counted costs all that it could."""
        spent = Spent(0, 0, 0, 0) if self.is_free else self.spent or self.held
        own = _amount(self.tariff, spent, self.held)
        return own if self.large is None else _sum(own, self.large.cost())

    def most(self) -> Amount:
        """Returns what it can cost."""
        held = _amount(self.tariff, self.held, self.held)
        return held if self.large is None else _sum(held, self.large.most())


class Cashier:
    """Holds money and tokens back for requests, and settles their bills.

    Args:
        budgets: Where accounts are.
        file: What everybody may spend.
        own: By tenant, the budget that it has in the place of everybody's.
        tariffs: What tokens cost; None if no budget is one of money.
        rules: How the head's thoughts have decision points.
        context: The most tokens that an answer can have.
        metrics: Where is counted what budgets do.
    """

    def __init__(
        self,
        budgets: Budgets,
        file: BudgetFile,
        own: Mapping[str, Budget],
        tariffs: Tariffs | None,
        rules: PointRules,
        context: int,
        metrics: Metrics,
    ) -> None:
        """Has no request yet."""
        self.budgets, self._file, self._own, self._tariffs = budgets, file, own, tariffs
        self._rules, self._context, self._metrics = rules, context, metrics
        self.pace = Pace()
        metrics.budget_over.set_function(lambda: budgets.num_over)

    def replace(self, file: BudgetFile, own: Mapping[str, Budget], tariffs: Tariffs | None) -> None:
        """Takes other budgets and tariffs from the next request on."""
        self._file, self._own, self._tariffs = file, own, tariffs

    async def open(
        self,
        request: str,
        who: Mapping[str, str],
        most: float | None,
        model: str,
        size: Callable[[int], Size],
        asked: int | None,
        can_cut: bool,
        large: str | None = None,
    ) -> Bill:
        """Holds back what a request can cost at most.

        Where a budget has no room for the large LM, it is not to be asked; where there is none
        for the other one, it is to generate fewer tokens.

        Args:
            request: Its id.
            who: By scope, whose it is: a tenant, a session; empty if nobody's.
            most: Dollars that the client lets it cost.
            model: The LM that it names.
            size: Tells how much it can take, if it may generate so many tokens.
            asked: Tokens that it may generate; None if it sets no limit.
            can_cut: Whether it can be told to generate fewer.
            large: The large LM that it may be left to; None if there is none.

        Raises:
            RefusedError: If a budget has not enough left, or cannot be asked.
        """
        accounts, for_one = self._accounts(who), self._for_one(most)
        budgets = [*(one.budget for one in accounts), for_one]
        tariff = self._tariff(model, budgets)
        wanted = limit = self._context if asked is None else min(asked, self._context)
        whole, bill = size(limit), _bill(request, tariff, size(limit))
        if large is not None:
            # The request goes there as it is, and once.
            bill.large = _bill(request, self._tariff(large, budgets), replace(whole, num_goes_on=0))
            bill.large.is_free = True  # until it is asked
        standings: list[Standing] | None = None
        while standings is None:
            amount = bill.most()
            try:
                _check(for_one, amount)
                standings = await self._reserved(request, accounts, amount)
            except ShortError as short:
                if bill.large is not None:
                    bill.large, bill.is_unescalated = None, True
                    continue
                less = _affordable(tariff, size, limit, short.standing.left) if can_cut else 0
                if less < max(min(wanted, _FEWEST), 1):
                    raise self._refused(short) from None
                limit = less
                bill = replace(
                    _bill(request, tariff, size(limit)), is_unescalated=large is not None
                )
        if bill.is_unescalated:
            self._metrics.budget_unescalated.inc()
        if limit < wanted:
            self._metrics.budget_cut.inc()
            bill.max_tokens = limit
        bill.urgency, bill.standings = self.pace.of(standings), standings
        return bill

    async def close(self, bill: Bill) -> None:
        """Settles a bill; what nobody has counted is taken to have cost all that it could."""
        cost = bill.cost()
        self._metrics.cost_dollars.inc(cost.nano / NANO)
        for standing in bill.standings:
            self.pace.spent(standing, cost)
        if bill.standings:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self.budgets.settle, bill.request, cost)

    async def _reserved(
        self, request: str, accounts: list[Account], amount: Amount
    ) -> list[Standing]:
        if not accounts:
            return []
        try:
            with anyio.CancelScope(shield=True):
                found = await anyio.to_thread.run_sync(
                    self.budgets.reserve, request, accounts, amount
                )
        except InputError:
            message = "the budgets cannot be asked"
            raise RefusedError(503, "budget", message, _retry_after(1)) from None
        return found

    @property
    def everything(self) -> Account | None:
        """The account of all requests; None if together they may spend anything."""
        return next(iter(self._accounts({})), None)

    def _accounts(self, who: Mapping[str, str]) -> list[Account]:
        """Returns the accounts of a request."""
        names = [EVERYTHING, *(f"{scope} {whose}" for scope, whose in who.items() if whose)]
        budgets = {name: self._budget_of(name) for name in names}
        return [Account(name, budget) for name, budget in budgets.items() if budget is not None]

    def _budget_of(self, name: str) -> Budget | None:
        """Returns the budget of an account by its name; None if it has none."""
        scope, _, whose = name.partition(" ")
        own = self._own.get(whose) if scope == "tenant" else None
        return own or self._file.by_scope.get(scope)

    def _for_one(self, most: float | None) -> Budget:
        """Returns what a single request may cost."""
        own = self._file.by_scope.get("request", Budget())
        if most is None:
            return own
        nano = round(min(most * NANO, MOST))
        return Budget(nano if own.nano is None else min(nano, own.nano), own.tokens)

    def _tariff(self, model: str, budgets: list[Budget]) -> Tariff | None:
        """Returns what the tokens of an LM cost.

        Raises:
            RefusedError: If nobody knows, and a budget is one of money.
        """
        found = None if self._tariffs is None else self._tariffs.of(model)
        if found is None and any(budget.nano is not None for budget in budgets):
            raise unknown_tariff(model)
        return found

    def _refused(self, short: ShortError) -> RefusedError:
        """Counts, and returns what a client is told whose budget is spent."""
        scope, until = short.standing.account.scope, short.standing.until
        self._metrics.budget_refused.labels(scope).inc()
        if until == math.inf:  # it does not help to wait
            return RefusedError(400 if scope == "request" else 429, "budget", str(short))
        seconds = math.ceil(min(max(until - self.budgets.now(), 1.0), _LATEST))
        return RefusedError(429, "budget", str(short), _retry_after(seconds))

    def size_of(
        self,
        path: str,
        num_bytes: int,
        body: Json,
        is_watched: bool,
        looks: bool,
        num_thoughts: int = 1,
    ) -> tuple[Callable[[int], Size], int | None]:
        """Returns how much a request can take, by the tokens it may generate, and its own limit.

        Args:
            path: The endpoint's.
            num_bytes: Bytes of its body: no token of it has less than one.
            body: What it says; empty if that cannot be read.
            is_watched: Whether its thought may be halted.
            looks: Whether the head looks at answers.
            num_thoughts: The most thoughts behind its answer.

        Raises:
            RefusedError: If nobody can tell how many answers it wants.
        """
        num_prompts = _num_prompts(body.get("prompt"))
        num_choices = num_prompts * max(1, _choices(body, "n"), _choices(body, "best_of"))
        is_told = bool(body) and not _has_more_than_text(body)
        num_input = num_bytes + _OF_TEMPLATE if is_told else num_prompts * self._context
        spacing = self._rules.every_repeated or self._rules.every or 1

        def size(num: int) -> Size:
            looked = num // spacing if looks else 0
            goes_on = 1 + looked if is_watched else 0
            num_looked = self._rules.max_answer_tokens
            return Size(num_input, num, num_choices, goes_on, num_looked, num_thoughts)

        return size, _limit(path, body)

    def _paces(self, name: str) -> bool:
        budget = self._budget_of(name)
        return budget is not None and budget.requests is not None

    def _largest(self) -> tuple[list[Json], int]:
        with suppress(InputError):
            return self.budgets.largest(self._budget_of)
        return [], 0

    def status(self) -> Json:
        """Returns, as a JSON object, how those accounts stand that have spent most."""
        (accounts, num), moved = self._largest(), dict(self.pace.urgency)
        most_urgent = nlargest(_MOST_URGENT, moved, key=moved.__getitem__)
        names = [*(one["id"] for one in accounts), *most_urgent]
        return {
            "over": self.budgets.num_over,
            "trouble": self.budgets.trouble,
            "accounts": accounts,
            "num_accounts": num,
            # Where urgency is 1, no certified price is high enough.
            "urgency": {name: moved.get(name, 0.0) for name in names if self._paces(name)},
        }


def _bill(request: str, tariff: Tariff | None, size: Size) -> Bill:
    """Returns a bill for which nothing is held back yet."""
    return Bill(request, tariff, size.spent(), size.num_input)


def _sum(one: Amount, other: Amount) -> Amount:
    return Amount(min(one.nano + other.nano, MOST), min(one.tokens + other.tokens, MOST))


def _amount(tariff: Tariff | None, spent: Spent, most: Spent) -> Amount:
    """Returns what something costs; what nobody has counted is taken to be all that it could be."""
    num_input = most.input_tokens if spent.input_tokens is None else spent.input_tokens
    num_output = most.output_tokens if spent.output_tokens is None else spent.output_tokens
    assert num_input is not None and num_output is not None
    nano = 0
    if tariff is not None:
        nano = tariff.cost(num_input, spent.cached_tokens or 0, num_output)
    return Amount(min(nano, MOST), min(num_input + num_output, MOST))


def _affordable(
    tariff: Tariff | None, size: Callable[[int], Size], limit: int, left: Amount
) -> int:
    """Returns how many tokens a request may generate for what is left, fewer than before."""
    low, high = 0, limit - 1
    while low < high:
        middle = (low + high + 1) // 2
        most = size(middle).spent()
        cost = _amount(tariff, most, most)
        fits = cost.nano <= left.nano and cost.tokens <= left.tokens
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _check(budget: Budget, amount: Amount) -> None:
    """Refuses what a single request may not cost.

    Raises:
        ShortError: If it may not.
    """
    left = Amount(
        MOST if budget.nano is None else budget.nano,
        MOST if budget.tokens is None else budget.tokens,
    )
    if amount.nano > left.nano or amount.tokens > left.tokens:
        raise ShortError(Standing(Account("request", budget), left, 0, math.inf, 0.0), amount)


def _limit(path: str, body: Json) -> int | None:
    """Returns how many tokens a request may generate; None if nothing limits that for sure.

    Servers differ in which of two limits holds, and may take what is no number above 0 for none.
    """
    if path.endswith(_ONLY_READ):
        return 0
    own = [body[name] for name in _LIMITS.get(path, ()) if body.get(name) is not None]
    # llama-server heeds its own before any other.
    told = own if body.get("n_predict") is None else [*own, body["n_predict"]]
    return max(told) if own and all(map(_is_above_0, told)) else None


def _is_above_0(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _choices(body: Json, name: str) -> int:
    """Returns how many answers a field of a body wants.

    Raises:
        RefusedError: If it is no whole number: servers may take for one what is written as another.
    """
    value = body.get(name)
    if not isinstance(value, int | None):
        message = f"{name} is {value!r:.40}, expected a whole number"
        raise RefusedError(400, "invalid_request_error", message)
    return value or 0


def _num_prompts(prompt: Any) -> int:
    """Returns how many prompts there are, each of which is answered: a list of ids is one."""
    is_list = isinstance(prompt, list) and not all(isinstance(one, int) for one in prompt)
    return len(prompt) if is_list else 1


def _has_more_than_text(body: Json) -> bool:
    """Whether the prompt has a part of which the body does not tell how many tokens it has."""
    lists = [body[name] for name in ("messages", "input") if isinstance(body.get(name), list)]
    items = [one for told in lists for one in told if isinstance(one, dict)]
    contents = [one.get("content") for one in items]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return (
        any(body.get(name) for name in _REFERRING)
        or isinstance(body.get("prompt"), dict)
        or any("type" in one and one["type"] not in _ITEMS for one in items)
        or any(not isinstance(part, dict) or part.get("type") not in _TEXTS for part in parts)
    )


def _retry_after(seconds: int) -> RawHeaders:
    return [(b"retry-after", str(seconds).encode())]
