"""When a training run has learned enough, apart from any framework.

Held-out questions are the same at every evaluation, so an evaluation is compared with an earlier
one question by question. The run has no gain there if it has surely gained less than `least_gain`
for each evaluation between the two: if an upper bound on the mean difference is below that. All
earlier evaluations are asked, the best one so far among them, at every evaluation: so each bound
has a small share of the error, and all shares together are `level` at most (the union bound).

What holds, for questions that are independent draws, and returns within `span`:

- A run whose true mean return gains `least_gain` or more with each evaluation meets a plateau with
  a probability of at most `level`, however often it is evaluated and whatever its noise.
- Any run meets a plateau after at most span / least_gain + patience + 1 evaluations, and again
  that many after each reduction: then it would have gained more than can be gained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from haltwise.errors import InputError
from haltwise.training.config import StoppingConfig
from haltwise.training.curve import Curve, MeanReturn, Returns


@dataclass(frozen=True)
class Decision:
    """What a run does next, and why."""

    action: Literal["go on", "reduce", "cool down", "stop"]
    """Reduce: lower the learning rate or raise the batch size. Cool down: go on for some steps at a
    small learning rate."""
    reason: str = ""
    """A sentence."""


_GO_ON = Decision("go on", "no plateau yet, and nothing else that stops the run")
# What changes beside the curve and the latest decision.
_COUNTS = (
    "rate",
    "batch",
    "_first",
    "_num_reduced",
    "_num_without_gain",
    "_num_vanished",
    "_cool_until",
)


class StoppingRule:
    """Follows a training run and says when it stops.

    Whoever trains tells each evaluation (`evaluated`) and each step (`stepped`), and multiplies the
    learning rate of its own schedule by `rate`, and the batch size by `batch`.

    Attributes:
        curve: The evaluations so far.
        rate: What the learning rate is multiplied with now.
        batch: What the batch size is multiplied with now.
        latest: The last decision that was not "go on"; that of a run that goes on is.
    """

    def __init__(self, config: StoppingConfig) -> None:
        """Begins before the first step.

        Raises:
            InputError: If a setting is out of its range.
        """
        config.check()
        self.config = config
        self.curve = Curve(config.span, config.interval)
        self.rate = self.batch = 1.0
        self.latest = _GO_ON
        self._first = 0  # the evaluation at which the present stretch between plateaus begins
        self._num_reduced = self._num_without_gain = self._num_vanished = 0
        self._cool_until: int | None = None

    def state(self) -> dict[str, Any]:
        """Returns all that the rule knows of the run, as JSON can hold it."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {"curve": self.curve.state(), "latest": asdict(self.latest), "counts": counts}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where a rule of the same settings was in another process.

        Args:
            state: What its `state` has returned.

        Raises:
            InputError: If that is something else.
        """
        curve = Curve(self.config.span, self.config.interval)
        try:
            for step, found in state["curve"]:
                curve.add(step, MeanReturn(**found) if isinstance(found, dict) else found)
            latest = Decision(**state["latest"])
            counts = {name: state["counts"][name] for name in _COUNTS}
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"no state of a stopping rule: {error!r:.60}") from None
        self.curve, self.latest = curve, latest
        vars(self).update(counts)

    @property
    def is_over(self) -> bool:
        """Whether the run has stopped."""
        return self.latest.action == "stop"

    def evaluated(self, step: int, returns: Returns) -> Decision:
        """Takes in what an evaluation on held-out questions found.

        Args:
            step: The steps that the run has done.
            returns: The return of each question, or their mean and its standard error.

        Raises:
            InputError: If they are no returns of the same questions as before.
        """
        self.curve.add(step, returns)
        patience = self.config.patience
        if self.is_over:
            return self.latest
        if self._cool_until is not None or patience is None:
            return _GO_ON
        lack = self._lack_of_gain()
        self._num_without_gain = self._num_without_gain + 1 if lack else 0
        if self._num_without_gain < patience or step < self.config.least_steps:
            return _GO_ON
        return self._at_plateau(step, lack)

    def stepped(
        self, step: int, num_tokens: int | None = None, gradient_norm: float | None = None
    ) -> Decision:
        """Takes in what a step has spent.

        Args:
            step: The steps that the run has done.
            num_tokens: The tokens that it has read and generated so far, all together.
            gradient_norm: The norm of this step's gradient.

        Raises:
            InputError: If a budget or floor is set and what it is compared with is missing.
        """
        if self.is_over:
            return self.latest
        config = self.config
        is_last = (
            config.most_steps is not None and step >= config.most_steps - config.cooldown_steps
        )
        if is_last and self._cool_until is None and config.cooldown_steps:
            return self._cool_down(
                step, f"at step {step} few of {config.most_steps} steps are left"
            )
        reason = (
            self._spent(step, num_tokens) or self._cooled(step) or self._vanished(gradient_norm)
        )
        return self._decide(Decision("stop", reason)) if reason else _GO_ON

    def _decide(self, decision: Decision) -> Decision:
        self.latest = decision
        return decision

    def _lack_of_gain(self) -> str:
        """Returns in what the last evaluation lacks gain; nothing if it does not."""
        config, means = self.config, self.curve.means
        own = len(means) - self._first
        if own < 2:
            return ""
        if config.level is None:
            best = max(means[self._first : -1])
            if means[-1] > best + config.least_gain:
                return ""
            return f"the return is {means[-1]:.4g}, the best before {best:.4g}"
        # The shares of all evaluations sum to 1: 1/2 + 1/6 + 1/12 + ...; each share is for all
        # earlier ones.
        share = config.level / (config.reductions + 1) / (own * (own - 1)) / (own - 1)
        since = self.curve.without_gain(self._first, config.least_gain, share)
        if since is None:
            return ""
        num = len(means) - 1 - since
        return (
            f"the return has gained at most {self.curve.most_gained(since, share):.4g} in {num} "
            f"evaluations since step {self.curve.steps[since]}, expected "
            f"{num * config.least_gain:.4g}"
        )

    def _at_plateau(self, step: int, lack: str) -> Decision:
        """Returns what a plateau leads to."""
        config = self.config
        reason = f"at step {step} {lack}"
        self._first, self._num_without_gain = len(self.curve) - 1, 0
        if self._num_reduced < config.reductions:
            self._num_reduced += 1
            if config.reduce == "rate":
                self.rate *= config.factor
            else:
                self.batch /= config.factor
            return self._decide(Decision("reduce", reason))
        if config.cooldown_steps:
            return self._cool_down(step, reason)
        return self._decide(Decision("stop", reason))

    def _cool_down(self, step: int, reason: str) -> Decision:
        self._cool_until = step + self.config.cooldown_steps
        self.rate *= self.config.cooldown_factor
        return self._decide(Decision("cool down", reason))

    def _spent(self, step: int, num_tokens: int | None) -> str:
        """Returns what the run has used up; nothing if there is more."""
        config = self.config
        if config.most_steps is not None and step >= config.most_steps:
            return f"at step {step} it has done its {config.most_steps} steps"
        if config.token_budget is None and config.dollar_budget is None:
            return ""
        if num_tokens is None:
            raise InputError("a budget of tokens or dollars, expected num_tokens with each step")
        if num_tokens < config.most_tokens:
            return ""
        return f"at step {step} its {num_tokens:,} tokens have used up the budget"

    def _cooled(self, step: int) -> str:
        """Returns for how long the run has cooled down; nothing if it has not, or is not done."""
        if self._cool_until is None or step < self._cool_until:
            return ""
        return f"{self.latest.reason}; {self.config.cooldown_steps} steps of cooling down are done"

    def _vanished(self, gradient_norm: float | None) -> str:
        """Returns that the gradient has vanished; nothing if it has not."""
        config = self.config
        if config.gradient_floor is None:
            return ""
        if gradient_norm is None:
            raise InputError("a floor of the gradient, expected gradient_norm with each step")
        self._num_vanished = self._num_vanished + 1 if gradient_norm <= config.gradient_floor else 0
        if self._num_vanished < config.gradient_steps:
            return ""
        return (
            f"the norm of the gradient was at most {config.gradient_floor:g} in "
            f"{config.gradient_steps} steps in a row"
        )
