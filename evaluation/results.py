"""Holds everything that an evaluation finds about a run, for the page and the JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose
from typing import TYPE_CHECKING, Any

from evaluation.behaviour import Behaviour
from evaluation.rows import (
    FrozenRow,
    GroupRow,
    HonestRow,
    MissingPoint,
    MissingSweep,
    SweepRow,
    to_json,
)
from evaluation.training_curve import CurvePoint
from evaluation.verdict import Verdict, conclusion, other_price
from haltwise import Certificate

if TYPE_CHECKING:  # the module loads an LM's framework, which a page does without
    from evaluation.live import Comparison


@dataclass(frozen=True)
class JudgedTraces:
    """The traces that an evaluation judged the policies on."""

    path: str
    digest: str
    num: int
    num_questions: int
    target: str = ""
    """What counts as right, in words; empty if it is the reference answers alone."""


@dataclass(frozen=True)
class Report:
    """What an evaluation finds about a run on some traces."""

    head: str
    """The run folder."""
    command: str
    """The command line that found all this."""
    traces: JudgedTraces
    split: str
    judged: str
    """How the rows of what is trained came about, in words."""
    num_trainings: int
    """The number of trainings of the head that decide on these traces."""
    evidence: bool
    """Whether the head's rows are evidence: no head decides on a question that it learned from."""
    rows: Sequence[SweepRow | MissingSweep]
    """The rules, and every policy over its grid."""
    frozen: Sequence[FrozenRow | MissingPoint]
    """Every policy at the run's operating points, one gate after the other."""
    strongest: dict[float, str | None]
    """By gate, the strongest baseline, see `evaluation.frozen.strongest`."""
    groups: Sequence[GroupRow]
    behaviour: Sequence[Behaviour]
    """What the head does inside thoughts, at each gate where it halts."""
    certificate: Certificate | None
    own_price: float
    """What the head takes by itself; not the price of its points if one was certified since."""
    honest: Sequence[HonestRow] = ()
    """Every policy at the points that are to keep a gate on new questions too; none if the run has
    chosen none."""
    curve: Sequence[CurvePoint] = ()
    """What the run's trainings by folds came to on the way; none without folds."""
    ran_live: bool = False
    """Whether the head was to run beside its LM; JSON tells of it only then."""
    live: Comparison | None = None
    """What came of that; None if the head never halts at any operating point."""

    @property
    def verdict(self) -> Verdict:
        """What the head is worth, and what follows from it."""
        return conclusion(
            self.frozen, self.groups, self.traces.num_questions, evidence=self.evidence
        )

    @property
    def other_price(self) -> str:
        """What the head serves if that is not what the verdict is about; else empty."""
        points = [row for row in self.frozen if isinstance(row, FrozenRow) and row.policy == "head"]
        if isclose(min(points, key=lambda row: row.gate).parameter or 0.0, self.own_price):
            return ""
        has_segments = self.certificate is not None and bool(self.certificate.segments)
        return other_price(self.own_price, has_segments, self.rows if self.evidence else [])

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object with a key for each field."""
        content: dict[str, Any] = to_json(self)
        del content["ran_live"]
        if not self.ran_live:
            del content["live"]
        return content
