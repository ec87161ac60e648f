"""Requests of a made-up population whose loss and saving at every price are known.

They go to a control as its adapter's do: drawn by its key, audited, and told.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from haltwise import Terms, ThoughtRequest
from haltwise.control.books import Awaited, Entry
from haltwise.control.estimates import LOSSES, Audit
from haltwise.control.governed import GovernedControl
from haltwise.control.groups import Told

_DISAGREEMENT = LOSSES.index("disagreement")


@dataclass
class Population:
    """Answers differ, and tokens are saved, the more the higher the price.

    Args:
        control: Is told of every request.
        rng: Draws them.
        worst: Share of the answers that differ at the highest price.
        power: How steeply that falls with lower prices; at 0 it does not.
    """

    control: GovernedControl
    rng: np.random.Generator
    worst: float = 0.08
    power: float = 3.0

    def audit(self) -> Audit:
        """One that its clients had answered in full."""
        places = np.linspace(0, 1, len(self.control.prices))
        full = float(np.clip(self.rng.lognormal(7.2, 0.6), 100, 30_000))
        saved = (0.08 + 0.5 * places**0.6) * np.clip(self.rng.normal(1, 0.25), 0.2, 1.6)
        agrees = self.rng.random() >= self.worst * places**self.power
        return Audit(agrees, np.round(full * (1 - saved)), full)

    def ask(self, number: str, about: dict[str, str], segment: str = "") -> None:
        """Lets a request come, and tells what it was if it is an audit."""
        control, terms = self.control, Terms(1.0, segment=segment)
        known = {"id": number, "names_price": False} | about
        request = ThoughtRequest(terms, known)
        control.terms(request)
        audit = control.taken(request)
        if audit is None:
            return
        told = self.audit()
        losses = tuple(told.losses[_DISAGREEMENT].tolist())
        waits = control.label_seconds > 0 and bool(told.due.any())
        awaited = Awaited(("",) * (len(losses) + 1), time.time() + control.label_seconds)
        due = tuple(told.due.tolist()) if waits else (False,) * len(losses)
        entry = Entry(Told(number, losses, due), told, {}, awaited if waits else None)
        control._audits.pop(id(request))
        control.keeper.put(entry)

    def settle(self) -> None:
        """Waits until the books have taken in all of them, and have been shown."""
        keeper = self.control.keeper
        for _ in range(2):  # the second is shown only behind the first
            keeper.put(Entry())
            while not keeper._notes.empty():
                time.sleep(0.001)
