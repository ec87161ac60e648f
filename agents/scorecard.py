"""A head that a person can read: points for what holds at a decision point, and a bar.

    halt if the sum of the points of all rules that hold is at least bar - fall * dial(price)

A rule holds where its feature is at least its threshold. The card is exported as a `HaltHead` that
decides the same: a rule is a hidden unit that is so steep that it is -1 or 1, and the price comes
by the straight path. Shapes: B rows, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from haltwise import HaltHead, HeadConfig, Observing, feature_names
from haltwise.policy.features import ANSWERED
from haltwise.policy.signals import Float

Double = NDArray[np.float64]

# Prices that the bar is shown at, beside the own one.
_NUM_SHOWN = 7

# A first hidden unit tells a threshold within 1 / 2^14 of a standard deviation. The power of two
# keeps its float32 exact; more would be too steep for `haltwise.explain`.
_STEEP = 2.0**14
# A second one is 1 where the first is 0 or more, and -1 where that is -1.
_SECOND, _SHIFT = 40.0, 20.0


@dataclass(frozen=True)
class Rule:
    """What a feature has to be at least, and the points for it."""

    feature: str
    at_least: float
    """The threshold, in what the head is fed; `unit_of` tells a person's."""
    points: int


@dataclass(frozen=True)
class Scorecard:
    """Rules with whole points, and the bar that their sum has to reach for the thought to halt."""

    rules: tuple[Rule, ...]
    bar: float
    """The bar in the middle of the price range, on a log scale."""
    fall: float
    """How much lower the bar is at the highest price of the range, and higher at the lowest."""

    def points(self, features: Float, names: Sequence[str]) -> NDArray[np.int64]:
        """Returns the points (B,) of features (B, F) with those names; NaN reaches no threshold."""
        total = np.zeros(len(features), dtype=np.int64)
        for rule in self.rules:
            total += rule.points * (features[:, names.index(rule.feature)] >= rule.at_least)
        return total

    def bar_at(self, dial: Any) -> Any:
        """Returns the bar at a log price or at some, as `Observing.dial` tells them."""
        return self.bar - self.fall * dial

    def to_json(self, observing: Observing) -> dict[str, Any]:
        """Returns a JSON object of the card, with the bar as a line in log10 of the price.

        Args:
            observing: That of the head, which tells the price range.
        """
        rules = [
            asdict(rule) | {"feature_in_words": unit.what, "at_least_in_words": unit.say(rule)}
            for rule in self.rules
            for unit in [unit_of(rule.feature)]
        ]
        low, high = np.log10(observing.price_range)
        fall = 2 * self.fall / (high - low)
        return {
            "rules": rules,
            "halts_at_points": "bar_at_price_1 - fall_by_tenfold * log10(price)",
            "bar_at_price_1": self.bar + fall * (low + high) / 2,
            "fall_by_tenfold": fall,
            "price_range": list(observing.price_range),
        }

    def to_head(self, config: HeadConfig) -> HaltHead:
        """Returns a head that decides as the card does.

        It reads only the groups that the rules need, and the answers' if `config` does: a thought
        is not halted on an answer that cannot be read. It decides otherwise only for features that
        are below a threshold by less than 1e-4 of their standard deviation.

        Args:
            config: The config of a head that reads all features of the rules.
        """
        used = {rule.feature for rule in self.rules} | {ANSWERED}
        observing = config.observing
        groups = tuple(group for group in observing.groups if used & set(feature_names([group])))
        kept = [config.features.index(name) for name in feature_names(groups)]
        observing = replace(
            observing,
            groups=groups,
            mean=tuple(observing.mean[i] for i in kept),
            scale=tuple(observing.scale[i] for i in kept),
            projection=None,
        )
        config = replace(config, observing=observing, certificate=None, threshold=0.5)
        at = np.tile(observing.mean, (len(self.rules), 1)).astype(np.float32)
        columns = [config.features.index(rule.feature) for rule in self.rules]
        own = np.arange(len(self.rules)), columns
        at[own] = [rule.at_least for rule in self.rules]
        w0 = np.zeros((len(self.rules), observing.size))
        w0[own] = _STEEP
        points = np.array([rule.points for rule in self.rules])
        straight = np.zeros(observing.size)
        straight[-1] = self.fall
        weights = {
            "w0": w0,
            "b0": -_STEEP * observing.observe(at, 1.0)[own],
            "w1": _SECOND * np.eye(len(self.rules)),
            "b1": np.full(len(self.rules), _SHIFT),
            "w2": np.concatenate([points / 2, straight])[None],
            "b2": np.array([points.sum() / 2 - self.bar]),
        }
        return HaltHead(config, {name: each.astype(np.float32) for name, each in weights.items()})


@dataclass(frozen=True)
class Unit:
    """How a person would say the values of a feature."""

    what: str
    """What is measured, in words."""
    of: Callable[[Any], Any]
    """From what the head is fed to a person's number; it rises."""
    back: Callable[[Any], Any]
    """The way back."""
    kind: Literal["number", "count", "chance", "flag"] = "number"
    """count is a whole number, chance a probability, flag yes or no."""

    def near(self, value: float) -> float:
        """Returns a threshold near a value, as the head is fed it, that is short for a person."""
        plain = float(self.of(value))
        if self.kind == "flag":
            return 0.5
        if self.kind == "count":
            return float(self.back(round(plain) - 0.5))
        if self.kind == "chance" and plain > 0.5:
            return float(self.back(1 - float(f"{1 - plain:.2g}")))
        return float(self.back(float(f"{plain:.2g}")))

    def say(self, rule: Rule) -> str:
        """Returns a rule's threshold as a person would say it."""
        plain = float(self.of(rule.at_least))
        if self.kind == "flag":
            return "yes"
        return f"{np.ceil(plain):.0f}" if self.kind == "count" else f"{plain:.6g}"


def _same(value: Any) -> Any:
    """Returns what the head is fed where a person would say the same."""
    return value


def _confidence(logit: Any) -> Any:
    """Returns the probability of log-odds."""
    return 1 / (1 + np.exp(-logit))


def _logit(confidence: Any) -> Any:
    """Returns the log-odds of a probability."""
    return np.log(confidence) - np.log1p(-confidence)


def _log_prob(surprise: Any) -> Any:
    """Returns the log probability of what the head is fed of it."""
    return -np.expm1(-surprise)


def _surprise(log_prob: Any) -> Any:
    """Returns what the head is fed of a log probability."""
    return -np.log1p(-log_prob)


def _count(what: str) -> Unit:
    """Returns the unit of log(1 + a whole number)."""
    return Unit(what, np.expm1, np.log1p, "count")


def _chance(what: str) -> Unit:
    """Returns the unit of the logarithm of a probability."""
    return Unit(what, np.exp, np.log, "chance")


def _odds(what: str) -> Unit:
    """Returns the unit of the log-odds of a probability."""
    return Unit(what, _confidence, _logit, "chance")


def _as_it_is(what: str, kind: Literal["number", "flag"] = "number") -> Unit:
    """Returns the unit of a feature that is a person's number already."""
    return Unit(what, _same, _same, kind)


# By feature, where there is a plain unit.
_UNITS = {
    "log_position": _count("tokens of the thought so far"),
    "log_point": Unit("decision points so far", np.exp, np.log, "count"),
    "log_gap": _count("tokens since the last point"),
    "last_point": _as_it_is("last point of all", "flag"),
    "log_points_left": _count("points that are left"),
    "confidence_logit": _odds("confidence in the answer"),
    "confidence_max": _odds("largest confidence so far"),
    "confidence_mean": _odds("confidence of late"),
    "confidence_change": _as_it_is("rise of the log-odds of confidence"),
    "confidence_low": _chance("confidence in the answer"),
    "doubt": _chance("chance that the worst token is wrong"),
    "least_doubt": _chance("least chance yet that this answer is wrong"),
    "log_probe": _count("tokens of the answer"),
    "answered": _as_it_is("there is an answer", "flag"),
    "log_run": _count("times in a row of this answer"),
    "run_share": _as_it_is("times in a row, by the points so far"),
    "top_share": _as_it_is("times of the commonest answer, by points"),
    "leads": _as_it_is("this is the commonest answer", "flag"),
    "log_distinct": _count("different answers so far"),
    "returned": _as_it_is("an old answer is back", "flag"),
    "entropy": _as_it_is("mean entropy since the last point, nats"),
    "entropy_mean": _as_it_is("mean entropy of late, nats"),
    "max_entropy": Unit("largest entropy since the last point, nats", np.expm1, np.log1p),
    "logprob": _as_it_is("mean log probability since the last point"),
    "min_logprob": Unit("least log probability since the last point", _log_prob, _surprise),
    "margin": _as_it_is("mean margin since the last point"),
    "margin_mean": _as_it_is("mean margin of late"),
    "end_think": _chance("chance that the thought ends here"),
    "end_think_max": _chance("largest chance so far that it ends"),
    "end_think_mean": _chance("chance of late that it ends"),
    "log_reflections": _count("words of doubt since the last point"),
    "log_reflections_all": _count("words of doubt in all"),
}


def unit_of(feature: str) -> Unit:
    """Returns how a person says the values of a feature; one without a plain unit keeps its own."""
    return _UNITS.get(feature, _as_it_is(f"{feature}, as the head is fed it"))


def format_card(card: Scorecard, observing: Observing, price: float) -> str:
    """Returns a card as a table, with its bar at some prices.

    Args:
        card: The card.
        observing: That of the head, which tells the price range.
        price: The head's own price; 0 if it never halts by itself.
    """
    told = [(f"{rule.points:+d}", unit_of(rule.feature), rule) for rule in card.rules]
    width = max(len(unit.what) for _, unit, _ in told)
    lines = [
        "points  if at least",
        *(f"{points:>6}  {unit.what:<{width}}  {unit.say(rule):>9}" for points, unit, rule in told),
    ]
    prices = sorted({*np.geomspace(*observing.price_range, _NUM_SHOWN).tolist(), price} - {0.0})
    lines += ["", "Halt where the points are at least the bar:", "     price     bar"]
    for at in prices:
        bar = np.ceil(card.bar_at(float(observing.dial(at))))
        lines.append(f"{at:>10.4g}{bar:z8.0f}" + ("  the card's own price" if at == price else ""))
    return "\n".join(lines) + "\n"
