"""What a training run is stopped for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from haltwise.errors import InputError
from haltwise.training.curve import Interval


@dataclass(frozen=True)
class StoppingConfig:
    """When a training run stops, and what is tried before.

    Steps are those that the framework counts: gradient steps of the Trainer, decisions of
    stable-baselines3.
    """

    patience: int | None = 2
    """Evaluations in a row without enough gain after which the run has reached a plateau; None
    stops at no plateau."""
    least_gain: float = 0.005
    """The mean return that each evaluation has to gain for the run to be worth its steps."""
    level: float | None = 0.05
    """The probability, at most, that a run which gains that much with each evaluation is taken for
    one that does not. None goes by the points alone: the mean return is not above the best one by
    more than least_gain, be that noise or not."""
    span: float = 1.0
    """The most that the return of one question can change from one evaluation to another; 1 for
    exact match."""
    interval: Interval = "bounded"
    """How the gain is bounded: bounded holds for any number of questions, and needs many; normal is
    Student's interval, for returns that change a little at each question, as expected returns and
    losses do."""
    least_steps: int = 0
    """Steps before which no plateau stops the run."""
    most_steps: int | None = None
    """Steps after which the run stops in any case."""
    token_budget: int | None = None
    """Tokens after which it stops."""
    dollar_budget: float | None = None
    """Dollars after which it stops."""
    tariff: float | None = None
    """What the run's tokens cost, in dollars per 1,000,000 tokens."""
    gradient_floor: float | None = None
    """A norm of the gradient at which nothing is learned any more."""
    gradient_steps: int = 10
    """Steps in a row with such a norm after which the run stops."""
    reductions: int = 0
    """Plateaus that reduce before one stops."""
    reduce: Literal["rate", "noise"] = "rate"
    """What a plateau does: rate lowers the learning rate, noise raises the batch size."""
    factor: float = 0.5
    """What a plateau multiplies the learning rate with, or divides the batch size by."""
    cooldown_steps: int = 0
    """Steps that follow the last plateau at a small learning rate before the run stops; they are
    the last ones of most_steps too."""
    cooldown_factor: float = 0.1
    """What the learning rate is multiplied with for them."""

    def check(self) -> None:
        """Checks the settings.

        Raises:
            InputError: If one of them is out of its range, or lacks another one.
        """
        ranges = {
            "least_gain": (0 <= self.least_gain < math.inf, "0 or more, and finite"),
            "level": (self.level is None or 0 < self.level < 1, "between 0 and 1, or None"),
            "interval": (self.interval in get_args(Interval), "bounded or normal"),
            "span": (0 < self.span < math.inf, "positive and finite"),
            "tariff": (self.tariff is None or 0 < self.tariff < math.inf, "positive and finite"),
            "reduce": (self.reduce in ("rate", "noise"), "rate or noise"),
            "factor": (0 < self.factor < 1, "between 0 and 1"),
            "cooldown_factor": (0 < self.cooldown_factor <= 1, "above 0, at most 1"),
        }
        for name in ("patience", "most_steps", "token_budget", "gradient_steps"):
            value = getattr(self, name)
            ranges[name] = (value is None or value >= 1, "at least 1")
        for name in ("dollar_budget", "gradient_floor"):
            value = getattr(self, name)
            ranges[name] = (value is None or 0 < value < math.inf, "positive and finite")
        for name in ("least_steps", "reductions", "cooldown_steps"):
            ranges[name] = (getattr(self, name) >= 0, "0 or more")
        for name, (is_in_range, expected) in ranges.items():
            if not is_in_range:
                raise InputError(f"{name} is {getattr(self, name)!r}, expected {expected}")
        if self.most_steps is not None and self.cooldown_steps >= self.most_steps:
            found = f"cooldown_steps is {self.cooldown_steps}"
            raise InputError(f"{found}, expected fewer than most_steps, {self.most_steps}")
        if self.patience and self.level is not None and not self.least_gain:
            raise InputError(
                "least_gain is 0: no interval tells a gain of 0 from none, expected more"
            )
        if self.dollar_budget is not None and self.tariff is None:
            raise InputError(f"dollar_budget is {self.dollar_budget}, expected a tariff with it")

    @property
    def most_tokens(self) -> float:
        """The tokens that both budgets allow."""
        dollars, per_million = self.dollar_budget, self.tariff
        paid = math.inf if dollars is None or per_million is None else 1e6 * dollars / per_million
        return min(math.inf if self.token_budget is None else self.token_budget, paid)
