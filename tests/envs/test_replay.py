from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from envs.replay import ReplayEnv, availability, point_features
from envs.reward import halt_costs, never_costs, reward, step_costs, step_ems
from envs.trace_env import TraceEnv
from haltwise import FEATURE_GROUPS, Halting, InputError, Observing
from haltwise.policy.halting import Probing
from haltwise.policy.signals import Float
from tests.projections import some_projection
from traces import Traces

GROUPS = tuple(FEATURE_GROUPS)
FEW = ("pace", "confidence", "agreement")
PROJECTION = some_projection(20)
RULE = "by chance, at most 7"
PROBINGS: tuple[Probing, ...] = ("always", "at_halt")
# Feature groups of the worked example that can be seen.
SEEN = {"always": FEW, "at_halt": ("pace",)}


def under(probing: Probing, rule: str = RULE) -> Halting:
    return Halting(probing, rule, "</think>", "source")


def observing_of(traces: Traces, groups: tuple[str, ...] = GROUPS) -> Observing:
    projection = PROJECTION if "hidden" in groups else None
    features = point_features(traces, groups, 7, projection)
    return Observing.fit(groups, features, (0.1, 2.0), projection)


def all_features(traces: Traces) -> Float:
    return point_features(traces, GROUPS, 7, PROJECTION)


def play(env: ReplayEnv, actions: list[int]) -> tuple[list[float], dict[str, Any]]:
    env.reset(seed=0)
    rewards = []
    for action in actions:
        _, paid, done, truncated, infos = env.step(np.array([action]))
        rewards.append(float(paid[0]))
        assert not truncated[0]
    assert done[0]
    return rewards, {name: values[0] for name, values in infos["final_info"].items()}


@pytest.mark.parametrize(
    ("probing", "actions", "rewards", "cost"),
    [
        ("always", [1], [-0.055], 110),
        ("always", [0, 1], [-0.055, 1 - 0.081], 272),
        ("always", [0, 0, 1], [-0.055, -0.081, 1 - 0.0805], 433),
        ("always", [0, 0, 0], [-0.055, -0.081, 1 - 0.0805 - 0.100], 633),
        ("at_halt", [1], [-0.055], 110),
        ("at_halt", [0, 1], [-0.05, 1 - 0.081], 262),
        ("at_halt", [0, 0, 1], [-0.05, -0.075, 1 - 0.0805], 411),
        ("at_halt", [0, 0, 0], [-0.05, -0.075, 1 - 0.075 - 0.100], 600),
    ],
)
def test_the_worked_example(
    worked_example: Traces, probing: Probing, actions: list[int], rewards: list[float], cost: int
) -> None:
    env = ReplayEnv(
        worked_example, observing_of(worked_example, SEEN[probing]), under(probing), 1, price=0.5
    )
    paid, final = play(env, actions)
    assert paid == pytest.approx(rewards)
    assert final["cost"] == cost and final["halted"] == (actions[-1] == 1)
    assert sum(paid) == pytest.approx(reward(final["em"], final["cost"], 0.5))


@pytest.mark.parametrize("probing", PROBINGS)
def test_costs_of_steps_add_up_to_costs_of_halting(random_traces: Traces, probing: Probing) -> None:
    costs, halted = step_costs(random_traces, probing), halt_costs(random_traces, probing)
    never = never_costs(random_traces, probing)
    for n in range(len(random_traces)):
        at = np.arange(random_traces.offsets[n], random_traces.offsets[n + 1])
        for k, point in enumerate(at):
            assert costs[at[:k], 0].sum() + costs[point, 1] == halted[point]
        if len(at):
            assert costs[at, 0].sum() == never[n]


def test_ems_are_those_of_the_answer_that_counts(worked_example: Traces) -> None:
    assert step_ems(worked_example).tolist() == [[False, False], [False, True], [True, True]]


@pytest.mark.parametrize("probing", PROBINGS)
def test_returns_are_em_minus_price_times_cost(random_traces: Traces, probing: Probing) -> None:
    env = ReplayEnv(random_traces, observing_of(random_traces, SEEN[probing]), under(probing), 8)
    env.reset(seed=1)
    rng, total = np.random.default_rng(0), np.zeros(8)
    num_done = 0
    for _ in range(200):
        _, rewards, done, _, infos = env.step((rng.random(8) < 0.2).astype(np.int64))
        total += rewards
        if done.any():
            final = infos["final_info"]
            expected = reward(final["em"], final["cost"], final["price"])
            assert total[done] == pytest.approx(expected[done])
            total[done] = 0
            num_done += done.sum()
    assert num_done > 100


def test_every_trace_with_points_is_played_once_a_pass(random_traces: Traces) -> None:
    env = ReplayEnv(random_traces, observing_of(random_traces), under("always"), 1)
    env.reset(seed=3)
    playable = np.flatnonzero(np.diff(random_traces.offsets))
    seen = [int(env.step(np.array([1]))[4]["final_info"]["trace"][0]) for _ in range(len(playable))]
    assert sorted(seen) == playable.tolist()


def test_a_seed_repeats_everything(random_traces: Traces) -> None:
    observing = observing_of(random_traces)
    envs = [ReplayEnv(random_traces, observing, under("always"), 4) for _ in range(2)]
    first, second = (env.reset(seed=5)[0] for env in envs)
    assert (first == second).all()
    for _ in range(30):
        (a, ra, *_), (b, rb, *_) = (env.step(np.array([0, 1, 0, 0])) for env in envs)
        assert (a == b).all() and (ra == rb).all()


def test_a_seed_begins_the_same_series_on_the_same_environment(random_traces: Traces) -> None:
    env = ReplayEnv(random_traces, observing_of(random_traces), under("always"), 4)
    series = []
    for seed in (5, 5, None):
        obs, _ = env.reset(seed=seed)
        series.append([obs, *(env.step(np.array([0, 1, 0, 0]))[0] for _ in range(5))])
    assert np.array_equal(series[0], series[1])
    assert not np.array_equal(series[1], series[2])


def test_a_reset_without_a_seed_goes_on_with_the_pass(random_traces: Traces) -> None:
    env = ReplayEnv(random_traces, observing_of(random_traces), under("always"), 5)
    env.reset(seed=3)
    seen = [*env._trace]
    for _ in range(9):
        env.reset()
        seen += [*env._trace]
    assert len(set(seen)) == 50 < len(np.flatnonzero(np.diff(random_traces.offsets)))


def test_other_traces_are_played_from_the_next_reset_on(random_traces: Traces) -> None:
    env = ReplayEnv(random_traces, observing_of(random_traces), under("always"), 2)
    env.reset(seed=0)
    env.load(random_traces.select(np.arange(10)))
    with pytest.raises(InputError, match="step without episodes: expected reset before"):
        env.step(np.array([0, 0]))
    env.reset()
    assert (env._trace < 10).all()


def test_the_last_observation_of_an_episode_is_told(random_traces: Traces) -> None:
    env = ReplayEnv(random_traces, observing_of(random_traces), under("always"), 6)
    before, _ = env.reset(seed=2)
    halts = np.array([0, 1, 0, 0, 1, 0])
    _, _, over, _, infos = env.step(halts)
    assert over[halts == 1].all() and not over.all()
    assert (infos["_final_obs"] == over).all() and (infos["_final_info"] == over).all()
    assert (infos["final_obs"][over] == before[over]).all()
    assert not infos["final_obs"][~over].any()


@pytest.mark.parametrize("price", [None, 0.5])
def test_one_env_plays_the_episodes_of_a_batch(random_traces: Traces, price: float | None) -> None:
    arguments = (random_traces, observing_of(random_traces), under("always"))
    batch, env = ReplayEnv(*arguments, 1, price), TraceEnv(*arguments, price)
    expected, obs = batch.reset(seed=4)[0][0], env.reset(seed=4)[0]
    for action in np.random.default_rng(0).integers(2, size=100):
        np.testing.assert_array_equal(obs, expected)
        last = expected
        (expected,), (reward,), (over,), _, infos = batch.step(np.array([action]))
        obs, value, ended, truncated, info = env.step(action)
        assert (value, ended, truncated) == (reward, over, False)
        assert info == {name: of[0] for name, of in infos.get("final_info", {}).items()}
        if ended:
            np.testing.assert_array_equal(obs, last)
            obs, _ = env.reset()


def test_what_is_told_of_an_episode_that_is_over(worked_example: Traces) -> None:
    env = TraceEnv(worked_example, observing_of(worked_example, FEW), under("always"), price=0.5)
    told = {"price": 0.5, "question_id": "q0", "seed": 0, "trace": 0}
    env.reset(seed=0)
    env.step(np.int64(0))
    assert env.step(np.int64(1))[4] == told | {
        "em": True,
        "cost": 272,
        "halted": True,
        "answer": "7",
        "num_points": 2,
        "position": 250,
    }
    env.reset(options={"price": 2.0})
    *_, (_, value, over, _, info) = (env.step(np.int64(0)) for _ in range(3))
    assert over and value == pytest.approx(1 - 2 * (0.161 + 0.200))
    assert info == told | {
        "price": 2.0,
        "em": True,
        "cost": 633,
        "halted": False,
        "answer": None,
        "num_points": 3,
        "position": 400,
    }


def test_features_of_answers_that_nobody_paid_for_are_refused(random_traces: Traces) -> None:
    with pytest.raises(
        InputError, match=r"shows no forced answer: .* no feature group confidence, agreement"
    ):
        ReplayEnv(random_traces, observing_of(random_traces, FEW), under("at_halt"), 2)


def test_observations_are_features_and_price(random_traces: Traces) -> None:
    observing = observing_of(random_traces)
    env = ReplayEnv(random_traces, observing, under("always"), 16)
    obs, _ = env.reset(seed=0)
    assert obs.dtype == np.float32
    assert env.observation_space.contains(obs)
    features = all_features(random_traces)
    at = random_traces.offsets[env._trace]
    assert (obs == observing.observe(features[at], env.price)).all()


def test_features_do_not_see_what_a_policy_must_not_know(random_traces: Traces) -> None:
    rng = np.random.default_rng(0)
    num, points = len(random_traces), random_traces.num_points
    names = np.array([f"x{n}" for n in rng.permutation(num)])
    scrambled = replace(
        random_traces,
        trace_id=names,
        question_id=names,
        task=names,
        segment=names,
        model=names,
        split=names,
        seed=rng.integers(99, size=num),
        num_tokens=random_traces.num_tokens + rng.integers(1, 999, num),
        finished=rng.random(num) < 0.5,
        final_correct=rng.random(num) < 0.5,
        correct=rng.random(points) < 0.5,
    )
    features = all_features(random_traces)
    assert (all_features(scrambled) == features).all()


def test_features_are_causal(random_traces: Traces) -> None:
    last = random_traces.offsets[1:][np.diff(random_traces.offsets) > 0] - 1
    answer, confidence = random_traces.answer.copy(), random_traces.confidence.copy()
    answer[last], confidence[last] = "later", 0.123
    states = random_traces.signals["hidden"].copy()
    states[last] += 1
    signals = random_traces.signals | {"hidden": states}
    changed = replace(random_traces, answer=answer, confidence=confidence, signals=signals)
    before = np.setdiff1d(np.arange(random_traces.num_points), last)
    same = all_features(changed) == all_features(random_traces)
    assert same[before].all() and not same[last].all(axis=1).any()


def test_a_missing_value_is_that_of_its_point_alone(make_traces: Callable[..., Traces]) -> None:
    traces = make_traces([{"confidence": [0.5, np.nan, 0.5]}])
    known = np.isfinite(point_features(traces, FEW)).all(axis=1)
    assert known.tolist() == [True, False, True]
    found = availability(traces, under("always", "any"))
    assert found.groups == ("pace", "confidence", "tokens", "agreement")
    assert found.gaps[0] == (
        "column 'confidence' is unknown at 1 of 3 points, first at point 2 of trace 't0': there a "
        "head that reads it goes on"
    )
    # Two of three are too many.
    found = availability(make_traces([{"confidence": [0.5, np.nan, np.nan]}]), under("always"))
    assert "confidence" not in found.groups
    assert found.left_out["confidence"].startswith("column 'confidence' is unknown at 2 of 3")


def test_where_a_signal_is_unknown_the_lm_goes_on(make_traces: Callable[..., Traces]) -> None:
    traces = make_traces([{"confidence": [0.5, np.nan, 0.5]}])
    observing = Observing(FEW, (0.0,) * 15, (1.0,) * 15, (0.1, 1.0))
    one = TraceEnv(traces, observing, under("always"), price=1.0)
    many = ReplayEnv(traces, observing, under("always"), 1, price=1.0)
    one.reset(seed=0)
    many.reset(seed=0)
    for halts, cost in ((0, 110), (1, 162), (1, 161)):
        obs, value, over, _, _ = one.step(np.int64(halts))
        batch, values, all_over, _, _ = many.step(np.array([halts]))
        assert np.isfinite(obs).all() and np.isfinite(batch).all()
        assert over == all_over[0] == (cost == 161)
        assert value == values[0] == pytest.approx((cost == 161) - cost / 1000)


@pytest.mark.parametrize(
    ("group", "column"),
    [
        ("limit", "points_left"),
        ("tokens", "answer_logprobs"),
        ("distribution", "entropy"),
        ("ending", "end_think_logprob"),
        ("reflection", "num_reflections"),
        ("hidden", "hidden"),
    ],
)
def test_a_column_that_a_group_needs_is_named(
    worked_example: Traces, group: str, column: str
) -> None:
    worked_example.worst_logprob[:] = np.nan
    with pytest.raises(InputError, match=f"column '{column}'"):
        projection = PROJECTION if group == "hidden" else None
        point_features(worked_example, (group,), projection=projection)


def test_more_points_than_the_rule_allows_are_refused(worked_example: Traces) -> None:
    with pytest.raises(InputError, match="3 decision points: expected at most 2"):
        point_features(worked_example, ("pace",), 2)


def test_the_points_that_are_left_follow_from_the_rule(worked_example: Traces) -> None:
    features = point_features(worked_example, ("limit",), 3)
    assert features[:, 0].tolist() == [0, 0, 1]
    assert features[:, 1] == pytest.approx(np.log([3, 2, 1]))


def test_groups_of_a_file_are_those_whose_signals_it_has(
    worked_example: Traces, random_traces: Traces, make_traces: Callable[..., Traces]
) -> None:
    assert availability(random_traces, under("always")).groups == GROUPS
    seen = ("confidence", "tokens", "agreement")
    assert availability(worked_example, under("always", "any")).groups == ("pace", *seen)
    assert availability(worked_example, under("always")).groups == ("pace", "limit", *seen)
    at_halt = ("pace", "limit", "distribution", "ending", "reflection", "hidden")
    assert availability(random_traces, under("at_halt")).groups == at_halt
    unsure = make_traces([{"confidence": [np.nan] * 3, "answer_logprobs": [[-1.0]] * 3}])
    assert availability(unsure, under("always", "any")).groups == ("pace", "tokens", "agreement")


def test_traces_without_points_are_refused(make_traces: Callable[..., Traces]) -> None:
    columns = ("position", "probe_tokens", "answer", "correct", "confidence", "answer_logprobs")
    empty: dict[str, list[Any]] = {column: [] for column in columns}
    traces = make_traces([empty])
    observing = Observing(("pace",), (0.0,) * 3, (1.0,) * 3, (0.1, 1.0))
    with pytest.raises(InputError, match="no trace has a decision point"):
        ReplayEnv(traces, observing, under("always"), 2)
