from dataclasses import replace

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from hypothesis import given, settings
from hypothesis import strategies as st

from haltwise import HaltHead, InputError, explain
from tests.heads import random_head

RUN = 1  # the column of log_run


def features_of(run: float) -> np.ndarray:
    features = np.zeros(7, dtype=np.float32)
    features[0] = 1  # there is an answer
    features[RUN] = np.log1p(run)
    return features


def random_features(head: HaltHead, seed: int) -> np.ndarray:
    """Some of them far outside what is told apart."""
    rng = np.random.default_rng([seed, 1])
    return rng.normal(0, 3, len(head.config.features)).astype(np.float32)


def with_weights(head: HaltHead, **changes: object) -> HaltHead:
    changed = {name: np.array(value, dtype=np.float32) for name, value in changes.items()}
    return HaltHead(head.config, head.weights | changed)


def test_the_only_feature_that_counts_contributes_everything(run_head: HaltHead) -> None:
    explanation = explain(run_head, features_of(4), 1.0)
    expected = np.tanh(np.tanh(np.log1p(4) - np.log1p(1.5)))  # 0 at the mean
    assert explanation.reference_log_odds == pytest.approx(0, abs=1e-6)
    assert explanation.log_odds == pytest.approx(expected, abs=1e-6)
    assert explanation.prob_halt == pytest.approx(1 / (1 + np.exp(-expected)), abs=1e-6)
    assert explanation.contributions[RUN] == pytest.approx(expected, abs=1e-6)
    assert np.count_nonzero(explanation.contributions) == 1
    assert explanation.names[RUN] == "log_run"
    assert explanation.price == 1 and explain(run_head, features_of(4)).price == 1


def test_with_one_hidden_unit_features_share_by_weight_times_change(run_head: HaltHead) -> None:
    slope = np.array([3.0, -1.0, 0.0, 0.0, 0.5, 0.0, 0.0])
    head = with_weights(run_head, w0=[[*slope, 0.7]], w1=[[2.0]], w2=[[-4.0]], b0=[0.3], b1=[-0.2])
    before, after = features_of(1), features_of(3) + np.float32(0.25)
    explanation = explain(head, after, 3.0, before)
    parts = slope * (after - before)
    change = (head.log_odds(after[None], 3.0) - head.log_odds(before[None], 3.0))[0]
    assert explanation.contributions == pytest.approx(change * parts / parts.sum(), abs=1e-5)


@given(st.integers(0, 10**6), st.floats(0.01, 100))
@settings(max_examples=50, deadline=None)
def test_contributions_sum_to_the_change_of_the_heads_own_log_odds(seed: int, price: float) -> None:
    head = random_head(seed)
    now, before = random_features(head, seed), random_features(head, seed + 1)
    explanation = explain(head, now, price, before)
    change = explanation.log_odds - explanation.reference_log_odds
    assert explanation.contributions.sum() == pytest.approx(change, abs=1e-6)
    assert explanation.log_odds == pytest.approx(head.log_odds(now[None], price)[0], abs=1e-5)
    back = explain(head, before, price, now).contributions
    assert back == pytest.approx(-explanation.contributions, abs=1e-6)
    assert not explain(head, now, price, now).contributions.any()


@pytest.mark.parametrize("seed", range(3))
def test_captum_finds_the_same_contributions(seed: int) -> None:
    head = random_head(seed)
    w = {name: torch.from_numpy(value).double() for name, value in head.weights.items()}

    def log_odds(obs: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(torch.tanh(obs @ w["w0"].T + w["b0"]) @ w["w1"].T + w["b1"])
        return (hidden @ w["w2"].T + w["b2"])[:, 0]

    features = random_features(head, seed)
    ends = [features, np.array(head.config.observing.mean, dtype=np.float32)]
    obs = torch.from_numpy(head.config.observing.observe(np.stack(ends), 0.3)).double()
    expected = IntegratedGradients(log_odds).attribute(
        obs[:1], obs[1:], n_steps=500, method="gausslegendre"
    )[0]
    found = explain(head, features, 0.3).contributions
    assert found == pytest.approx(expected[:-1].detach().numpy(), abs=1e-6)
    assert expected[-1] == 0


def test_beyond_the_clip_a_feature_contributes_no_more(run_head: HaltHead) -> None:
    at_clip, beyond = features_of(0), features_of(0)
    at_clip[RUN] = np.log1p(1.5) + 5
    beyond[RUN] = 100
    expected = explain(run_head, at_clip).contributions
    assert explain(run_head, beyond).contributions == pytest.approx(expected, abs=1e-6)


def test_drivers_are_the_largest_by_magnitude(run_head: HaltHead) -> None:
    contributions = np.array([0.1, -3.0, 2.0, 0, 0, 0, 0.5])
    explanation = replace(explain(run_head, features_of(1)), contributions=contributions)
    assert explanation.drivers(2) == [("log_run", -3.0), ("run_share", 2.0)]


@pytest.mark.parametrize("run", [1, 2, 3])
@pytest.mark.parametrize("threshold", [0.5, 0.55])
def test_indifference_price_by_hand(run_head: HaltHead, run: int, threshold: float) -> None:
    # tanh(tanh(log1p(run) - log1p(1.5) + log10(price) / 2)) = logit(threshold)
    head = HaltHead(replace(run_head.config, threshold=threshold), run_head.weights)
    at = np.arctanh(np.arctanh(np.log(threshold / (1 - threshold))))
    expected = 10 ** (2 * (at - np.log1p(run) + np.log1p(1.5)))
    found = explain(head, features_of(run)).indifference_price
    assert found == pytest.approx(expected, rel=1e-5)
    assert explain(head, features_of(run), 50.0).indifference_price == found


def test_indifference_price_is_zero_if_it_always_halts_and_infinite_if_never(
    run_head: HaltHead,
) -> None:
    assert explain(run_head, features_of(4)).indifference_price == 0  # it would be 0.041
    assert explain(run_head, features_of(0)).indifference_price == np.inf  # it would be 68


def test_without_an_answer_no_price_halts(run_head: HaltHead) -> None:
    unread = features_of(4)
    unread[0] = 0
    assert explain(run_head, unread).indifference_price == np.inf


def test_of_several_flips_the_nearest_counts(run_head: HaltHead) -> None:
    dial = np.zeros((2, 8))
    dial[:, -1] = 20  # the dial is log10(price): two steps up, at -0.5 and 0.5
    head = with_weights(
        run_head, w0=dial, b0=[10, -10], w1=np.eye(2), b1=[0, 0], w2=[[1, -1]], b2=[-np.tanh(1)]
    )
    assert [bool(head.halts(features_of(1)[None], p)[0]) for p in (0.2, 1, 5)] == [0, 1, 0]
    for price, expected in ((0.2, 10**-0.5), (0.9, 10**-0.5), (1.1, 10**0.5), (8, 10**0.5)):
        found = explain(head, features_of(1), price).indifference_price
        assert found == pytest.approx(expected, rel=1e-4)


@given(st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_the_decision_flips_at_the_indifference_price(seed: int) -> None:
    head = random_head(seed)
    features = random_features(head, seed)
    flip = explain(head, features).indifference_price
    if 0 < flip < np.inf:
        below, above = (head.halts(features[None], flip * (1 + by))[0] for by in (-1e-4, 1e-4))
        assert below != above
    else:
        assert set(head.halts(np.repeat(features[None], 50, 0), np.geomspace(0.1, 10, 50))) == {
            flip == 0
        }


def test_a_step_belongs_to_the_feature_that_makes_it(run_head: HaltHead) -> None:
    # Two steps beside each other that undo one another, where no node of the quadrature lies.
    w0 = np.zeros((2, 8))
    w0[0, RUN], w0[1, 2] = 1e6, 1e6
    head = with_weights(
        run_head, w0=w0, b0=[-1000.0, -1000.1], w1=9 * np.eye(2), b1=[0, 0], w2=[[2, -2]]
    )
    origin = np.array(head.config.observing.mean)
    now = origin + np.eye(7)[RUN] + np.eye(7)[2]
    explanation = explain(head, now, 1.0)
    expected = np.zeros(7)
    expected[[RUN, 2]] = 4.0, -4.0
    assert explanation.contributions == pytest.approx(expected, abs=1e-6)


def test_what_cannot_be_explained_is_refused(run_head: HaltHead) -> None:
    unknown = features_of(1)
    unknown[RUN] = np.nan
    with pytest.raises(InputError, match="features: log_run is nan, expected a finite number"):
        explain(run_head, unknown)
    with pytest.raises(InputError, match="reference: log_run is nan"):
        explain(run_head, features_of(1), reference=unknown)
    with pytest.raises(InputError, match=r"features: found shape \(1, 7\), expected \(7,\)"):
        explain(run_head, features_of(1)[None])
    for price in (0.0, np.inf, np.nan):
        with pytest.raises(InputError, match="price is"):
            explain(run_head, features_of(1), price)
    steep = with_weights(run_head, w0=1e14 * run_head.weights["w0"])
    with pytest.raises(InputError, match="too steep to explain"):
        explain(steep, features_of(4), 1.0, features_of(1))
