"""The replay environment, which plays one recorded trace at a time."""

from __future__ import annotations

import numpy as np

from envs.replay import RecordedSteps
from envs.reward import reward
from envs.series import ShuffledPasses, check_price, draw_prices
from envs.single import Ended, SingleEnv
from haltwise import Halting, Observing
from haltwise.policy.signals import Float
from traces import Traces


class TraceEnv(SingleEnv):
    """Halting recorded traces: one trace an episode.

    ## Description
    This is the decision problem of `HaltEnv` without the LM: an episode is one trace at one price.
    The LM's tokens do not depend on the halting decision, so a trace holds the reward of every
    halting time and replay is exact.

    ## Action space
    `Discrete(2)`: 0 continue, 1 halt.

    ## Observation space
    `Box(-5, 5, (F + 1,), float32)`: that of `HaltEnv`.

    ## Rewards
    They are those of `HaltEnv`, from the costs and answers that the traces hold.

    ## Starting state
    An episode starts at the first point of a trace drawn from a shuffled pass over all traces that
    have points, at a price drawn log-uniformly from the observing's range.
    `reset(options={"price": p})` sets the price of one episode.

    ## Episode end
    An episode is terminated by halting or by continuing at the last point. It is never truncated.
    The last info tells how it ended, see `SingleEnv`, and holds the index of the trace besides;
    answer is None where the episode was not halted.

    ## Arguments
    `gymnasium.make("haltwise/Replay-v0", traces=..., observing=..., halting=...)`;
    `gymnasium.make_vec` takes the same and `num_envs`, and gives `ReplayEnv`.

    Args:
        traces: The traces to replay.
        observing: How features become observations.
        halting: The conditions: how probing is paid for, how many points there can be.
        price: A fixed price for every episode; None draws one for each.

    Raises:
        InputError: If no trace has a decision point, or a signal, limit or price does not fit.
    """

    def __init__(
        self,
        traces: Traces,
        observing: Observing,
        halting: Halting,
        price: float | None = None,
    ) -> None:
        """Lays out the traces."""
        super().__init__(observing)
        check_price(price)
        self._observing = observing
        self._fixed_price = price
        self._steps = RecordedSteps(traces, observing, halting)
        self._passes = ShuffledPasses(self._steps.playable)

    def _restart(self) -> None:
        """Begins a new pass over the traces."""
        self._passes.restart()

    def _begin(self, price: float | None) -> Float:
        """Begins the next trace, at the price that is named, if one is.

        Returns:
            The observation (F + 1,) at its first point.
        """
        self._trace = self._passes.draw(self.np_random, 1)
        self._point = self._steps.first[self._trace]
        # A price is drawn in any case: to name one then leaves all later episodes as they are.
        drawn = draw_prices(self._observing, self._fixed_price, self.np_random, 1)
        self._price = drawn if price is None else np.array([float(price)])
        self._dial = self._observing.dial(self._price)
        self._spent = 0
        return self._observe()

    def _act(self, halts: bool) -> tuple[Float, float, Ended | None]:
        """Halts, or continues to the next point or the end of the trace.

        Returns:
            The observation (F + 1,) at the newest point, the reward, and what is told of the
            episode if it is over.
        """
        at = self._point
        halted = self._steps.obeyed(at, np.array([halts]))
        halts = bool(halted[0])
        cost, em = self._steps.take(at, halted)
        value = float(reward(em, cost, self._price)[0])
        self._spent += int(cost[0])
        if not (halts or self._steps.is_last[at[0]]):
            self._point = at + 1
            return self._observe(), value, None
        told = self._steps.told(self._trace, at, halted)
        ended = {
            "em": bool(em[0]),
            "cost": self._spent,
            "halted": halts,
            "price": float(self._price[0]),
            **{name: column.item() for name, column in told.items()},
        }
        return self._observe(), value, ended

    def _observe(self) -> Float:
        """Returns the observation (F + 1,) at the newest point."""
        obs: Float = self._steps.observe(self._point, self._dial)[0]
        return obs
