"""From what tokens and forced answers show to the signals of a decision point.

    add (tokens, as they come)  ->  collect (at a decision point, which begins anew)

Shapes: R rows, B of them in a call, N tokens in a call.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from haltwise.policy.signals import Index, Signals, answer_keys
from haltwise.session.forced_answer import Probe
from haltwise.session.reflections import num_reflections
from haltwise.session.thought import PointRules, Thought
from haltwise.session.token_statistics import STEPWISE, TokenStatistics


class SignalCollector:
    """Collects the signals of R thoughts between their decision points.

    Args:
        rules: Shared by the thoughts.
        signals: Names of the wanted signals. Position and forced answers are always collected.
        num_rows: R.
    """

    def __init__(self, rules: PointRules, signals: Collection[str], num_rows: int) -> None:
        """Starts every row without a token."""
        self._rules = rules
        self._counts_reflections = "num_reflections" in signals
        #: Whether the log probabilities of tokens are wanted.
        self.wants_logprobs = not set(STEPWISE).isdisjoint(signals)
        self._wanted = frozenset(signals)
        self._statistics = TokenStatistics(num_rows)

    def reset(self, rows: Index) -> None:
        """Gives rows (B,) to new thoughts."""
        self._statistics.reset(rows)

    def add(self, rows: Index, logprob: NDArray[Any], top: NDArray[Any]) -> None:
        """Takes in tokens; the arguments are those of `TokenStatistics.add`."""
        self._statistics.add(rows, logprob, top)

    def collect(
        self,
        rows: Index,
        thoughts: Sequence[Thought],
        probes: Sequence[Probe] | None = None,
        measured: Mapping[str, Any] | None = None,
    ) -> Signals:
        """Returns the signals of rows at decision points; what follows counts for the next ones.

        Args:
            rows: (B,) each of which has had a token since its previous point.
            thoughts: Those of the rows.
            probes: The forced answers of the rows, if anybody looked.
            measured: Signals (B, ...) by name that were measured elsewhere.
        """
        seen: dict[str, Any] = dict(measured or {})
        if self.wants_logprobs:
            statistics = self._statistics.read(rows)
            seen |= {name: statistics[name] for name in STEPWISE if name in self._wanted}
            self._statistics.reset(rows)
        if self._counts_reflections:
            numbers = [num_reflections(t.tokens, t.gap, self._rules.decode) for t in thoughts]
            seen["num_reflections"] = np.array(numbers, dtype=np.float32)
        if probes is not None:
            seen |= _of_answers(probes)
        if self._rules.max_points is not None:
            num_points = np.array([thought.num_points for thought in thoughts], dtype=np.int64)
            seen["points_left"] = self._rules.max_points - num_points
        position = np.array([thought.position for thought in thoughts], dtype=np.int64)
        return Signals(position, **seen)


def _of_answers(probes: Sequence[Probe]) -> dict[str, Any]:
    """Returns the signals (B,) of forced answers."""
    return {
        "confidence": np.array([probe.confidence for probe in probes], dtype=np.float32),
        "answer": answer_keys([probe.answer for probe in probes]),
        "worst_logprob": np.array([probe.worst_logprob for probe in probes], dtype=np.float32),
        "probe_tokens": np.array([probe.num_tokens for probe in probes], dtype=np.int64),
    }
