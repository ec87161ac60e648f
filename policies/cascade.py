"""A trained cascade as a policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from envs.replay import observed_features
from haltwise.policy.cascade import Act, Cascade
from haltwise.policy.halting import Probing
from haltwise.policy.signals import Float
from policies.course import AT_START, Course, Parameter
from policies.head import price_grid
from traces import Pairs, Traces


class _Seen(NamedTuple):
    """What a cascade sees of the pairs that it decides about."""

    cascade: Cascade
    rows: NDArray[np.bool_]  # (N,) the pairs
    features: Float  # (P, F) of all their points
    asked: Float  # (n, Q) of their questions


@dataclass(frozen=True)
class CascadePolicy:
    """A trained cascade, which decides as it does beside two LMs; its number is the price."""

    cascade: Cascade
    """The cascade that decides about every question that `kept_back` does not name."""
    kept_back: Mapping[str, Cascade] = field(default_factory=dict)
    """By question id, for questions that `cascade` learned from, one that never saw them."""

    name: ClassVar[str] = "cascade"

    @property
    def probing(self) -> Probing:
        """How the cascade's head probes the small LM."""
        return self.cascade.head.config.halting.probing

    def signal(self, pairs: Pairs) -> list[_Seen]:
        """Returns what each cascade that decides about some of the pairs sees.

        Raises:
            InputError: If the traces lack a signal that the head needs.
        """
        names = pairs.small.question_id.tolist()
        judges = [self.kept_back.get(name, self.cascade) for name in names]
        seen = []
        for judge in {id(judge): judge for judge in judges}.values():
            rows = np.array([other is judge for other in judges])
            some, config = pairs.select(rows), judge.head.config
            features = observed_features(some.small, config.observing, config.halting)
            seen.append(_Seen(judge, rows, features, judge.reader.read(some.questions)))
        return seen

    def grid(self, signal: list[_Seen]) -> list[Parameter]:
        """Returns every other one of the prices that a head is judged at."""
        return [(price,) for price in price_grid(self.cascade.head.config.observing)[::2]]

    def course(self, pairs: Pairs, signal: list[_Seen], parameter: Parameter) -> Course:
        """Returns the course of all pairs at a price."""
        (price,) = parameter
        point = np.full(len(pairs), AT_START)
        escalated = np.ones(len(pairs), dtype=bool)
        for seen in signal:
            some = _course(seen, pairs.small.select(seen.rows), price)
            places = np.flatnonzero(seen.rows[pairs.small.trace_of_point])
            of_all = some.point.copy()
            of_all[some.point >= 0] = places[some.point[some.point >= 0]]
            point[seen.rows], escalated[seen.rows] = of_all, some.escalated
        return Course(point, escalated)

    def large_price(self, parameter: Parameter) -> float:
        """Returns what a token of the large LM costs at a price."""
        return parameter[0] * self.cascade.config.price_ratio


def _course(seen: _Seen, small: Traces, price: float) -> Course:
    """Returns the course of the traces that a cascade decides about."""
    cascade, asked = seen.cascade, seen.asked
    acts = cascade.at_point(seen.features, asked[small.trace_of_point], price)
    ended = cascade.at_end(last_features(small, seen.features), asked, price, ~small.finished)
    leaves, escalates = acts != Act.CONTINUE, acts == Act.ESCALATE
    course = Course.of_points(small, leaves, escalates, ended == Act.ESCALATE)
    return course.routed(cascade.at_start(asked, price) == Act.ESCALATE)


def last_features(traces: Traces, features: Float) -> Float:
    """Returns the features (N, F) at each trace's last point; NaN where it has none."""
    last = np.full((len(traces), features.shape[1]), np.nan, dtype=np.float32)
    has_points = np.diff(traces.offsets) > 0
    last[has_points] = features[traces.offsets[1:][has_points] - 1]
    return last
