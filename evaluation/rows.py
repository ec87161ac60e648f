"""What an evaluation finds, as numbers with names. Shares are in [0, 1], tokens are a trace's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, TypeVar

#: The two ends of a 95 % interval, paired by question.
Interval = list[float]


@dataclass(frozen=True)
class SweepRow:
    """A policy at one of its numbers. An interval is None for traces of a single question."""

    policy: str
    parameter: float | None
    """Its number; None never halts, or is that of a rule without one."""
    split: str
    """Which traces; a name for people."""
    em: float
    em_delta: float
    """EM less that of never halting."""
    tokens: float
    saving: float
    halt_rate: float
    right_to_wrong: float
    """Share of the traces that halting turns from right to wrong."""
    wrong_to_right: float
    hopeless_saving: float
    """The part of the saving that comes from traces that are never right."""
    gave_up: float
    """Share of the traces that are halted at a wrong answer."""
    em_delta_interval: Interval | None
    saving_interval: Interval | None


@dataclass(frozen=True)
class MissingSweep:
    """A policy that is not available: the traces lack what it looks at."""

    WHOLE: ClassVar[type] = SweepRow
    policy: str
    split: str


@dataclass(frozen=True)
class FrozenRow(SweepRow):
    """A policy at its operating point. Its frontier is that of its grid and its points."""

    gate: float
    head_em_lead: float
    """The head's EM less this policy's, each at its own point."""
    head_em_lead_interval: Interval | None
    head_saving_lead: float
    head_saving_lead_interval: Interval | None
    saving_at_head_em: float | None
    """On this policy's frontier; None where it never has the head's EM, and for rules."""
    head_lead_at_equal_em: float | None
    """The head's saving less `saving_at_head_em`; where that is None, less the saving at this
    policy's highest EM, which favours it. None for rules, which have no frontier."""
    head_lead_at_equal_em_interval: Interval | None
    """Of frontiers built anew in every resample: each takes the best of many points, and what
    chance adds to it counts against the head."""
    hindsight_share: float | None
    """The saving as a share of that of halting at the first correct point; None if that is 0."""
    hindsight_share_interval: Interval | None
    """None also where a resample leaves hindsight no saving."""
    area: float | None
    """Under this policy's frontier and above AREA_FLOOR, see `frontier_area`."""


@dataclass(frozen=True)
class MissingPoint:
    """A policy without an operating point at a gate, or one that is not available at all."""

    WHOLE: ClassVar[type] = FrozenRow
    policy: str
    split: str
    gate: float


@dataclass(frozen=True)
class GroupRow:
    """A policy at its operating point, on a group of traces."""

    by: str
    """What the traces of a group share: segment, task or model."""
    group: str
    gate: float
    policy: str
    num_questions: int
    num_traces: int
    em: float
    em_never: float
    """EM of never halting on the same traces."""
    em_delta: float
    em_delta_interval: Interval | None
    saving: float
    saving_interval: Interval | None
    head_em_lead: float
    head_em_lead_interval: Interval | None
    head_saving_lead: float
    head_saving_lead_interval: Interval | None


_WithIntervals = TypeVar("_WithIntervals", SweepRow, FrozenRow, GroupRow)


def without_intervals(row: _WithIntervals) -> _WithIntervals:
    """A row whose intervals are None: of a single question, all resamples are the same."""
    nothing: dict[str, Any] = {
        field.name: None for field in fields(row) if field.name.endswith("_interval")
    }
    return replace(row, **nothing)


def to_json(found: Any) -> Any:
    """Dataclasses as JSON objects with a key a field, in order.

    One of a class that names a WHOLE one gets all fields of that, those that it lacks as None.
    """
    if is_dataclass(found):
        names = [field.name for field in fields(getattr(found, "WHOLE", found))]
        return {name: to_json(getattr(found, name, None)) for name in names}
    if isinstance(found, Mapping):
        return {str(key): to_json(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [to_json(value) for value in found]
    return found
