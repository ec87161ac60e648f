"""A stopping rule for stable-baselines3."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from haltwise.errors import InputError, from_clone, needing
from haltwise.training.config import StoppingConfig
from haltwise.training.curve import Returns
from haltwise.training.rule import Decision, StoppingRule

with needing("haltwise.training.sb3", from_clone("train")):
    import torch
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.callbacks import BaseCallback

    from haltwise.training.averaging import BestWeights


@dataclass(frozen=True)
class _Lowered:
    """A schedule of the learning rate, lowered by a rule; it is saved with the algorithm."""

    schedule: Callable[[float], float]
    rule: StoppingRule

    def __call__(self, progress_remaining: float) -> float:
        """Returns the learning rate."""
        return self.rule.rate * self.schedule(progress_remaining)


class StoppingCallback(BaseCallback):
    """Stops a training by a `StoppingRule`, which is asked between two rollouts.

    Steps are decisions (`num_timesteps`). An algorithm can be ended only inside of a rollout: it
    begins one more, from which nothing is learned. The curve is logged under train/.

    Attributes:
        rule: The rule, with the curve so far and its latest decision.
    """

    def __init__(
        self,
        config: StoppingConfig,
        returns_of: Callable[[BaseAlgorithm], Returns],
        every: int,
        best: BestWeights | None = None,
        num_tokens: Callable[[], int] | None = None,
    ) -> None:
        """Prepares for one training.

        Args:
            config: When to stop.
            returns_of: Evaluates the agent on held-out questions or episodes, the same ones in the
                same order each time.
            every: The decisions between two evaluations.
            best: Keeps the best weights, which the policy has after the training, or their average.
            num_tokens: Tells the tokens that were spent so far, for a budget.

        Raises:
            InputError: If a setting is out of its range.
        """
        super().__init__()
        if every < 1:
            raise InputError(f"every is {every}, expected at least 1")
        self.rule = StoppingRule(config)
        self._returns_of, self._every, self._best = returns_of, every, best
        self._num_tokens = num_tokens
        self._due = 0
        self._evaluated: int | None = None  # the updates before the last evaluation

    def _init_callback(self) -> None:
        """Puts itself between the algorithm and its schedule.

        Raises:
            InputError: If the batch is to grow and the algorithm has none.
        """
        model: Any = self.model
        config = self.rule.config
        self._schedule = model.lr_schedule
        if isinstance(self._schedule, _Lowered):  # of a training that was interrupted
            self._schedule = self._schedule.schedule
        self._batch_size = getattr(model, "batch_size", None)
        if config.reductions and config.reduce == "noise" and self._batch_size is None:
            raise InputError(
                f"{type(model).__name__} has no batch size, expected reduce to be rate"
            )

    def _on_training_start(self) -> None:
        """Lowers the learning rate of the algorithm's own schedule by what the rule says."""
        model: Any = self.model
        model.lr_schedule = _Lowered(self._schedule, self.rule)

    def _on_step(self) -> bool:
        """Returns False, which ends the training, once the rule has stopped it."""
        return not self.rule.is_over

    def _on_rollout_start(self) -> None:
        """Tells the rule what the last rollout and update have spent, and what they were for."""
        step = self.model.num_timesteps
        num_tokens = None if self._num_tokens is None else self._num_tokens()
        self._obey(self.rule.stepped(step, num_tokens, self._gradient_norm()))
        if step >= self._due:
            self._due = step + self._every
            self._evaluate(step)

    def _on_training_end(self) -> None:
        """Evaluates the last weights, gives the policy the best ones, and the schedule back."""
        model: Any = self.model
        model.lr_schedule = self._schedule
        if self._batch_size is not None:
            model.batch_size = self._batch_size
        if self._evaluated != model._n_updates:
            self._evaluate(model.num_timesteps)
        if self._best is not None:
            self._best.settle(model.policy, lambda _: self._returns_of(self.model))

    def _evaluate(self, step: int) -> None:
        """Evaluates the agent, and does what the rule says to that."""
        model: Any = self.model
        self._evaluated = model._n_updates
        self._obey(self.rule.evaluated(step, self._returns_of(model)))
        mean = self.rule.curve.means[-1]
        self.logger.record("train/held_out_return", mean)
        self.logger.record("train/rate_factor", self.rule.rate)
        if self._best is not None:
            self._best.offer(mean, model.policy)

    def _obey(self, decision: Decision) -> None:
        """Raises the batch size if the rule says so; the schedule asks the rule itself."""
        model: Any = self.model
        if decision.action == "reduce" and self._batch_size is not None:
            model.batch_size = round(self._batch_size * self.rule.batch)

    def _gradient_norm(self) -> float:
        """Returns the norm of the last gradient, infinite before the first one."""
        grads = [p.grad for p in self.model.policy.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads)) if grads else float("inf")
