"""Ends the training of an LM where its answers to held-out questions return no more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from haltwise.training import StoppingConfig

# The evaluations of a training that does all of its steps, and the share of them that follow a
# plateau at a small rate.
_NUM_EVALUATIONS, _COOLDOWN = 20, 0.1


@dataclass(frozen=True)
class HeldOut:
    """Questions that an LM does not learn from."""

    returns_of: Callable[[], Sequence[float]]
    """Returns what the LM's answers to them return now, in the same order each time."""
    span: float
    """The most that the return of one question can change."""
    least_gain: float
    """The gain in the mean return that is asked of each evaluation."""

    def arguments(self, num_steps: int) -> dict[str, Any]:
        """Returns the arguments of a trainer that evaluates.

        Args:
            num_steps: The steps of the whole training.
        """
        return {
            "eval_strategy": "steps",
            "eval_steps": max(num_steps // _NUM_EVALUATIONS, 1),
            "eval_on_start": True,
            "lr_scheduler_type": "constant_with_warmup",
        }

    def callback(self, num_steps: int) -> Any:
        """Returns the trainer's callback that ends the training, with its last steps at a low rate.

        Args:
            num_steps: The steps of the whole training.
        """
        from haltwise.training.trainer import StoppingCallback

        config = StoppingConfig(
            least_gain=self.least_gain,
            span=self.span,
            interval="normal",
            most_steps=num_steps,
            cooldown_steps=int(_COOLDOWN * num_steps),
        )
        return StoppingCallback(config, lambda _: list(self.returns_of()))


def told(callback: Any) -> dict[str, Any]:
    """Returns why a training has ended, and what each evaluation has returned."""
    rule = callback.rule
    return {"ended": rule.latest.reason, "held_out_returns": list(rule.curve)}
