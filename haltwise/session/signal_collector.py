"""From what tokens and forced answers show to the signals of a decision point.

    add (tokens, as they come)  ->  collect (at a decision point, which begins anew)

Shapes: R rows, B of them in a call, N tokens in a call.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from haltwise.policy.signals import Float, Index, Signals, answer_keys, signals_from
from haltwise.session.thought import PointRules, Probe, Thought

#: Likeliest tokens that are looked at one by one; servers give at most so many.
NUM_TOP = 20

#: Nats. It stands for impossible tokens too: signals are finite.
LOWEST_LOGPROB = -1e4

#: The signals of log probabilities: what `TokenStatistics.read` gives.
STEPWISE = signals_from("token_logprobs")

#: Words with which an LM takes back, doubts or checks what it has thought: whole words, in any
#: case. The first and the last row are also the embedded LM's.
REFLECTIONS = (
    *("wait", "hmm", "but", "however", "alternatively", "maybe", "perhaps", "actually"),
    *("check", "checking", "recheck", "verify", "verifying"),
)

_WORD = re.compile(rf"\b(?:{'|'.join(REFLECTIONS)})\b", re.IGNORECASE)
# A word has at most so many tokens.
_CONTEXT = 8


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
            seen |= answer_signals(probes)
        if self._rules.max_points is not None:
            num_points = np.array([thought.num_points for thought in thoughts], dtype=np.int64)
            seen["points_left"] = self._rules.max_points - num_points
        position = np.array([thought.position for thought in thoughts], dtype=np.int64)
        return Signals(position, **seen)


def answer_signals(probes: Sequence[Probe]) -> dict[str, Any]:
    """Returns the signals (B,) of forced answers."""
    return {
        "confidence": np.array([probe.confidence for probe in probes], dtype=np.float32),
        "answer": answer_keys([probe.answer for probe in probes]),
        "worst_logprob": np.array([probe.worst_logprob for probe in probes], dtype=np.float32),
        "probe_tokens": np.array([probe.num_tokens for probe in probes], dtype=np.int64),
    }


def num_reflections(
    tokens: Sequence[int], num_new: int, decode: Callable[[Sequence[int]], str]
) -> int:
    """Reflection words in the newest tokens of a thought.

    A word that is cut by the border counts once it is whole. A token is decoded beside the tokens
    before it, since many tokenizers drop the blank at the start of a text.

    Args:
        tokens: The thought so far.
        num_new: How many of them are new.
        decode: Gives the text of tokens.
    """
    start = len(tokens) - num_new
    recent = tokens[max(start - _CONTEXT, 0) :]
    before = recent[: len(recent) - num_new]
    # What was a whole word may have gone on to be another one ("but", "button").
    return max(_count(decode(recent)) - _count(decode(before)), 0)


def _count(text: str) -> int:
    return len(_WORD.findall(text))


class TokenStatistics:
    """Sums up tokens between two decision points.

    Probabilities are the LM's own, at temperature 1, however its tokens are chosen. A value that
    is not a number makes what is read not a number, until the row is reset.

    Args:
        num_rows: R.
    """

    def __init__(self, num_rows: int) -> None:
        """Starts every row without a token."""
        #: (R,) tokens since the row was reset.
        self.num_tokens: Index = np.zeros(num_rows, dtype=np.int64)
        # (R, 3): sum and smallest of `_sureness`.
        self._sum = np.zeros((num_rows, 3))
        self._smallest = np.full((num_rows, 3), np.inf)

    def reset(self, rows: Index) -> None:
        """Begins anew after a decision point of rows (B,), or with new thoughts."""
        self.num_tokens[rows] = 0
        self._sum[rows] = 0.0
        self._smallest[rows] = np.inf

    def add(self, rows: Index, logprob: NDArray[np.floating], top: NDArray[np.floating]) -> None:
        """Takes in tokens.

        Args:
            rows: (N,) whose they are; a row may have several.
            logprob: (N,) of each token, nats.
            top: (N, NUM_TOP) of the likeliest tokens in its place, the likeliest first, nats; a
                smaller vocabulary is filled up with -inf.
        """
        values = _sureness(logprob, top)
        np.add.at(self.num_tokens, rows, 1)
        np.add.at(self._sum, rows, values)
        np.minimum.at(self._smallest, rows, values)

    def read(self, rows: Index) -> dict[str, Float]:
        """Signals (B,) of rows that have had a token: the stepwise fields of `Signals`."""
        mean = self._sum[rows] / self.num_tokens[rows, None]
        smallest = self._smallest[rows]
        seen = {
            "entropy": -mean[:, 0],
            "max_entropy": -smallest[:, 0],
            "logprob": mean[:, 1],
            "min_logprob": smallest[:, 1],
            "margin": mean[:, 2],
        }
        return {name: value.astype(np.float32) for name, value in seen.items()}


def _sureness(logprob: NDArray[np.floating], top: NDArray[np.floating]) -> NDArray[np.float64]:
    """Negative entropy, log probability and margin (N, 3) of tokens: each is large if it is sure.

    The entropy is that of the likeliest tokens, with all others as one.
    """
    logprobs = np.maximum(top.astype(np.float64), LOWEST_LOGPROB)
    probs = np.exp(logprobs)
    others = np.maximum(1.0 - probs.sum(axis=1), 0.0)
    of_others = others * np.log(np.where(others > 0, others, 1.0))
    return np.stack(
        [
            (probs * logprobs).sum(axis=1) + of_others,
            np.maximum(logprob, LOWEST_LOGPROB),
            probs[:, 0] - probs[:, 1],
        ],
        axis=1,
    )
