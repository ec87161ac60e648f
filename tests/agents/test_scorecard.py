"""A scorecard decides by whole points, and so does the head that it is exported as."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.balance import balance
from agents.learn_scorecard import learn_scorecard
from agents.scorecard import Rule, Scorecard, format_card, unit_of
from evaluation.compare import swept
from evaluation.trials import balanced_returns
from haltwise import FEATURE_GROUPS, HaltHead, InputError, Observing, explain, feature_names
from policies.head import HeadPolicy, price_grid
from tests.heads import random_head
from tests.projections import some_projection
from traces import Traces

GROUPS = ("pace", "confidence", "agreement")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def logit(confidence: float) -> float:
    return float(np.log(confidence / (1 - confidence)))


def card_and_head() -> tuple[Scorecard, HaltHead]:
    """3 points for a confidence of 0.9, 2 for the second time in a row, -4 for a third answer.

    The bar is 3 in the middle of the prices, which is 1, and 5 at a price of 0.1.
    """
    rules = (
        Rule("confidence_logit", logit(0.9), 3),
        Rule("log_run", float(np.log1p(1.5)), 2),
        Rule("log_distinct", float(np.log1p(2.5)), -4),
    )
    card = Scorecard(rules, bar=3.0, fall=2.0)
    return card, card.to_head(random_head(0, GROUPS).config)


def features_of(confidence: float, run: int, distinct: int, answered: bool = True) -> np.ndarray:
    names = feature_names(("confidence", "agreement"))
    features = np.zeros((1, len(names)), dtype=np.float32)
    told = {"confidence_logit": logit(confidence), "log_run": np.log1p(run)}
    told |= {"log_distinct": np.log1p(distinct), "answered": float(answered)}
    for name, value in told.items():
        features[0, names.index(name)] = value
    return features


@pytest.mark.parametrize(
    ("confidence", "run", "distinct", "points", "halted_at"),
    [
        (0.95, 2, 1, 5, [0.1, 1.0, 10.0]),
        (0.95, 1, 2, 3, [1.0, 10.0]),
        (0.5, 7, 2, 2, [10.0]),
        (0.95, 2, 3, 1, [10.0]),
        (0.5, 1, 1, 0, []),
        (0.89, 2, 1, 2, [10.0]),
    ],
)
def test_the_head_halts_where_the_points_reach_the_bar(
    confidence: float, run: int, distinct: int, points: int, halted_at: list[float]
) -> None:
    card, head = card_and_head()
    features = features_of(confidence, run, distinct)
    assert card.points(features, head.config.features).tolist() == [points]
    assert [p for p in (0.1, 1.0, 10.0) if head.halts(features, p)[0]] == halted_at
    for price in (0.3, 2.0):  # the log-odds are what the points are above the bar
        above = points - 3 + 2 * np.log10(price)
        assert head.log_odds(features, price)[0] == pytest.approx(above, abs=1e-5)
    unanswered = features_of(confidence, run, distinct, answered=False)
    assert not head.halts(unanswered, 10.0)[0]


def test_a_head_reads_no_group_that_no_rule_needs_and_is_loaded_like_any_other(
    tmp_path: Path,
) -> None:
    _, head = card_and_head()
    assert head.config.observing.groups == ("confidence", "agreement")
    head.save(tmp_path)
    assert HaltHead.load(tmp_path).digest == head.digest
    paced = Scorecard((Rule("log_point", 1.0, 1),), 1.0, 0.0).to_head(random_head(0, GROUPS).config)
    assert paced.config.observing.groups == ("pace", "agreement")  # whether there is an answer


@given(st.integers(0, 10**6))
@settings(max_examples=60)
def test_the_exported_head_decides_as_the_whole_points_do(seed: int) -> None:
    rng = np.random.default_rng(seed)
    config = random_head(seed, GROUPS).config
    mean, scale = np.array(config.observing.mean), np.array(config.observing.scale)
    features = rng.normal(mean, 3 * scale, (400, len(mean))).astype(np.float32)  # some are clipped
    picked = rng.integers(len(mean), size=15)
    # Half of the thresholds are values that occur: there, at least is met.
    at_least = np.where(
        rng.random(15) < 0.5,
        features[rng.integers(400, size=15), picked],
        rng.normal(mean, scale)[picked],
    )
    rules = tuple(
        Rule(config.features[i], float(at), int(points))
        for i, at, points in zip(picked, at_least, rng.integers(-20, 21, 15), strict=True)
        if abs(at - mean[i]) < 5 * scale[i]
    )
    card = Scorecard(rules, round(rng.normal(0, 8), 2), round(rng.uniform(0, 20), 2))
    head = card.to_head(config)
    columns = [config.features.index(name) for name in head.config.features]
    below = [
        (at - features[:, i]) / scale[i]
        for i, at in ((config.features.index(rule.feature), rule.at_least) for rule in rules)
    ]
    clear = ~np.any([(gap > 0) & (gap < 1e-4) for gap in below], axis=0)
    assert clear.mean() > 0.9
    for price in np.exp(rng.normal(0, 2, 5)):
        dial = float(config.observing.dial(price))
        points = card.points(features, config.features)
        settled = clear & (np.abs(points - card.bar_at(dial)) > 1e-4)
        expected = (points >= card.bar_at(dial)) & head.may_halt(features[:, columns])
        found = head.halts(features[:, columns], price)
        assert (found == expected)[settled].all()


def test_contributions_to_a_decision_are_the_points() -> None:
    _, head = card_and_head()
    before, now = features_of(0.5, 1, 1)[0], features_of(0.95, 2, 3)[0]
    told = dict(explain(head, now, 1.0, before).drivers(3))
    assert told == {
        "log_distinct": pytest.approx(-4),
        "confidence_logit": pytest.approx(3),
        "log_run": pytest.approx(2),
    }


@pytest.mark.parametrize("num_rules", [1, 4])
def test_a_learned_card_has_no_more_rules_and_is_told_in_whole_points(
    random_traces: Traces, num_rules: int
) -> None:
    head = random_head(1, GROUPS)
    card = learn_scorecard(head, random_traces, num_rules)
    assert 1 <= len(card.rules) <= num_rules
    assert all(isinstance(rule.points, int) and rule.points for rule in card.rules)
    assert not any(rule.feature == "answered" for rule in card.rules)
    table = format_card(card, head.config.observing, 0.5)
    assert table.count("\n") == len(card.rules) + 12
    for rule in card.rules:
        assert f"{rule.points:+d}  {unit_of(rule.feature).what}" in table


def test_a_learned_card_returns_more_than_its_teacher(random_traces: Traces) -> None:
    _, head = card_and_head()
    learned = learn_scorecard(head, random_traces, 8).to_head(head.config)
    weights = balance(np.array(price_grid(head.config.observing)), head.config.observing)
    own, taught = (
        balanced_returns(swept([HeadPolicy(one)], random_traces, "always") or {}, weights).mean()
        for one in (learned, head)
    )
    assert own > taught + 0.1


def test_a_head_that_sees_hidden_states_alone_has_no_card(random_traces: Traces) -> None:
    observing = Observing(("hidden",), (0.0,) * 16, (1.0,) * 16, (0.1, 10.0), some_projection(20))
    head = random_head(0)
    weights = head.weights | {"w0": np.ones((8, 17), dtype=np.float32)}
    hidden = HaltHead(replace(head.config, observing=observing), weights)
    with pytest.raises(InputError, match="no feature that a person can measure"):
        learn_scorecard(hidden, random_traces, 3)


def test_units_lead_back_and_thresholds_are_short() -> None:
    for name in feature_names(FEATURE_GROUPS):
        unit = unit_of(name)
        assert unit.back(unit.of(0.7)) == pytest.approx(0.7)
        assert unit.of(0.8) > unit.of(0.7)
    confidence, run = unit_of("confidence_logit"), unit_of("log_run")
    assert confidence.say(Rule("", confidence.near(logit(0.93412)), 1)) == "0.934"
    assert confidence.say(Rule("", confidence.near(logit(0.999634)), 1)) == "0.99963"
    assert run.say(Rule("", run.near(np.log1p(3)), 1)) == "3"
    assert run.near(np.log1p(3)) == pytest.approx(np.log1p(2.5))
    assert unit_of("leads").say(Rule("leads", unit_of("leads").near(1.0), 1)) == "yes"
