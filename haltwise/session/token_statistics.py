"""What an LM shows with its tokens: from the log probabilities that any server can give.

Shapes: R rows; N tokens in a call, of any rows.
"""

import numpy as np
from numpy.typing import NDArray

from haltwise.policy.signals import Float, Index, signals_from

#: Likeliest tokens that are looked at one by one; servers give at most so many.
NUM_TOP = 20

#: Nats. It stands for impossible tokens too: signals are finite.
LOWEST_LOGPROB = -1e4


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


#: The signals that `TokenStatistics.read` gives.
STEPWISE = signals_from("token_logprobs")


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
