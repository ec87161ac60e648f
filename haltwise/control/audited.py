"""An audit while it runs, and what was seen at its decision points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from haltwise.control.answers import GivenAnswer
from haltwise.control.cascade_replay import CascadeReplay
from haltwise.control.draws import AuditDraw
from haltwise.control.replay import Answers, Look, Replay
from haltwise.session.control import Control
from haltwise.session.request import RunningRequest, Terms, ThoughtReport, ThoughtRequest
from haltwise.session.thought import NEVER


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
    thought: ThoughtReport | None = None
    """What happened to the thought that prices are replayed on, once that has ended: its own, or
    that of the small LM of a cascade."""
    own: GivenAnswer | None = None
    """The small LM's answer at its end, if its client got the large LM's."""
    question: str = ""
    """What is asked, the same for equal questions; empty if it is unknown."""

    def end(self, thought: ThoughtReport, is_cut: bool | None, own: GivenAnswer) -> None:
        """Takes in how the small LM of a cascade has ended.

        Args:
            thought: What happened to its thought.
            is_cut: Whether its token budget has ended that; None where nobody would ask the
                cascade.
            own: Its answer.
        """
        self.thought, self.own = thought, own
        for replay in self.replays.values():
            if isinstance(replay, CascadeReplay):
                replay.end(thought, is_cut)

    @property
    def replay(self) -> Replay:
        """That of the head whose prices it would have been served."""
        return self.replays[self.head]

    @property
    def positions(self) -> list[int]:
        """Where prices of any head would have halted it before its end, each once."""
        found = np.unique(np.concatenate([one.positions for one in self.replays.values()])).tolist()
        known = {NEVER, *self._ends}
        return [position for position in found if position not in known]

    @property
    def other_positions(self) -> list[int]:
        """Its other decision points."""
        known = set(self.positions)
        return [at for at in self.looks if at not in known]

    @property
    def num_more_tokens(self) -> int:
        """Tokens beside those of the answer that its client got, before any is forced for it.

        Those of looks at its answers, or all of the small LM's where the large one has answered.
        """
        if self.thought is None:
            return 0
        if self.thought is self.report:
            return self.thought.num_probe_tokens
        return self.thought.spent.output_tokens or 0

    @property
    def _ends(self) -> dict[int, GivenAnswer | None]:
        """By position, the small LM's answer at its end, if its client got another one."""
        is_known = self.thought is not None and self.own is not None
        return {self.thought.position: self.own} if self.thought and is_known else {}

    def answers(self, full: GivenAnswer, halted: Mapping[int, GivenAnswer | None]) -> Answers:
        """Returns what has been answered in it.

        Args:
            full: The answer that the client got.
            halted: By position, the answer if its thought is closed there; None where the LM
                would have been left to think on.
        """
        return Answers(full, {**halted, **self._ends}, self.looks, self.thought)


class UnhaltedThought:
    """The control of the small LM's thought in an audit of a cascade: it runs to its end.

    Args:
        control: Is shown its decision points.
    """

    moves_prices = False

    def __init__(self, control: Control) -> None:
        """Has seen nothing yet."""
        self._control = control
        self.report: ThoughtReport | None = None
        """What happened to it, once it has ended."""

    def terms(self, request: ThoughtRequest) -> Terms:
        """Returns terms that halt nothing but at the request's own cap."""
        return replace(request.terms, price=0.0, looked_at=True)

    def price(self, running: RunningRequest) -> float:
        """Returns a price of 0, once the decision point is replayed."""
        self._control.price(running)
        return 0.0

    def finished(self, report: ThoughtReport) -> None:
        """Keeps what happened."""
        self.report = report
