"""An audit while it runs, and what was seen at its decision points."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from haltwise.control.draws import AuditDraw
from haltwise.control.replay import Replay
from haltwise.policy.signals import Signals
from haltwise.session.request import ThoughtReport, ThoughtRequest
from haltwise.session.thought import NEVER


@dataclass(frozen=True)
class Look:
    """What is known of an audit at one decision point."""

    signals: Signals
    """What was seen there, (1,)."""
    reached: int
    """Tokens of the thought when the head was asked: beside a look at an answer it goes on."""
    num_probe_tokens: int
    """Tokens that were generated to look at answers until then."""


@dataclass(eq=False)
class AuditedRequest:
    """A request that is answered in full, to tell what every price would have lost and saved."""

    id: str
    request: ThoughtRequest
    drawn: AuditDraw
    head: str
    """Whose prices it would have been served."""
    step: int
    """The step that it would have been served."""
    price: float
    """The price that it would have been served."""
    replays: dict[str, Replay]
    """By head, where its prices would have halted it."""
    is_dense: bool = False
    """Whether an answer is asked for at every decision point."""
    looks: dict[int, Look] = field(default_factory=dict)
    """By position, what is known of its decision points, in order."""
    report: ThoughtReport | None = None
    """What happened to it, once it has ended."""
    question: str = ""
    """What is asked, the same for equal questions; empty if it is unknown."""

    @property
    def replay(self) -> Replay:
        """That of the head whose prices it would have been served."""
        return self.replays[self.head]

    @property
    def positions(self) -> list[int]:
        """Where prices of any head would have halted it, each once."""
        found = np.unique(np.concatenate([one.positions for one in self.replays.values()])).tolist()
        return [position for position in found if position != NEVER]

    @property
    def other_positions(self) -> list[int]:
        """Its other decision points."""
        known = set(self.positions)
        return [at for at in self.looks if at not in known]

    @property
    def num_probe_tokens(self) -> int:
        """Tokens that were generated to look at its answers while its thought ran."""
        return self.report.num_probe_tokens if self.report else 0
