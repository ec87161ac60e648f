"""The agent learns, starts from traces, and is exported as it is."""

import os
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from stable_baselines3.common.logger import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.balance import balance
from agents.checkpoint import restore_agent, save_agent
from agents.fit import CHECKPOINTS, START_CHECKPOINTS, FitConfig, fit, out_of_fold
from agents.pathwise import PathwiseConfig, start_from_traces
from agents.ppo import (
    Agent,
    HaltLog,
    PPOConfig,
    export,
    log_odds_net,
    make_ppo,
    set_log_odds,
    take_up,
)
from agents.vec_env import BalancedVecEnv
from envs.replay import ReplayEnv, point_features
from envs.reward import halt_costs, never_costs
from evaluation.outcome import halt_outcome, never_outcome
from evaluation.protocol import folds
from haltwise import HaltHead, Halting, HeadConfig, InputError
from haltwise.session.stream import check_served
from policies.observing import observing_of
from tests.heads import random_head
from traces import Traces
from train import TrainConfig

GROUPS = ("pace", "confidence", "agreement")
HALTING = Halting("always", "every 50 tokens", "</think>", "source")
PPO = PPOConfig(total_timesteps=4096, num_envs=64, n_steps=16, batch_size=256, net_width=16)
NONE = PathwiseConfig(steps=0)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def head_of(traces: Traces) -> HeadConfig:
    observing = observing_of(traces, GROUPS, HALTING)
    return HeadConfig(observing, HALTING, default_price=observing.price_range[0])


def mean_return(traces: Traces, halts: np.ndarray, price: float) -> float:
    outcome = halt_outcome(traces, halts, "always")
    return float((outcome.em - price * outcome.cost / 1000).mean())


@pytest.fixture
def telling_traces(make_traces) -> Traces:  # type: ignore[no-untyped-def]
    """Answers become right at a random point, and confidence tells: hindsight can be reached."""
    rng = np.random.default_rng(1)
    changes = []
    for n in range(80):
        first = int(rng.integers(0, 6))
        right = [i >= first for i in range(8)]
        changes.append(
            {
                "question_id": f"q{n % 40}",
                "num_tokens": 900,
                "position": list(range(100, 900, 100)),
                "probe_tokens": [2] * 8,
                "answer": ["7" if r else str(i) for i, r in enumerate(right)],
                "correct": right,
                "confidence": [0.9 if r else 0.6 for r in right],
                "answer_logprobs": [[]] * 8,
            }
        )
    return make_traces(changes)  # type: ignore[no-any-return]


@pytest.mark.whole
def test_it_learns_to_halt_when_the_answer_is_there(telling_traces: Traces) -> None:
    config = FitConfig(NONE, replace(PPO, total_timesteps=40_000, learning_rate=3e-3))
    head_config = head_of(telling_traces)
    head = export(fit(telling_traces, head_config, config, seed=0), head_config)
    halts = head.halts(point_features(telling_traces, GROUPS), 0.3)
    best = mean_return(telling_traces, telling_traces.correct, 0.3)
    never = never_outcome(telling_traces)
    full = float((never.em - 0.3 * never.cost / 1000).mean())
    reached = mean_return(telling_traces, halts, 0.3)
    assert reached - full > 0.9 * (best - full) > 0.05


def test_the_flags_of_the_guide_leave_a_head_at_its_start_which_servers_take(
    random_traces: Traces,
) -> None:
    told = (Path(__file__).parents[2] / "docs/YOUR_LM.md").read_text()
    (flags,) = re.findall("`(--fit.pathwise.steps 0 [^`]+)`", told)
    config = tyro.cli(TrainConfig, args=shlex.split(flags))
    assert config.groups is not None
    observing = observing_of(random_traces, config.groups, HALTING)
    head = HeadConfig(observing, HALTING, default_price=1.0)
    learned = fit(random_traces, head, config.fit, seed=0)
    assert learned.num_timesteps > 1  # a rollout is played all the same
    env = ReplayEnv(random_traces, observing, HALTING, config.fit.ppo.num_envs)
    mean_points = random_traces.num_points / len(random_traces)
    start = make_ppo(env, observing, config.fit.ppo, mean_points=mean_points, seed=0)
    begun, left = export(start, head), export(learned, head)
    for name, weights in begun.weights.items():
        np.testing.assert_allclose(left.weights[name], weights, atol=1e-6)
    check_served(left)


def test_few_traces_are_soon_learned(make_traces: Callable[..., Traces]) -> None:
    traces = make_traces([{"trace_id": f"t{n}", "question_id": f"q{n}"} for n in range(4)])
    config = FitConfig(NONE, replace(PPO, total_timesteps=10**6))
    # 12 points, 100 times each, and whole rollouts.
    rollout = PPO.n_steps * PPO.num_envs
    assert fit(traces, head_of(traces), config, seed=0).num_timesteps < 1_200 + rollout


def test_curves_do_not_mix_prices() -> None:
    log = HaltLog()
    log.model = SimpleNamespace(logger=Logger(None, []))  # type: ignore[assignment]
    prices = (0.1, 0.2, 0.3, 10.0, 20.0, 30.0)
    log.locals = {
        "infos": [
            {}, *({"halt": {"price": p, "em": p > 1, "cost": 100 / p, "halted": True},
                   "episode": {"r": -p}} for p in prices)
        ]
    }  # fmt: skip
    log._on_step()
    log._on_rollout_end()
    told = log.logger.name_to_value
    assert [told[f"halt/em_{which}_price"] for which in ("low", "middle", "high")] == [0, 0.5, 1]
    assert told["halt/tokens_low_price"] == pytest.approx((1000 + 500) / 2)
    assert len(told) == 12


def test_the_start_alone_reaches_it_too(telling_traces: Traces) -> None:
    head_config = head_of(telling_traces)
    env = ReplayEnv(telling_traces, head_config.observing, HALTING, PPO.num_envs)
    ppo = make_ppo(env, head_config.observing, PPO, mean_points=8, seed=0)
    net = log_odds_net(ppo)
    # Few questions would leave it near to the rule that it starts as.
    pathwise = PathwiseConfig(prior_questions=100)
    start_from_traces(net, telling_traces, head_config.observing, HALTING, pathwise, seed=0)
    set_log_odds(ppo, net)
    halts = export(ppo, head_config).halts(point_features(telling_traces, GROUPS), 0.3)
    best = mean_return(telling_traces, telling_traces.correct, 0.3)
    assert mean_return(telling_traces, halts, 0.3) > best - 0.02


def test_held_out_questions_end_the_start_when_it_gains_no_more(
    telling_traces: Traces, tmp_path: Path
) -> None:
    head_config = head_of(telling_traces)
    config = FitConfig(PathwiseConfig(steps=2000, held_out=0.25, prior_questions=100), PPO)
    ppo = fit(telling_traces, head_config, config, seed=0, share=0, log_dir=tmp_path)
    halts = export(ppo, head_config).halts(point_features(telling_traces, GROUPS), 0.3)
    best = mean_return(telling_traces, telling_traces.correct, 0.3)
    assert mean_return(telling_traces, halts, 0.3) > best - 0.02
    told = EventAccumulator(str(tmp_path / "start")).Reload()
    curve = told.Scalars("start/held_out_return")
    assert [point.step for point in curve] == list(range(20, 20 * len(curve) + 1, 20))
    assert len(curve) > 1 and curve[-1].step < 1000


@pytest.mark.parametrize(
    ("share", "message"), [(0.01, "of 40 questions, expected"), (0.99, "of 40")]
)
def test_questions_are_left_to_learn_from_and_to_judge_by(
    share: float, message: str, telling_traces: Traces
) -> None:
    config = FitConfig(PathwiseConfig(held_out=share), PPO)
    with pytest.raises(InputError, match=message):
        fit(telling_traces, head_of(telling_traces), config, seed=0)
    config = FitConfig(PathwiseConfig(held_out=0.5), PPO)
    parts = [telling_traces, telling_traces]
    with pytest.raises(InputError, match="the traces come in 2 chunks"):
        fit(parts, head_of(telling_traces), config, seed=0)


def test_the_expected_return_is_that_of_the_halting_distribution(random_traces: Traces) -> None:
    from agents.pathwise import Batch, expected_return, lay_out

    head_config = head_of(random_traces)
    env = ReplayEnv(random_traces, head_config.observing, HALTING, 4)
    net = log_odds_net(make_ppo(env, head_config.observing, PPO, mean_points=4, seed=0))
    with_points = np.flatnonzero(np.diff(random_traces.offsets))
    price = np.geomspace(0.5, 5, len(with_points))
    rows = torch.arange(len(with_points))
    returns = lay_out(random_traces, head_config.observing, HALTING)
    batch = Batch.of(returns, rows, price, head_config.observing)
    found = expected_return(net(batch.obs)[:, 0], batch).detach().numpy()
    final = random_traces.final_correct[random_traces.trace_of_point]
    assert (batch.correct.numpy() == np.stack([random_traces.correct, final], 1)).all()
    features = point_features(random_traces, GROUPS)
    costs, never = halt_costs(random_traces, "always"), never_costs(random_traces, "always")
    for k, n in enumerate(with_points):
        reached, expected = 1.0, 0.0
        for at in range(random_traces.offsets[n], random_traces.offsets[n + 1]):
            obs = head_config.observing.observe(features[at : at + 1], price[k])
            hazard = torch.sigmoid(net(torch.from_numpy(obs))).item()
            gained = random_traces.correct[at] - price[k] * costs[at] / 1000
            expected, reached = expected + reached * hazard * gained, reached * (1 - hazard)
        expected += reached * (random_traces.final_correct[n] - price[k] * never[n] / 1000)
        assert found[k] == pytest.approx(expected, abs=1e-4)


def test_the_exported_head_is_the_policy(random_traces: Traces) -> None:
    head_config = head_of(random_traces)
    ppo = fit(random_traces, head_config, FitConfig(NONE, PPO), seed=0)
    head = export(ppo, head_config)
    obs = np.random.default_rng(0).normal(size=(50, head_config.observing.size)).astype(np.float32)
    _, log_prob, _ = ppo.policy.evaluate_actions(torch.from_numpy(obs), torch.ones(len(obs)))
    prob_halt = 1 / (1 + np.exp(-head.log_odds_of(obs)))
    assert prob_halt == pytest.approx(log_prob.exp().detach().numpy(), abs=1e-5)


@pytest.mark.parametrize("is_straight", [True, False])
def test_an_agent_takes_up_a_head_as_it_is(is_straight: bool, random_traces: Traces) -> None:
    config = head_of(random_traces)
    found = random_head(0, GROUPS, num_hidden=PPO.net_width)
    rng, size = np.random.default_rng(0), config.observing.size
    path = {"w2": np.hstack([found.weights["w2"], rng.normal(size=(1, size))]).astype(np.float32)}
    head = HaltHead(config, found.weights | (path if is_straight else {}))
    env = ReplayEnv(random_traces, config.observing, HALTING, PPO.num_envs)
    ppo = make_ppo(env, config.observing, PPO, mean_points=8, seed=0)
    take_up(ppo, head)
    features = point_features(random_traces, GROUPS)
    expected = head.log_odds(features, 1.0)
    np.testing.assert_allclose(export(ppo, config).log_odds(features, 1.0), expected, atol=1e-4)
    with pytest.raises(InputError, match="head with 8 units"):
        take_up(ppo, random_head(0, GROUPS, num_hidden=8))


def test_a_child_stays_as_near_to_its_parent_as_the_prior_says(telling_traces: Traces) -> None:
    config, moved = head_of(telling_traces), []
    parent = export(fit(telling_traces, config, FitConfig(NONE, PPO), seed=1, share=0), config)
    for prior in (0.0, 100.0, 1e9):
        start = FitConfig(PathwiseConfig(steps=30, parent_questions=prior), PPO)
        child = export(fit(telling_traces, config, start, 0, parent=parent, share=0), config)
        away = [np.abs(child.weights[name] - parent.weights[name]).max() for name in child.weights]
        moved.append(max(away))
    assert moved[0] > moved[1] > moved[2] and moved[2] < 0.02


def test_a_fresh_agent_halts_about_once_a_trace(random_traces: Traces) -> None:
    head_config = head_of(random_traces)
    env = ReplayEnv(random_traces, head_config.observing, HALTING, 4)
    for mean_points in (4, 64):
        ppo = make_ppo(env, head_config.observing, PPO, mean_points=mean_points, seed=0)
        middle = np.sqrt(np.prod(head_config.observing.price_range))
        obs = head_config.observing.observe(point_features(random_traces, GROUPS), middle)
        odds = np.exp(export(ppo, head_config).log_odds_of(obs).mean())
        assert odds == pytest.approx(1 / mean_points, rel=0.3)


def test_rewards_are_weighed_by_price_and_reported_as_they_are(worked_example: Traces) -> None:
    observing = observing_of(worked_example, GROUPS, HALTING)
    env = BalancedVecEnv(ReplayEnv(worked_example, observing, HALTING, 1, price=0.5), observing)
    env.reset()
    env.step(np.array([0]))
    _, rewards, _, infos = env.step(np.array([1]))
    weight = balance(np.array([0.5]), observing)[0]
    assert weight == pytest.approx(1 / (0.1 + 2 * 0.5 / (4 / 0.6)))
    assert rewards[0] == pytest.approx(weight * (1 - 0.081))
    assert infos[0]["episode"]["r"] == pytest.approx(0.864) and infos[0]["episode"]["l"] == 2
    assert infos[0]["halt"]["cost"] == 272


def test_a_seed_repeats_the_training(random_traces: Traces) -> None:
    heads = [
        export(
            fit(random_traces, head_of(random_traces), FitConfig(PathwiseConfig(5), PPO), seed=3),
            head_of(random_traces),
        )
        for _ in range(2)
    ]
    assert all((heads[0].weights[k] == heads[1].weights[k]).all() for k in heads[0].weights)


def test_an_interrupted_training_goes_on(random_traces: Traces, tmp_path: Path) -> None:
    head_config, checkpoint = head_of(random_traces), tmp_path / "agent.safetensors"
    half = FitConfig(NONE, replace(PPO, total_timesteps=2048))
    fit(random_traces, head_config, half, seed=0, checkpoint=checkpoint)
    whole = fit(random_traces, head_config, FitConfig(NONE, PPO), seed=0, checkpoint=checkpoint)
    assert whole.num_timesteps == 4096
    again = fit(random_traces, head_config, FitConfig(NONE, PPO), seed=0, checkpoint=checkpoint)
    same = zip(whole.policy.parameters(), again.policy.parameters(), strict=True)
    assert all(bool((a == b).all()) for a, b in same)


def test_an_agent_is_restored_from_tensors_alone(random_traces: Traces, tmp_path: Path) -> None:
    head_config, path = head_of(random_traces), tmp_path / "agent.safetensors"
    trained = fit(random_traces, head_config, FitConfig(NONE, PPO), seed=0)
    save_agent(trained, path)
    env = ReplayEnv(random_traces, head_config.observing, HALTING, PPO.num_envs)
    fresh = make_ppo(env, head_config.observing, PPO, mean_points=4, seed=1)
    restore_agent(fresh, path)
    assert fresh.num_timesteps == trained.num_timesteps
    adam, expected = (agent.policy.optimizer.state_dict()["state"] for agent in (fresh, trained))
    weights, known = fresh.policy.state_dict(), trained.policy.state_dict()
    for mine, theirs in ((weights, known), *((adam[i], expected[i]) for i in expected)):
        assert mine.keys() == theirs.keys()
        assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    trained.save(tmp_path / "agent.zip")  # pickled in part
    for damaged in (tmp_path / "agent.zip", tmp_path / "none"):
        with pytest.raises(InputError, match="no agent to go on from"):
            restore_agent(fresh, damaged)
    other = make_ppo(env, head_config.observing, replace(PPO, net_width=8), mean_points=4, seed=1)
    with pytest.raises(InputError, match="no agent to go on from: Error"):
        restore_agent(other, path)


@pytest.mark.whole
def test_out_of_fold_decisions_come_from_the_other_folds(
    random_traces: Traces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # in processes, as on most machines
    head_config = head_of(random_traces)
    config = FitConfig(PathwiseConfig(5), replace(PPO, total_timesteps=1024))
    fold = {seed: folds(random_traces.question_id, 2, seed) for seed in (0, 1)}
    prices = [0.5, 2.0]
    decided = out_of_fold(random_traces, fold, head_config, config, prices, tmp_path)
    assert decided[0].shape == (len(CHECKPOINTS), 2, random_traces.num_points)
    train = random_traces.select(fold[1] != 0)
    observing = replace(
        observing_of(train, GROUPS, HALTING), price_range=head_config.observing.price_range
    )
    own = HeadConfig(observing, HALTING, 1.0)
    held_out = fold[1][random_traces.trace_of_point] == 0
    features = point_features(random_traces, GROUPS)[held_out]
    for share in (0.0, 1.0):
        head = export(fit(train, own, config, seed=1, share=share), own)
        expected = np.stack([head.halts(features, price) for price in prices])
        assert (decided[1][CHECKPOINTS.index(share)][:, held_out] == expected).all()
    starting = decided.starting(1)
    assert starting.shape == (
        len(START_CHECKPOINTS),
        1,
        random_traces.num_points,
    )  # at every tenth price
    seen: list[HaltHead] = []
    fit(train, own, config, seed=1, share=0.0, starting=lambda ppo: seen.append(export(ppo, own)))
    expected = np.stack([[head.halts(features, prices[0])] for head in seen])
    assert (starting[:, :, held_out] == expected).all()


def test_a_start_is_tried_on_its_way_and_is_the_same(random_traces: Traces) -> None:
    head_config = head_of(random_traces)
    seen: list[HaltHead] = []

    def see(ppo: Agent) -> None:
        seen.append(export(ppo, head_config))

    def started(steps: int, **more: Any) -> HaltHead:
        config = FitConfig(PathwiseConfig(steps), PPO)
        return export(fit(random_traces, head_config, config, 0, share=0.0, **more), head_config)

    plain, tried = started(20), started(20, starting=see)
    assert all((plain.weights[name] == tried.weights[name]).all() for name in plain.weights)
    assert len(seen) == len(START_CHECKPOINTS)
    moved = [abs(head.weights["w0"] - seen[0].weights["w0"]).sum() for head in (*seen, tried)]
    assert moved[0] == 0 and moved == sorted(set(moved))
    # Before the first step it is what PPO alone would begin with.
    assert all((seen[0].weights[n] == started(0).weights[n]).all() for n in plain.weights)


def test_checkpoints_are_passed_in_order_and_the_one_taken_ends_it(random_traces: Traces) -> None:
    head_config = head_of(random_traces)
    seen: list[int] = []
    config = FitConfig(NONE, PPO)

    def reached(ppo: Agent) -> None:
        seen.append(ppo.num_timesteps)

    whole = fit(random_traces, head_config, config, seed=0, reached=reached)
    assert seen == [0, 1024, 2048, 4096] and whole.num_timesteps == 4096
    for share, num in zip(CHECKPOINTS, seen, strict=True):
        part = fit(random_traces, head_config, config, seed=0, share=share)
        # A step of all episodes may be begun, but nothing is learned from it.
        assert num <= part.num_timesteps <= num + PPO.num_envs
