"""What everything may spend and has spent, for Prometheus; no tenant is named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from haltwise import InputError
from haltwise.control.budgets import Amount, Budget
from haltwise.control.groups import EVERYTHING
from haltwise.control.tariffs import NANO
from haltwise.proxy.billing import Cashier

_SPENT = "What all requests of this window have spent, of all processes with this state"
_LIMIT = "What all requests of a window may spend"
_URGENCY = "How urgent it is that requests cost less, 0 to 1; at 1 no certified price is enough"


@dataclass(frozen=True)
class BudgetFigures(Collector):
    """The numbers of the budget of all requests, as they are when they are collected."""

    cashier: Cashier

    def collect(self) -> Iterator[Metric]:
        """Tells them; none if together requests may spend anything."""
        account = self.cashier.everything
        if account is None:
            return
        yield from _of_each("limit", _LIMIT, account.budget)
        if account.budget.requests is not None:
            urgency = self.cashier.pace.urgency.get(EVERYTHING, 0.0)
            yield GaugeMetricFamily("haltwise_budget_urgency", _URGENCY, urgency)
        with suppress(InputError):
            yield from _of_each("spent", _SPENT, self.cashier.budgets.spent(account))


def _of_each(what: str, text: str, told: Amount | Budget) -> Iterator[Metric]:
    """What is told in dollars and in tokens."""
    if told.nano is not None:
        yield GaugeMetricFamily(f"haltwise_budget_{what}_dollars", text, told.nano / NANO)
    if told.tokens is not None:
        yield GaugeMetricFamily(f"haltwise_budget_{what}_tokens", text, told.tokens)
