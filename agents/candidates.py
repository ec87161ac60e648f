"""Candidates of a search: settings of a training that optuna proposes, and what they come to.

A head has a frontier and not a point: an exact match (EM) and a mean number of tokens at every
price. So a candidate is several of optuna's trials, one for each of some prices, and the price is
one of their parameters, which costs nothing more than the one training. What optuna goes for is
thus the front of all candidates at all prices, in EM and tokens themselves, and it learns which
settings stand on it where. A single price would reward a head that is merely more eager at it; a
number that stands for a frontier would be one objective, and not two.

All that is known is in an SQLite file. Each proposal hangs only on what was found before it, so
that a search that was killed and goes on comes to the same as one that was not.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from agents.fit import FitConfig
from agents.pathwise import PathwiseConfig
from agents.ppo import PPOConfig
from haltwise import InputError

# The candidates before optuna learns from them; the first of them are the defaults.
_NUM_RANDOM = 10
# The name of the choice that leaves no feature group out, and where a trial tells its candidate.
_NONE, _OF = "none", "candidate"
_PATHWISE = ("learning_rate", "steps", "prior_questions", "correct_coef")


@dataclass(frozen=True)
class Candidate:
    """Settings of a training."""

    number: int
    """From 0, the defaults, in the order in which they are tried."""
    settings: Mapping[str, Any]
    """By name, those of the start from traces, the width of the network (net_width), and the
    feature group that is left out (without)."""
    price: float
    """The price that was proposed with them."""

    @property
    def fit(self) -> FitConfig:
        """The settings as a training takes them."""
        pathwise = PathwiseConfig(**{name: self.settings[name] for name in _PATHWISE})
        return FitConfig(pathwise, PPOConfig(net_width=self.settings["net_width"]))

    def groups(self, available: Sequence[str]) -> tuple[str, ...]:
        """Returns the feature groups that are read, of those that there are."""
        return tuple(group for group in available if group != self.settings["without"])

    def options(self, available: Sequence[str]) -> str:
        """Returns what train.py is told in order to train so."""
        told = {f"pathwise.{name}": self.settings[name] for name in _PATHWISE}
        told["ppo.net_width"] = self.settings["net_width"]
        words = [f"--fit.{name.replace('_', '-')} {value:.4g}" for name, value in told.items()]
        if self.settings["without"] != _NONE:
            words.append(f"--groups {' '.join(self.groups(available))}")
        return " ".join(words)


#: What a candidate comes to: by price, its EM and its tokens in the mean of all traces.
Found = Mapping[float, tuple[float, float]]


class Candidates:
    """The candidates of a search, kept in a file."""

    def __init__(
        self,
        file: Path,
        groups: Sequence[str],
        price_range: tuple[float, float],
        seed: int,
    ) -> None:
        """Opens the file, or makes it.

        Args:
            file: The SQLite file.
            groups: The feature groups that there are, of which a candidate may leave one out.
            price_range: The lowest and the highest price.
            seed: The seed of the proposals.

        Raises:
            InputError: If the file is none of a search.
        """
        defaults = FitConfig()
        self._seed, self._space = seed, _space(groups, price_range)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            self._study = optuna.create_study(
                storage=f"sqlite:///{file.resolve()}",
                study_name="search",
                directions=["maximize", "minimize"],
                load_if_exists=True,
            )
        except Exception as error:  # of the packages that read the file, each has its own
            raise InputError(f"{file}: not the file of a search ({type(error).__name__})") from None
        self._drop_half_proposed()
        if not self._trials(TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE):
            own = {name: getattr(defaults.pathwise, name) for name in _PATHWISE}
            own |= {"net_width": defaults.ppo.net_width, "without": _NONE}
            self._study.enqueue_trial(own | {"price": price_range[1]})

    @property
    def num(self) -> int:
        """How many candidates have been tried."""
        return len(self._asked(TrialState.COMPLETE))

    def propose(self) -> Candidate:
        """Returns the next candidate: the one that was being tried when a search was killed."""
        num = self.num
        running = self._asked(TrialState.RUNNING)
        if running:
            return _candidate(num, running[0])
        state = np.random.SeedSequence([self._seed, num]).generate_state(1)
        with warnings.catch_warnings():
            # Parameters are sampled together, which optuna calls experimental.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.sampler = optuna.samplers.TPESampler(
                seed=int(state[0]),
                multivariate=True,
                # Every candidate is as many trials as it has prices.
                n_startup_trials=len(self._trials(TrialState.COMPLETE)) + (num < _NUM_RANDOM),
            )
        self._study.ask(self._space)
        return _candidate(num, self._asked(TrialState.RUNNING)[0])

    def tell(self, candidate: Candidate, found: Found) -> None:
        """Writes down what a candidate that was proposed comes to, at its own price among others.

        It counts as tried once all is written.
        """
        (asked,) = self._asked(TrialState.RUNNING)
        known = {trial.params["price"] for trial in self._of(asked)}
        for price, values in found.items():
            if price != candidate.price and price not in known:
                self._study.add_trial(
                    optuna.create_trial(
                        params=asked.params | {"price": price},
                        distributions=self._space,
                        values=values,
                        user_attrs={_OF: asked.number},
                    )
                )
        self._study.tell(asked.number, found[candidate.price])

    def found(self) -> list[tuple[Candidate, Found]]:
        """Returns all candidates that have been tried, with what they come to, cheapest first."""
        every: list[tuple[Candidate, Found]] = []
        for number, asked in enumerate(self._asked(TrialState.COMPLETE)):
            points = [(t.params["price"], *t.values) for t in [asked, *self._of(asked)]]
            at = {price: (em, tokens) for price, em, tokens in sorted(points)}
            every.append((_candidate(number, asked), at))
        return every

    def front(self) -> list[tuple[int, float]]:
        """Returns the number and the price of what nothing else beats in both EM and tokens."""
        numbers = {t.number: n for n, t in enumerate(self._asked(TrialState.COMPLETE))}
        return [
            (numbers[trial.user_attrs.get(_OF, trial.number)], trial.params["price"])
            for trial in self._study.best_trials
            if trial.user_attrs.get(_OF, trial.number) in numbers
        ]

    def importances(self, worth: Sequence[float]) -> dict[str, float]:
        """Returns, by setting, its share of how far candidates differ, the largest first.

        It is told by optuna's fANOVA: Hutter, Hoos and Leyton-Brown, ICML 2014.

        Args:
            worth: A number for each candidate that has been tried, in order.
        """
        alone = optuna.create_study()
        space = {name: of for name, of in self._space.items() if name != "price"}
        for asked, value in zip(self._asked(TrialState.COMPLETE), worth, strict=True):
            params = {name: asked.params[name] for name in space}
            alone.add_trial(optuna.create_trial(params=params, distributions=space, value=value))
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=self._seed)
        return optuna.importance.get_param_importances(alone, evaluator=evaluator)

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Returns the trials of some states, in order."""
        return self._study.get_trials(deepcopy=False, states=states)

    def _asked(self, state: TrialState) -> list[FrozenTrial]:
        """Returns the trials of a state that were proposed; one a candidate."""
        return [trial for trial in self._trials(state) if _OF not in trial.user_attrs]

    def _of(self, asked: FrozenTrial) -> list[FrozenTrial]:
        """Returns the other trials of a candidate."""
        every = self._trials(TrialState.COMPLETE)
        return [trial for trial in every if trial.user_attrs.get(_OF) == asked.number]

    def _drop_half_proposed(self) -> None:
        """Drops what was being proposed, and not yet tried, when a search was killed."""
        for trial in self._asked(TrialState.RUNNING):
            if trial.params.keys() != self._space.keys():
                self._study.tell(trial.number, state=TrialState.FAIL)


def _candidate(number: int, asked: FrozenTrial) -> Candidate:
    """Returns the candidate that a trial was proposed for."""
    settings = {name: value for name, value in asked.params.items() if name != "price"}
    return Candidate(number, settings, asked.params["price"])


def _space(groups: Sequence[str], price_range: tuple[float, float]) -> dict[str, BaseDistribution]:
    """Returns, by parameter, where it is sought; the defaults are within."""
    left_out = [] if len(groups) < 2 else list(groups)
    return {
        "learning_rate": FloatDistribution(1e-3, 2e-2, log=True),
        "steps": IntDistribution(100, 900, log=True),
        "prior_questions": FloatDistribution(50.0, 4000.0, log=True),
        "correct_coef": FloatDistribution(0.1, 10.0, log=True),
        "net_width": IntDistribution(16, 128, log=True),
        "without": CategoricalDistribution([_NONE, *left_out]),
        "price": FloatDistribution(*price_range, log=True),
    }
