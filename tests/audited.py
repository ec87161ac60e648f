"""An installation whose head has been audited: a state, a folder of audits, and the head's run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from haltwise import HaltHead, Signals, Terms
from haltwise.control.answers import GivenAnswer
from haltwise.control.audit_traces import AuditTraces, DenseAudit
from haltwise.control.installation import key_file_of
from haltwise.control.opening import open_control
from runs import Learned, Run
from tests.heads import sure_head

KEY = b"k" * 32


@dataclass(frozen=True)
class Installation:
    """Where a head serves.

    Args:
        folder: An empty one.
        head: The head that serves.
    """

    folder: Path
    head: HaltHead

    @property
    def state(self) -> str:
        return str(self.folder / "state.db")

    @property
    def audits(self) -> Path:
        return self.folder / "audits"

    @property
    def parent(self) -> Path:
        return self.folder / "parent"

    @classmethod
    def begin(cls, folder: Path, head: HaltHead | None = None) -> Installation:
        """One that has audited nothing; its head has learned from the question "old"."""
        installation = cls(folder, head or sure_head())
        run = Run(installation.parent)
        run.save_head(installation.head)
        run.save_learned(Learned(frozenset({"old"})))
        key_file_of(installation.state).write_bytes(KEY)
        installation.serve()
        return installation

    def serve(self, *challengers: HaltHead) -> None:
        """Begins to serve, so that the state knows the heads, and ends."""
        settings = (self.state, 0.5, 1.0, Terms(1.0), 999)
        open_control(self.head, "observe", *settings, challengers=challengers).close()

    def audit(self, num: int, first: int = 0, hardness: float = 0.0) -> None:
        """Keeps audits of questions that are numbered from the first one on."""
        traces = AuditTraces(self.audits, self.head, KEY, with_content=False)
        for n in range(first, first + num):
            traces.put(thought(n, hardness))
        traces.close()
        assert (traces.writer.num_written, traces.writer.num_lost) == (num, 0)


def thought(n: int, hardness: float = 0.0) -> DenseAudit:
    """A thought of 4 to 8 points; it knows its answer from some point on, and is surer then."""
    rng = np.random.default_rng(n)
    num = int(rng.integers(4, 9))
    known_from = int(rng.integers(0, num))
    points, halted = [], []
    for k in range(num):
        knows = k >= known_from
        logprob = -0.3 - hardness - (0 if knows else 1.2) - 0.3 * rng.random()
        stepwise = dict.fromkeys(("entropy", "max_entropy"), np.array([-logprob]))
        stepwise["margin"] = np.array([np.exp(logprob)])
        words = {name: np.array([logprob]) for name in ("logprob", "min_logprob")}
        reflections = np.array([float(rng.integers(0, 3))])
        points.append(
            Signals(np.array([4 * k + 4]), num_reflections=reflections, **stepwise, **words)
        )
        halted.append(GivenAnswer("7" if knows else str(k + 10), "", 4 * k + 6))
    full = GivenAnswer("7", "7", 4 * num + 20)
    return DenseAudit(f"r{n}", points, halted, full, True, "lm", "sums", f"{n} ?", "")
