"""One thought that a server streams: a token in, whether to close the thought out."""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from haltwise.errors import InputError
from haltwise.policy.features import FEATURE_GROUPS, unshown_groups
from haltwise.policy.head import HaltHead
from haltwise.policy.signals import Index, Signals
from haltwise.session.control import Control
from haltwise.session.request import Spent, ThoughtReport, ThoughtRequest
from haltwise.session.session import Session
from haltwise.session.signal_collector import NUM_TOP, SignalCollector, answer_signals
from haltwise.session.thought import PointRules, Probe, Thought

#: Servers that name the likeliest tokens by their text lose some that share one.
FEWEST_TOP = 16
# Tokens that wait to be summed up at most.
_MOST_WAITING = 256


def check_served(head: HaltHead) -> None:
    """Refuses a head that needs more than a server shows.

    Raises:
        InputError: If it looks at features that are made from more than forced answers, log
            probabilities and text.
    """
    groups = head.config.observing.groups
    if unshown := unshown_groups(groups, "proxy"):
        stays_blind = head.config.halting.probing == "at_halt" and len(unshown) < len(groups)
        raise InputError(
            f"head has groups {', '.join(unshown)}, which a server does not show; train one "
            "without them: python train.py --traces TRACES --run-dir NEW "
            f"--groups {' '.join(_shown(groups))}{' --probing at_halt' if stays_blind else ''}"
        )


def _shown(groups: Sequence[str]) -> list[str]:
    """Returns those of a head's groups that a server shows, or of all groups if there is none."""
    unshown = unshown_groups(FEATURE_GROUPS, "proxy")
    return [g for g in groups if g not in unshown] or [
        g for g in FEATURE_GROUPS if g not in unshown
    ]


class StreamedThought:
    """A thought whose tokens come with their log probabilities, one by one.

    Numbers that are missing or malformed never close a thought; only the cap does then.

    For a head that looks at answers, see `asks` after each token: who forces the answer there calls
    `await_answer`, and `answered` once it is known. The thought may go on meanwhile.

    Args:
        head: The policy, see `check_served`.
        rules: Those of the head's halting; one object serves all streams.
        request: What is asked.
        prompt: What the LM was given, or the end of it; the thought begins at once if that is
            inside of one.
        control: Sets terms and prices; by default those that are asked for are constant.
    """

    def __init__(
        self,
        head: HaltHead,
        rules: PointRules,
        request: ThoughtRequest,
        prompt: str = "",
        control: Control | None = None,
    ) -> None:
        """Stands before the first token."""
        self._thought_rules = rules
        self.thought = Thought(rules, prompt)
        """How far it has come."""
        self._session = Session(head, 1, control)
        self._session.join(0, request, self.thought)
        self._signals = StreamedSignals(rules, head.config.observing.signals)
        self._looks = head.config.halting.probing == "always"
        # A decision point whose forced answer is not known yet.
        self._awaited: Signals | None = None

    def add(self, text: str, logprob: float, top: Sequence[float], is_last: bool = False) -> bool:
        """Takes in the next token; returns whether to close the thought now, True once.

        Args:
            text: The token's text.
            logprob: The token's log probability, nats; NaN if unknown.
            top: Log probabilities of the likeliest tokens in its place, in any order, nats.
            is_last: Whether it may be the last one, where there is nothing to decide.
        """
        session, thought = self._session, self.thought
        thought.add(text)
        if not session.open[0] or thought.is_over:
            return False
        if session.watched[0]:
            self._signals.add(logprob, top)
        if is_last:
            thought.at_point = False
            return False
        if self._looks and thought.at_cap:
            thought.at_point = False  # nothing is looked at any more
        if not thought.waits or self.asks:
            return False
        return bool(session.decide([0], self._read))

    @property
    def asks(self) -> bool:
        """Whether the thought stands at a decision point whose forced answer the head looks at."""
        return self._looks and self.thought.at_point and bool(self._session.watched[0])

    @property
    def next_look(self) -> int:
        """Tokens before which there is nothing to decide, NEVER if that hangs on their text."""
        has_places = self._thought_rules.every_repeated is not None
        looks = self._looks and has_places and bool(self._session.watched[0])
        return self.thought.next_look(looks)

    @property
    def wants_logprobs(self) -> bool:
        """Whether the head sees log probabilities of the thought's own tokens."""
        return self._signals.wants_logprobs

    def skip(self) -> None:
        """Passes the decision point where the thought stands: nobody forces its answer."""
        self._session.skip(0)

    def await_answer(self) -> None:
        """Keeps what is seen at the decision point where the thought stands.

        Until `answered` is called, all others have to be skipped.
        """
        self._awaited = self._signals.collect(self.thought)

    def answered(self, probe: Probe | None) -> bool:
        """Takes in the forced answer that is awaited; returns whether to close the thought now.

        Args:
            probe: The answer; None if it is not known after all, which halts nothing.
        """
        point, self._awaited = self._awaited, None
        if probe is None or point is None:
            self._session.skip(0)
            return False
        self._session.running[0].report.num_probe_tokens += probe.num_tokens
        return self._session.decide_late(0, replace(point, **answer_signals([probe])))

    def keep_answer(self, answer: str) -> None:
        """Notes the forced answer that the request was given in place of one of its LM's own."""
        self._session.running[0].report.answer = answer

    def note_escalated(self) -> None:
        """Notes that a large LM answers."""
        self._session.running[0].report.escalated = True

    def note_spent(self, spent: Spent) -> None:
        """Notes what the whole request has taken."""
        self._session.running[0].report.spent = spent

    def undo(self) -> None:
        """Takes back that the thought is to be closed; see `Session.undo`."""
        self._session.undo(0)

    def release(self, fallback: str = "") -> None:
        """Leaves the thought to its LM; see `Session.release`."""
        self._session.release(0, fallback)

    def report(self) -> ThoughtReport:
        """Returns what has happened so far."""
        return self._session.report(0)

    def finish(self) -> ThoughtReport:
        """Returns what has happened, after the control has been told."""
        return self._session.finish(0)

    def _read(self, rows: Index, thoughts: list[Thought]) -> Signals:
        return self._signals.collect(thoughts[0])


class StreamedSignals:
    """Collects the signals of one thought from what a server tells of its tokens.

    Args:
        rules: Those of the thought.
        signals: Names of the wanted signals.
    """

    def __init__(self, rules: PointRules, signals: Collection[str]) -> None:
        """Starts without a token."""
        self._collector = SignalCollector(rules, signals, 1)
        # Tokens that are not summed up yet: their log probabilities, and those of the likeliest.
        self._logprobs: list[float] = []
        self._top: list[Sequence[float]] = []

    @property
    def wants_logprobs(self) -> bool:
        """Whether a wanted signal is made from log probabilities."""
        return self._collector.wants_logprobs

    def add(self, logprob: float, top: Sequence[float]) -> None:
        """Takes in the next token; the arguments are those of `StreamedThought.add`."""
        if not self.wants_logprobs:
            return
        self._logprobs.append(logprob)
        self._top.append(top)
        if len(self._top) == _MOST_WAITING:
            self._sum_up()

    def collect(self, thought: Thought) -> Signals:
        """Returns the signals (1,) of the thought, which stands at a decision point."""
        self._sum_up()
        return self._collector.collect(np.zeros(1, dtype=np.int64), [thought])

    def _sum_up(self) -> None:
        rows = np.zeros(len(self._top), dtype=np.int64)
        self._collector.add(rows, np.array(self._logprobs), _table(self._top))
        self._logprobs.clear()
        self._top.clear()


def _table(top: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """Returns (N, NUM_TOP), the likeliest first, and NaN where too few are known."""
    table = np.full((len(top), NUM_TOP), -np.inf)
    for row, values in zip(table, top, strict=True):
        if len(values) < FEWEST_TOP or any(map(math.isnan, values)):
            row[:] = np.nan
        else:
            row[: len(values)] = sorted(values, reverse=True)[:NUM_TOP]
    return table
