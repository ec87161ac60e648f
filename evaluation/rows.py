"""Rows of numbers with names, which an evaluation finds.

Shares are in [0, 1]. Numbers of tokens are means over traces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, TypeVar

#: The two ends of a 95 % interval, paired by question.
Interval = list[float]


@dataclass(frozen=True)
class SweepRow:
    """What a policy comes to at one of its numbers.

    An interval is None where it was not asked for, or the traces are of a single question.
    """

    policy: str
    parameter: float | None
    """The policy's number; None is never halting, or that of a rule, which has none."""
    split: str
    """The name, for people, of the split that the traces are of."""
    em: float
    em_delta: float
    """The EM less that of never halting."""
    tokens: float
    saving: float
    halt_rate: float
    right_to_wrong: float
    """The share of the traces that halting turns from right to wrong."""
    wrong_to_right: float
    hopeless_saving: float
    """The part of the saving that comes from traces that are never right."""
    gave_up: float
    """The share of the traces that are halted at a wrong answer."""
    em_delta_interval: Interval | None
    saving_interval: Interval | None


@dataclass(frozen=True)
class MissingSweep:
    """A policy that is not available, mostly since the traces lack what it looks at."""

    WHOLE: ClassVar[type] = SweepRow
    policy: str
    split: str


@dataclass(frozen=True)
class FrozenRow(SweepRow):
    """What a policy comes to at its operating point.

    Its frontier is made of its grid and its operating points.
    """

    gate: float
    head_em_lead: float
    """The head's EM less this policy's, each at its own point."""
    head_em_lead_interval: Interval | None
    head_saving_lead: float
    head_saving_lead_interval: Interval | None
    saving_at_head_em: float | None
    """The saving at the head's EM on this policy's frontier; None where it never has that EM, and
    for rules."""
    head_lead_at_equal_em: float | None
    """The head's saving less `saving_at_head_em`; where that is None, less the saving at this
    policy's highest EM, which favours it. None for rules, which have no frontier."""
    head_lead_at_equal_em_interval: Interval | None
    """The interval of that lead. The frontier is built anew in every resample: each takes the best
    of many points, and what chance adds to it counts against the head."""
    hindsight_share: float | None
    """The saving as a share of that of halting at the first correct point; None if that is 0."""
    hindsight_share_interval: Interval | None
    """The interval of that share; None also where a resample leaves hindsight no saving."""
    area: float | None
    """The area under this policy's frontier and above AREA_FLOOR, see `frontier_area`; None for
    rules."""

    @property
    def halts(self) -> bool:
        """Whether the policy halts any of the traces at its number."""
        return self.parameter is not None and self.halt_rate > 0


@dataclass(frozen=True)
class HonestRow(SweepRow):
    """What a policy comes to where it is sure to keep its gate on new questions."""

    gate: float
    confidence: float
    """How sure that is; see `evaluation.honest`."""


@dataclass(frozen=True)
class SegmentRow:
    """What the head comes to on a segment at the price of all, and at a price of its own."""

    segment: str
    """The segment's name; empty for all of them together."""
    gate: float
    num_questions: int
    price_of_all: float
    em_delta_of_all: float
    em_delta_of_all_interval: Interval | None
    saving_of_all: float
    price: float | None
    """The segment's own price; None never halts, or is of all of them together."""
    em_delta: float
    em_delta_interval: Interval | None
    saving: float


@dataclass(frozen=True)
class MissingPoint:
    """A policy without an operating point at a gate, or one that is not available at all."""

    WHOLE: ClassVar[type] = FrozenRow
    policy: str
    split: str
    gate: float


@dataclass(frozen=True)
class GroupRow:
    """What a policy comes to at its operating point on a group of traces."""

    by: str
    """What the traces of a group share: segment, task or model."""
    group: str
    gate: float
    policy: str
    num_questions: int
    num_traces: int
    em: float
    em_never: float
    """The EM of never halting on the same traces."""
    em_delta: float
    em_delta_interval: Interval | None
    saving: float
    saving_interval: Interval | None
    head_em_lead: float
    head_em_lead_interval: Interval | None
    head_saving_lead: float
    head_saving_lead_interval: Interval | None


@dataclass(frozen=True)
class PricePoint:
    """What a recording comes to when it is halted at some price."""

    price: float
    em: float
    em_interval: Interval | None
    tokens: float
    """The tokens, probes included."""
    tokens_interval: Interval | None


@dataclass(frozen=True)
class RecordingRow:
    """What a recording comes to, alone and halted by a head at the head's own price.

    A lead is over the first of the recordings that are set side by side, paired by question.
    """

    traces: str
    """The file or folder of the recording."""
    lm: str
    """The name of its LM, or the names."""
    head: str
    """The run folder of the head."""
    price: float
    """The head's own price; 0 never halts."""
    evidence: bool
    """Whether no head decides on a question that it learned from."""
    num_questions: int
    num_traces: int
    em: float
    """The EM of never halting."""
    em_interval: Interval | None
    em_lead: float
    em_lead_interval: Interval | None
    tokens: float
    """The tokens of never halting."""
    tokens_interval: Interval | None
    tokens_lead: float
    tokens_lead_interval: Interval | None
    halted_em: float
    halted_em_lead: float
    halted_em_lead_interval: Interval | None
    em_delta: float
    """The EM halted less that of never halting, both on this recording."""
    em_delta_interval: Interval | None
    saving: float
    """The share of this recording's own tokens that is not spent."""
    saving_interval: Interval | None
    saving_lead: float
    saving_lead_interval: Interval | None
    sweep: tuple[PricePoint, ...]
    """The recording at the head's own price, and then at each price of its grid."""


@dataclass(frozen=True)
class LookingRow:
    """What a policy saves under a decision rule, read from its frontier over the same traces.

    A lead is over the first of the rules, with the same policy, paired by question.
    """

    rule: str
    policy: str
    num_points: float
    """Decision points a trace, in the mean."""
    savings: dict[str, float]
    """By the EM that may be lost, in points, the saving net of all looks."""
    saving: float
    """Their mean."""
    saving_lead: float
    saving_lead_interval: Interval | None


_WithIntervals = TypeVar(
    "_WithIntervals", SweepRow, FrozenRow, GroupRow, RecordingRow, PricePoint, LookingRow
)


def without_intervals(row: _WithIntervals) -> _WithIntervals:
    """Returns a row with None for its intervals, which tell nothing of a single question.

    All resamples of it are the same.
    """
    nothing: dict[str, Any] = {
        field.name: None for field in fields(row) if field.name.endswith("_interval")
    }
    if isinstance(row, RecordingRow):
        nothing["sweep"] = tuple(map(without_intervals, row.sweep))
    return replace(row, **nothing)


def to_json(found: Any) -> Any:
    """Returns dataclasses as JSON objects with a key for each field, in order.

    If a class names another as its WHOLE, its objects get all fields of that one, and None for
    those that they lack.
    """
    if is_dataclass(found):
        names = [field.name for field in fields(getattr(found, "WHOLE", found))]
        return {name: to_json(getattr(found, name, None)) for name in names}
    if isinstance(found, Mapping):
        return {str(key): to_json(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [to_json(value) for value in found]
    return found
