"""What the control knows of its groups, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from haltwise.control.books import Books
from haltwise.control.governed import GovernedControl
from haltwise.control.governor import is_open
from haltwise.control.groups import EVERYTHING
from haltwise.control.history import Measured

Kind = type[CounterMetricFamily] | type[GaugeMetricFamily]

# Of groups, by name: what it is, and how it is read from the books.
_OfBooks = dict[str, tuple[str, Callable[[Books, str], float]]]
_STANDING: _OfBooks = {
    "haltwise_group_target_ratio": (
        "Mean loss that is promised",
        lambda books, name: books.groups.promise_of(name).target,
    ),
    "haltwise_group_breaker_open": (
        "1 if the breaker is open",
        lambda books, name: float(is_open(books.groups.group(name))),
    ),
    "haltwise_group_epoch": (
        "How often it was begun to certify anew",
        lambda books, name: int(books.groups.group(name).epoch),
    ),
}
_COUNTED: _OfBooks = {
    "haltwise_group_requests": (
        "Requests, of all processes with this state",
        lambda books, name: books.sum_of(name).num_requests,
    ),
    "haltwise_group_audits": (
        "Audits that have told something, of all processes with this state",
        lambda books, name: books.sum_of(name).num_audits,
    ),
}
_PART = "share of the bill at a price of 0 that is saved at the price served"
_LOST = "mean loss at the price served"
_MEASURED: dict[str, tuple[str, Callable[[Measured], float]]] = {
    "haltwise_group_price": ("Price served, in EM per 1,000 tokens", lambda one: one.price),
    "haltwise_group_ceiling": ("Largest price that is certified", lambda one: one.ceiling),
    "haltwise_group_loss_low_ratio": (f"Lower end of the {_LOST}", lambda one: one.loss[0]),
    "haltwise_group_loss_ratio": (f"Estimate of the {_LOST}", lambda one: one.loss[1]),
    "haltwise_group_loss_high_ratio": (f"Upper end of the {_LOST}", lambda one: one.loss[2]),
    "haltwise_group_saving_low_ratio": (f"Lower end of the {_PART}", lambda one: one.saving[0]),
    "haltwise_group_saving_ratio": (f"Estimate of the {_PART}", lambda one: one.saving[1]),
    "haltwise_group_saving_high_ratio": (f"Upper end of the {_PART}", lambda one: one.saving[2]),
}


@dataclass(frozen=True)
class ControlFigures(Collector):
    """The numbers of one control, as they are when they are collected."""

    control: GovernedControl
    shows_all: bool
    """Whether all groups are told of, whose names clients have given; else everything alone."""

    def collect(self) -> Iterator[Metric]:
        """Tells them."""
        yield from self._of_control()
        books, history = self.control.keeper.books, self.control.history
        names = list(books.groups.groups) if self.shows_all else [EVERYTHING]
        kinds: tuple[tuple[Kind, _OfBooks], ...] = (
            (GaugeMetricFamily, _STANDING),
            (CounterMetricFamily, _COUNTED),
        )
        for kind, families in kinds:
            for key, (text, of_books) in families.items():
                told = {name: of_books(books, name) for name in names}
                yield _family(kind, key, text, told)
        newest = {name: history.newest(name) for name in names}
        for key, (text, of_measured) in _MEASURED.items():
            told = {name: of_measured(one) for name, one in newest.items() if one is not None}
            yield _family(GaugeMetricFamily, key, text, told)

    def _of_control(self) -> Iterator[Metric]:
        books, control = self.control.keeper.books, self.control
        gauges = {
            "haltwise_target_ratio": ("Mean loss that is promised", books.groups.promise.target),
            "haltwise_audit_ratio": ("Share of requests to be audited at rest", control.audit),
            "haltwise_audits_due": ("Audits before any price is served", books.groups.audits_due()),
            "haltwise_audits_under_way": ("Audits under way", len(books.groups.under_way)),
            "haltwise_labels_due": ("Audits that wait for a label", len(books.awaited)),
        }
        counters = {
            "haltwise_control_failures": ("Failures of the control", control.num_failures),
            "haltwise_rows_dropped": ("Rows that the record lacks", control.record.num_dropped),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(name, text, value)


def _family(kind: Kind, name: str, text: str, told: dict[str, float]) -> Metric:
    """A number of every group."""
    family = kind(name, text, labels=["group"])
    for group, value in told.items():
        family.add_metric([group], value)
    return family
