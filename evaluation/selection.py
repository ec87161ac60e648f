"""Says how near a choice of strategy, question by question, comes to what hindsight would choose.

A strategy is one LM with one way to end its thoughts: to its end, at a price of its head, or on a
token budget. As both LMs have answered all questions to their ends, what every strategy comes to on
every question is known, and a selector learns from the whole table; nothing is explored. It
predicts EM and tokens of each strategy, and takes the one with the largest return at the price that
is asked for. It chooses before the first token, or at the small LM's first decision point: then it
sees the features there, too, and what goes to the large LM from there pays for both.

At a price, let b be the return of the strategy that is the best for all questions that are learned
from, h that of the best one of each question, and s that of the selected one. The share of the way
is the mean of s - b, by the mean of h - b; over several prices both means are weighted.

Shapes: N questions, S strategies, K prices, X numbers that a selector sees of a question.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from envs.replay import observations
from evaluation.cascade import Chosen, Played, title
from evaluation.intervals import Float, Resamples, interval
from evaluation.rows import Interval
from evaluation.wording import between, percent
from haltwise import HeadConfig
from policies.course import AT_START, Course, LargeAnswers
from policies.escalating import reading
from traces import Pairs, Traces

if TYPE_CHECKING:
    from sklearn.base import RegressorMixin

#: Where a selector chooses.
START, FIRST_POINT = "at the start", "at the first point"

#: The policies whose numbers are the strategies.
STRATEGIES = ("always_small", "always_large", "head", "budget")

# So many numbers of each policy are strategies, at most.
_MOST = 5
# Of fewer questions, none are kept back to tell when a network has learned enough.
_FEWEST = 20


@dataclass(frozen=True, eq=False)
class Asked:
    """N questions that both LMs have answered."""

    pairs: Pairs
    large: LargeAnswers
    """What the large LM answers."""
    price_ratio: float
    """What one of its tokens costs, in tokens of the small LM."""


@dataclass(frozen=True, eq=False)
class Strategies:
    """What each of S strategies comes to on each of N questions."""

    em: Float
    """(S, N) the exact match."""
    cost: Float
    """(S, N) the tokens, those of the large LM times the ratio."""

    @classmethod
    def of(cls, asked: Asked, chosen: Sequence[Chosen], where: str) -> Strategies:
        """Plays up to 5 of the numbers of each policy, chosen at a place."""
        em, cost = [], []
        for each in chosen:
            played = Played.of(each.policy, asked.pairs, asked.large, asked.price_ratio)
            num = len(each.parameters)
            for k in np.unique(np.linspace(0, num - 1, _MOST).round().astype(int)).tolist():
                outcome = played.outcome(each.parameters[k])
                course = each.policy.course(asked.pairs, played.signal, each.parameters[k])
                looks = each.policy.probing == "always"
                waited = 0 if where == START else _waited(asked.pairs.small, course, looks)
                em.append(outcome.em.astype(np.float64))
                cost.append(outcome.cost + waited)
        return cls(np.array(em), np.array(cost))

    def returns(self, price: float) -> Float:
        """Returns EM less the price of the tokens (S, N)."""
        returns: Float = self.em - price * self.cost / 1000
        return returns


def _waited(small: Traces, course: Course, looks: bool) -> NDArray[np.int64]:
    """Returns what it costs (N,) to wait for the first point, and to look at the answer there.

    Args:
        small: Traces of the small LM.
        course: Where a strategy leaves it. Who begins with the small LM has its tokens anyway.
        looks: Whether the strategy looks at answers anyway.
    """
    has_any = np.diff(small.offsets) > 0
    first = np.where(has_any, small.offsets[:-1], 0)
    look = np.where(has_any, small.probe_tokens[first], 0)
    thought = np.where(has_any, small.position[first], small.num_tokens)
    is_known = looks | (has_any & (course.point == first))
    return np.where(course.point == AT_START, thought + look, np.where(is_known, 0, look))


def _linear(num: int) -> RegressorMixin:
    from sklearn.linear_model import Ridge

    return Ridge(alpha=10.0)


def _boosted_trees(num: int) -> RegressorMixin:
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.multioutput import MultiOutputRegressor

    trees = HistGradientBoostingRegressor(
        max_iter=60, learning_rate=0.05, max_leaf_nodes=8, random_state=0
    )
    return MultiOutputRegressor(trees)


def _network(num: int) -> RegressorMixin:
    from sklearn.neural_network import MLPRegressor

    return MLPRegressor(
        hidden_layer_sizes=(32,),
        alpha=1.0,
        early_stopping=num >= _FEWEST,
        max_iter=200,
        random_state=0,
    )


#: By name, the models that a selector may be, by the number of questions that they learn from.
SELECTORS: Mapping[str, Callable[[int], RegressorMixin]] = {
    "linear": _linear,
    "boosted trees": _boosted_trees,
    "network": _network,
}


@dataclass(frozen=True)
class SelectionRow:
    """How far a way of choosing goes from the best single strategy to hindsight."""

    among: str
    """What is chosen among."""
    chooser: str
    """Who chooses."""
    where: str
    """Where it does."""
    learned: int
    """The number of questions that it learned from."""
    way: float
    """The share of the way, over all prices."""
    way_interval: Interval
    """The 95 % interval of that, by question."""
    way_at_price: float
    """The share of the way at one price."""
    way_at_price_interval: Interval


@dataclass(frozen=True)
class Selection:
    """Judges choices of strategy on questions from which nothing was learned."""

    known: Asked
    """The questions to learn from."""
    fresh: Asked
    """The questions to judge on."""
    config: HeadConfig
    """The conditions of the head whose features are seen at the first point."""
    prices: Sequence[float]
    """(K,) the prices."""
    weights: Float
    """(K,) how much each counts."""
    price: float
    """One of them that is told by itself."""

    def rows(self, chosen: Mapping[str, Chosen], num_learned: Sequence[int]) -> list[SelectionRow]:
        """Judges the cascade and all selectors.

        Args:
            chosen: By name, the policies; those of `STRATEGIES`, and the cascade.
            num_learned: The numbers of questions to learn from, each in turn.
        """
        own = chosen["cascade"]
        plain = [chosen[name] for name in STRATEGIES]
        rows = []
        for among, some in (("one LM, halted", plain), ("or the cascade", [*plain, own])):
            known, fresh = (Strategies.of(of, some, START) for of in (self.known, self.fresh))
            best = [int(known.returns(price).mean(axis=1).argmax()) for price in self.prices]
            ends = [
                (of[k], of.max(axis=0))
                for k, of in zip(best, map(fresh.returns, self.prices), strict=True)
            ]
            single, hindsight = np.array(ends).swapaxes(0, 1)
            told = [("cascade", "all along", len(self.known.pairs), self._cascade(own))]
            for where in (START, FIRST_POINT):
                for num in num_learned:
                    told += self._selected(some, where, num)
            for chooser, place, num, selected in told:
                ways = self._way(single, selected, hindsight)
                rows.append(SelectionRow(among, chooser, place, num, *ways))
        return rows

    def _cascade(self, own: Chosen) -> Float:
        """Returns the cascade's returns (K, N)."""
        asked = self.fresh
        played = Played.of(own.policy, asked.pairs, asked.large, asked.price_ratio)
        outcomes = [(price, played.outcome((price,))) for price in self.prices]
        return np.array([of.em - price * of.cost / 1000 for price, of in outcomes])

    def _selected(
        self, chosen: Sequence[Chosen], where: str, num: int
    ) -> list[tuple[str, str, int, Float]]:
        """Returns of each selector its name, and the returns (K, N) of what it selects."""
        known, fresh = (Strategies.of(of, chosen, where) for of in (self.known, self.fresh))
        read = reading(self.known.pairs.questions)
        seen, asked = (self._sees(of.pairs, where, read) for of in (self.known, self.fresh))
        rows = np.random.default_rng(0).permutation(len(seen))[:num]
        found = []
        for name, model in SELECTORS.items():
            expected = _predict(model(num), seen[rows], known, rows, asked)
            best = [expected.returns(price).argmax(axis=0) for price in self.prices]
            each = [
                np.take_along_axis(fresh.returns(price), k[None], axis=0)[0]
                for price, k in zip(self.prices, best, strict=True)
            ]
            found.append((name, where, num, np.array(each)))
        return found

    def _sees(self, pairs: Pairs, where: str, read: Callable[[Any], Float]) -> Float:
        """Returns what a selector sees of questions (N, X)."""
        asked = read(pairs.questions)
        if where == START:
            return asked
        small = pairs.small
        obs, _ = observations(small, self.config.observing, self.config.halting)
        has_any = np.diff(small.offsets) > 0
        first = np.zeros((len(small), obs.shape[1]))  # its price column tells whether it is there
        first[has_any] = obs[small.offsets[:-1][has_any]]
        first[:, -1] = has_any
        return np.concatenate([asked, first], axis=1)

    def _way(self, single: Float, selected: Float, hindsight: Float) -> tuple[Any, ...]:
        """Returns the share of the way and its interval, over all prices and at the one price."""
        resamples = Resamples.draw(self.fresh.pairs.small.question_id)
        one = np.zeros(len(self.prices))
        one[np.abs(np.log(np.array(self.prices) / self.price)).argmin()] = 1.0
        found: list[Any] = []
        for weights in (self.weights, one):
            gained, to_gain = weights @ (selected - single), weights @ (hindsight - single)
            sums = resamples.sums([gained, to_gain])
            found += [float(gained.sum() / to_gain.sum()), interval(sums[0] / sums[1])]
        return tuple(found)


def _predict(
    model: RegressorMixin, seen: Float, known: Strategies, rows: NDArray[np.int64], asked: Float
) -> Strategies:
    """Returns what the strategies are expected to come to on questions.

    Args:
        model: Predicts EM and tokens of all strategies together.
        seen: (n, X) what is seen of the questions to learn from.
        known: What the strategies come to, of which those `rows` (n,) are of these questions.
        rows: See `known`.
        asked: (N, X) what is seen of the questions to predict.
    """
    from sklearn.exceptions import ConvergenceWarning

    mean, scale = seen.mean(axis=0), np.maximum(seen.std(axis=0), 1e-6)
    told = np.concatenate([known.em[:, rows], known.cost[:, rows]]).T
    middle, spread = told.mean(axis=0), np.maximum(told.std(axis=0), 1e-6)
    with warnings.catch_warnings():  # a network that goes on learning is a model, too
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit((seen - mean) / scale, (told - middle) / spread)
    expected = model.predict(np.clip((asked - mean) / scale, -5, 5)) * spread + middle
    em, cost = np.split(expected.T, 2)
    return Strategies(em, cost)


def format_selection(rows: Sequence[SelectionRow]) -> str:
    """Returns a table of the rows that learned from most questions, for a terminal."""
    most = max(row.learned for row in rows)
    titles = ("among", "chosen by", "where", "way to hindsight %", "at the cascade's price")
    cells = [titles] + [
        (
            row.among,
            title(row.chooser),
            row.where,
            f"{percent(row.way)} {between(row.way_interval, percent)}".strip(),
            f"{percent(row.way_at_price)} {between(row.way_at_price_interval, percent)}".strip(),
        )
        for row in rows
        if row.learned == most
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  " + "  ".join(map(str.ljust, each, widths)).rstrip() for each in cells]
    return "\n".join(
        ["From the best single strategy to the best one of each question, at all prices:", *lines]
    )
