"""One stream of tokens, watched by a head: a token in, whether to close the thought out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from haltwise.errors import InputError
from haltwise.policy.features import signals_of, unshown_groups
from haltwise.policy.head import HaltHead
from haltwise.policy.signals import Signals
from haltwise.session.monitor import HaltMonitor
from haltwise.session.reflections import num_reflections
from haltwise.session.terms import Terms
from haltwise.session.thought import LONGEST_OPENING, PointRules, Progress
from haltwise.session.token_statistics import NUM_TOP, TokenStatistics

# Servers that name the likeliest tokens by their text lose some that share one.
_FEWEST_TOP = 16
# A word of reflection may begin so many tokens before a decision point.
_CONTEXT = 8
# Tokens that wait for the gauge at most.
_MOST_WAITING = 256
_ROW = np.zeros(1, dtype=np.int64)


def check_served(head: HaltHead) -> None:
    """Refuses a head that needs more than a server shows.

    Raises:
        InputError: If it looks at forced answers, or at features that are made from more than
            log probabilities and text.
    """
    config = head.config
    unshown = unshown_groups(config.observing.groups, "proxy")
    if config.halting.probing != "at_halt" or unshown:
        raise InputError(
            f"head has probing {config.halting.probing} and groups "
            f"{list(config.observing.groups)}, which a server does not show: "
            "python train.py --probing at_halt --groups pace distribution reflection"
        )


class Watcher:
    """Watches one thought, token by token, and tells when to close it.

    Numbers that are missing or malformed never close a thought; only the cap does then.

    Args:
        head: The policy, see `check_served`.
        rules: Of the head's halting; one object serves all streams.
        terms: Of this request.
        prompt: What the LM was given, or the end of it; the thought begins at once if that is
            inside of one.
    """

    def __init__(self, head: HaltHead, rules: PointRules, terms: Terms, prompt: str = "") -> None:
        """Starts before the first token."""
        self.terms = terms
        self.progress = Progress(rules, prompt)
        """How far the thought has come."""
        self.halted_at: int | None = None
        """Position at which it was to be closed."""
        self.capped = False
        """Whether its cap closed it, and not the head."""
        self.is_over = False
        """Whether the LM has closed the thought, or answers without one."""
        self._rules = rules
        self._signals = signals_of(head.config.observing.groups)
        self._monitor = HaltMonitor(head, 1)
        self._monitor.reset(_ROW, terms)
        self._gauge = TokenStatistics(1)
        # Since the newest decision point; the texts reach a little further back.
        self._logprobs: list[float] = []
        self._top: list[Sequence[float]] = []
        self._texts: list[str] = []

    @property
    def num_bad_signals(self) -> int:
        """Decision points whose numbers were missing or malformed."""
        return int(self._monitor.num_bad_signals[0])

    def add(self, text: str, logprob: float, top: Sequence[float]) -> bool:
        """Takes in the next token.

        Args:
            text: Of the token.
            logprob: Of the token, nats; NaN if unknown.
            top: Log probabilities of the likeliest tokens in its place, in any order, nats.

        Returns:
            Whether to close the thought now; True once.
        """
        progress = self.progress
        progress.add_text(text)
        if not progress.begun and progress.num_tokens >= LONGEST_OPENING:
            self.is_over = True
        self.is_over |= progress.closed
        if self.is_over or self.halted_at is not None:
            return False
        self._logprobs.append(logprob)
        self._top.append(top)
        self._texts.append(text)
        if len(self._top) == _MOST_WAITING:
            self._measure()
        reached = progress.begun and self._reaches_cap()
        if (progress.at_point and self._decides()) or reached:
            self.halted_at, self.capped = progress.position, reached
        return self.halted_at is not None

    def _reaches_cap(self) -> bool:
        cap = self.terms.max_tokens
        return cap is not None and self.progress.position >= cap

    def _decides(self) -> bool:
        """Whether the head closes the thought at this decision point."""
        progress = self.progress
        self._measure()
        num = int(self._gauge.num_tokens[0])
        seen: dict[str, Any] = dict(self._gauge.read(_ROW))
        self._gauge.reset(_ROW)
        if "num_reflections" in self._signals:
            number = num_reflections(range(len(self._texts)), num, self._text_of)
            seen["num_reflections"] = np.array([number], dtype=np.float32)
        position = np.array([progress.position])
        left = None
        if self._rules.max_points is not None:
            left = np.array([self._rules.max_points - progress.num_points])
        del self._texts[: max(len(self._texts) - _CONTEXT, 0)]
        signals = Signals(position, **seen, points_left=left)
        return bool(self._monitor.observe(signals, _ROW)[0])

    def _measure(self) -> None:
        """Gives the gauge what has waited."""
        rows = np.zeros(len(self._top), dtype=np.int64)
        self._gauge.add(rows, np.array(self._logprobs), _table(self._top))
        self._logprobs.clear()
        self._top.clear()

    def _text_of(self, places: Sequence[int]) -> str:
        return "".join(self._texts[i] for i in places)


def _table(top: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """(N, NUM_TOP), the likeliest first; NaN where too few are known."""
    table = np.full((len(top), NUM_TOP), -np.inf)
    for row, values in zip(table, top, strict=True):
        if len(values) < _FEWEST_TOP:
            row[:] = np.nan
        else:
            row[: len(values)] = sorted(values, reverse=True)[:NUM_TOP]
    return table
