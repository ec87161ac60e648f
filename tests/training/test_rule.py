"""The stopping rule, apart from any framework: what it promises, on simulated curves."""

import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from scipy.stats import t as student

from haltwise import InputError
from haltwise.training import MeanReturn, StoppingConfig, StoppingRule
from haltwise.training.curve import Curve, _quantile

GAIN = 0.02
POINTS = StoppingConfig(level=None, least_gain=0.0, patience=3)


def ended(config: StoppingConfig, evaluations: Iterable[Any]) -> int | None:
    """The number of evaluations after which the rule did something; None if it did not."""
    rule = StoppingRule(config)
    for num, found in enumerate(evaluations):
        if rule.evaluated(num, found).action != "go on":
            return num + 1
    return None


def ems(rng: np.random.Generator, chances: Iterable[float]) -> Iterable[Any]:
    """EM of 60 questions: each is as hard as it is, and one in eight is answered by luck."""
    ease = rng.random(60)
    for chance in chances:
        luck = np.where(rng.random(60) < 1 / 8, rng.random(60), ease)
        yield (luck < chance) * 1.0


def smooth(rng: np.random.Generator, means: Iterable[float]) -> Iterable[Any]:
    """Expected returns of 30 questions, which gain unlike much from one evaluation to another."""
    level, pace = rng.normal(0, 0.3, 30), rng.normal(1, 0.5, 30)
    for mean in means:
        yield mean * pace + level + rng.normal(0, 0.2, 30)


CURVES = pytest.mark.parametrize(
    ("config", "draw"),
    [
        (StoppingConfig(least_gain=GAIN), ems),
        (StoppingConfig(least_gain=GAIN, interval="normal", span=10.0), smooth),
    ],
    ids=["bounded", "normal"],
)
Draw = Callable[[np.random.Generator, Iterable[float]], Iterable[Any]]


@pytest.mark.whole
@CURVES
def test_noise_stops_no_more_runs_that_gain_than_stated(config: StoppingConfig, draw: Draw) -> None:
    rng, rises = np.random.default_rng(0), 0.1 + GAIN * np.arange(40)
    stopped = sum(ended(config, draw(rng, rises)) is not None for _ in range(1000))
    assert stopped <= 1000 * 0.05
    by_points = sum(ended(POINTS, draw(rng, rises)) is not None for _ in range(1000))
    assert by_points > 300  # which is why there are intervals


@pytest.mark.whole
@CURVES
def test_no_run_that_gains_nothing_goes_on_for_ever(config: StoppingConfig, draw: Draw) -> None:
    rng = np.random.default_rng(1)
    at = [ended(config, draw(rng, [0.5] * 100)) or math.inf for _ in range(1000)]
    most = 1 / GAIN + 2 + 1
    assert max(at) <= most and np.median(at) < most / 2


@pytest.mark.whole
@CURVES
def test_a_known_optimum_is_passed_before_the_run_stops(config: StoppingConfig, draw: Draw) -> None:
    # It gains 0.06 with each evaluation until it is at its optimum, the 11th, and falls slowly.
    true = np.minimum(0.2 + 0.06 * np.arange(60), 0.8) - 0.003 * np.maximum(np.arange(60) - 10, 0)
    rng = np.random.default_rng(2)
    at = [ended(config, draw(rng, true)) or math.inf for _ in range(1000)]
    assert np.mean(np.array(at) < 12) <= 0.05 and max(at) <= 60


def test_a_run_that_ends_before_the_rule_says_so() -> None:
    rule = StoppingRule(StoppingConfig())
    assert rule.evaluated(1, [0.0, 1.0]).reason == rule.latest.reason
    assert rule.latest.reason == "no plateau yet, and nothing else that stops the run"


def test_after_the_stated_number_of_evaluations_any_run_is_at_a_plateau() -> None:
    # Two questions: no evidence is ever enough, but more than the span cannot be gained.
    for span, gain, patience in ((1.0, 0.1, 2), (2.0, 0.3, 1), (0.5, 0.05, 4)):
        config = StoppingConfig(span=span, least_gain=gain, patience=patience)
        num = ended(config, [[0.0, i % 2 * span] for i in range(100)])
        assert num == math.floor(span / gain + 1e-9) + patience + 1


@pytest.mark.parametrize("interval", ["bounded", "normal"])
def test_a_gain_is_lacking_where_its_bound_is_below_it(interval: Any) -> None:
    rng, found = np.random.default_rng(4), []
    for gain in np.geomspace(1e-3, 0.5, 40):
        curve = Curve(1.0, interval)
        for step, returns in enumerate(ems(rng, [0.2, 0.6, 0.5, 0.6])):
            curve.add(step, returns)
        lacking = [
            since for since in range(3) if curve.most_gained(since, 0.05) < gain * (3 - since)
        ]
        best = max(lacking, key=lambda since: curve.means[since], default=None)
        assert curve.without_gain(0, gain, 0.05) == best
        found.append(best)
    assert None in found and len(set(found)) > 2


def test_patience_by_the_points_is_that_of_the_best_one() -> None:
    means = [0.1, 0.5, 0.4, 0.5, 0.6, 0.6, 0.2, 0.59, 0.9]
    assert ended(POINTS, ([mean, mean] for mean in means)) == 8
    assert ended(POINTS, (MeanReturn(mean) for mean in means)) == 8


def test_means_are_compared_by_their_errors() -> None:
    """0.3 gained of 0.4 asked, by hand: 1 / 6 of the level for the third of three, for two each."""
    config = StoppingConfig(least_gain=0.2, patience=1, level=0.12)
    deviation = -student.ppf(0.01, math.inf)
    for error, stops in ((0.1 / deviation * 1.01, False), (0.1 / deviation * 0.99, True)):
        means = [MeanReturn(0.0, 0.0), MeanReturn(0.2, 1.0), MeanReturn(0.3, error)]
        assert (ended(config, means) == 3) is stops


@pytest.mark.parametrize(("level", "num_free"), [(1e-6, 34), (1e-3, 10), (0.05, 5), (0.2, 1000)])
def test_the_quantile_is_that_of_student(level: float, num_free: int) -> None:
    assert _quantile(level, num_free) == pytest.approx(student.isf(level, num_free), rel=2e-3)


@pytest.mark.parametrize("reduce", ["rate", "noise"])
def test_a_plateau_reduces_then_cools_down_then_stops(reduce: Any) -> None:
    rule = StoppingRule(
        StoppingConfig(
            level=None, least_gain=0.0, patience=1, reductions=2, reduce=reduce, factor=0.25,
            cooldown_steps=10, cooldown_factor=0.1,
        )
    )  # fmt: skip
    actions = [rule.evaluated(step, [0.5]).action for step in range(4)]
    assert actions == ["go on", "reduce", "reduce", "cool down"]
    rate, batch = (1 / 16, 1.0) if reduce == "rate" else (1.0, 16.0)
    assert rule.rate == pytest.approx(rate / 10) and rule.batch == batch
    assert rule.evaluated(5, [0.9]).action == "go on" and rule.stepped(12).action == "go on"
    stop = rule.stepped(13)
    assert stop.action == "stop" and stop.reason.endswith("10 steps of cooling down are done")
    assert rule.evaluated(14, [1.0]) == rule.stepped(14) == stop and rule.curve.means[-1] == 1.0


def test_no_plateau_stops_before_the_least_steps() -> None:
    rule = StoppingRule(StoppingConfig(level=None, patience=1, least_steps=30))
    actions = [rule.evaluated(step, [0.5]).action for step in (0, 10, 20, 30)]
    assert actions == ["go on", "go on", "go on", "stop"]


def test_budgets_stop_a_run() -> None:
    rule = StoppingRule(StoppingConfig(patience=None, dollar_budget=0.5, tariff=2.0))
    assert rule.stepped(1, 249_999).action == "go on"
    assert rule.stepped(2, 250_000).reason == "at step 2 its 250,000 tokens have used up the budget"
    rule = StoppingRule(StoppingConfig(dollar_budget=0.5, tariff=2.0, token_budget=100))
    assert rule.stepped(1, 100).action == "stop"
    rule = StoppingRule(StoppingConfig(most_steps=3))
    assert [rule.stepped(step).action for step in (1, 2, 3)] == ["go on", "go on", "stop"]
    rule = StoppingRule(StoppingConfig(most_steps=9, cooldown_steps=4))
    told = [rule.stepped(step).action for step in range(1, 10)]
    assert told == ["go on"] * 4 + ["cool down"] + ["go on"] * 3 + ["stop"] and rule.rate == 0.1


def test_a_gradient_has_vanished_after_some_small_ones_in_a_row() -> None:
    rule = StoppingRule(StoppingConfig(gradient_floor=0.1, gradient_steps=3))
    norms = [0.1, 0.05, 0.2, 0.1, math.nan, 0.0, 0.1, 0.1]
    actions = [rule.stepped(step, None, norm).action for step, norm in enumerate(norms)]
    assert actions == ["go on"] * 7 + ["stop"]


@pytest.mark.parametrize("cut", [1, 5, 12, 18])
def test_a_rule_goes_on_where_another_process_was(cut: int) -> None:
    config = StoppingConfig(least_gain=0.1, reductions=1, cooldown_steps=4, gradient_floor=1.0)
    rng = np.random.default_rng(3)
    evaluations = [np.round(found, 3) for found in ems(rng, [0.5] * 40)]

    def tell(rule: StoppingRule, steps: range) -> list[str]:
        return [
            rule.evaluated(step, evaluations[step]).action + rule.stepped(step, 0, step % 7).action
            for step in steps
        ]

    whole, first, second = (StoppingRule(config) for _ in range(3))
    told = tell(whole, range(40))
    assert {"reducego on", "cool downgo on", "go onstop"} <= set(told)
    assert tell(first, range(cut)) == told[:cut]
    second.restore(json.loads(json.dumps(first.state())))
    assert tell(second, range(cut, 40)) == told[cut:] and second.state() == whole.state()


@pytest.mark.parametrize("state", [{}, {"curve": [[0, [math.nan]]]}, {"curve": [1]}, []])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(InputError, match="no state of a stopping rule"):
        StoppingRule(StoppingConfig()).restore(state)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"patience": 0}, "patience is 0, expected at least 1"),
        ({"level": 1.0}, "level is 1.0, expected between 0 and 1, or None"),
        ({"least_gain": math.nan}, "least_gain is nan, expected 0 or more, and finite"),
        ({"least_gain": 0.0}, "least_gain is 0: no interval tells"),
        ({"span": 0.0}, "span is 0.0, expected positive and finite"),
        ({"interval": "wide"}, "interval is 'wide', expected bounded or normal"),
        ({"reduce": "lr"}, "reduce is 'lr', expected rate or noise"),
        ({"factor": 1.0}, "factor is 1.0, expected between 0 and 1"),
        ({"cooldown_factor": 0.0}, "cooldown_factor is 0.0, expected above 0"),
        ({"cooldown_steps": -1}, "cooldown_steps is -1, expected 0 or more"),
        ({"cooldown_steps": 9, "most_steps": 9}, "is 9, expected fewer than most_steps, 9"),
        ({"token_budget": 0}, "token_budget is 0, expected at least 1"),
        ({"dollar_budget": 3.0}, "dollar_budget is 3.0, expected a tariff with it"),
        ({"gradient_floor": 0.0}, "gradient_floor is 0.0, expected positive"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        StoppingRule(StoppingConfig(**setting))


@pytest.mark.parametrize(
    ("returns", "message"),
    [
        ([0.1, math.nan, math.inf], "2 of 3 returns are no finite number"),
        ([], r"returns of shape \(0,\), expected one of each held-out question"),
        ([[0.1, 0.2]], r"returns of shape \(1, 2\)"),
        ([0.1, 0.2], "returns of 2 held-out questions, expected 3 held-out questions"),
        (MeanReturn(0.5, 0.1), "returns of a mean, expected 3 held-out questions"),
        (MeanReturn(math.nan), "expected a finite mean"),
        ([0.1, 0.2, 1.4], "a return changed by 1.1, expected at most the span, 1"),
    ],
)
def test_returns_that_are_none_are_refused(returns: Any, message: str) -> None:
    rule = StoppingRule(StoppingConfig())
    rule.evaluated(10, [0.1, 0.2, 0.3])
    with pytest.raises(InputError, match=message):
        rule.evaluated(20, returns)


def test_what_is_missing_is_asked_for() -> None:
    rule = StoppingRule(StoppingConfig(interval="normal"))
    rule.evaluated(1, [0.5])
    with pytest.raises(InputError, match="evaluation at step 1, expected one after 1"):
        rule.evaluated(1, [0.5])
    with pytest.raises(InputError, match="1 held-out question, expected at least 2"):
        rule.evaluated(2, [0.5])
    with pytest.raises(InputError, match="expected num_tokens with each step"):
        StoppingRule(StoppingConfig(token_budget=5)).stepped(1)
    with pytest.raises(InputError, match="expected gradient_norm with each step"):
        StoppingRule(StoppingConfig(gradient_floor=5)).stepped(1)
