"""What a request that was served tells of prices that it was not served at."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np

from haltwise.control.betting import Float
from haltwise.control.replay import Replay
from haltwise.policy.signals import Signals
from haltwise.session.request import RunningRequest, ThoughtReport
from haltwise.session.thought import NEVER


@dataclass(eq=False)
class Course:
    """A request on its way, which is replayed at all prices while one of them is served."""

    replay: Replay
    spent: dict[int, int] = field(default_factory=dict)
    """By position of a decision point, the tokens of looks at answers until then."""

    def add(self, signals: Signals, place: int, running: RunningRequest) -> None:
        """Takes in the next decision point, see `Replay.add`."""
        self.replay.add(signals, place)
        self.spent[int(signals.position[place])] = running.report.num_probe_tokens

    def told(self, prices: Float, report: ThoughtReport) -> str:
        """Returns `halts_of` once the request has ended."""
        end = float(report.position + report.num_probe_tokens)
        positions = self.replay.positions.tolist()
        return halts_of(prices, [end if at == NEVER else at + self.spent[at] for at in positions])


def halts_of(prices: Float, tokens: list[float]) -> str:
    """Returns, as a JSON list of [PRICE, TOKENS], from which price on a thought has how many.

    The first entry, at price 0, is of the strictest price.

    Args:
        prices: (K,) the strictest first.
        tokens: (K,) of the thought at that price, with those of looks at its answers.
    """
    changes = [k for k in range(len(tokens)) if k == 0 or tokens[k] != tokens[k - 1]]
    return json.dumps([[float(prices[k]) if k else 0.0, tokens[k]] for k in changes])


def tokens_at(halts: str, prices: Float) -> Float:
    """Returns the tokens (K,) of the thought at each price (K,), from what `halts_of` has told."""
    from_price, tokens = np.array(json.loads(halts), dtype=np.float64).T
    found: Float = tokens[np.searchsorted(from_price, prices, side="right") - 1]
    return found
