"""The agent: stable-baselines3's PPO on a batched halting environment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule
from torch import nn

from agents.network import HaltingPolicy, LogOdds, evidence_of
from agents.vec_env import BalancedVecEnv
from envs.batched import BatchedEnv
from haltwise import HaltHead, HeadConfig, InputError, Observing
from haltwise.errors import check_ranges

#: An agent is what PPO trains; `export` makes a head of it.
Agent = PPO


@dataclass(frozen=True)
class PPOConfig:
    """stable-baselines3's hyper-parameters, under its names."""

    total_timesteps: int = 400_000
    """Decisions in the whole training."""
    num_envs: int = 1024
    """Episodes that are played at once."""
    learning_rate: float = 2e-4
    """Adam's learning rate at the start; it falls linearly to a tenth of that."""
    n_steps: int = 32
    """Decisions that each of the num_envs makes in a rollout, between two updates."""
    batch_size: int = 4096
    """Decisions in a gradient step."""
    n_epochs: int = 5
    """Passes of an update over its rollout."""
    gae_lambda: float = 0.98
    """Lambda of generalised advantage estimation; near 1 suits long episodes."""
    clip_range: float = 0.2
    """How far the ratio of the new policy to the old one may be from 1 before it is clipped."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus in the loss."""
    vf_coef: float = 0.5
    """Weight of the value loss in the loss."""
    target_kl: float | None = 0.02
    """KL divergence from the old policy at which an update ends early; None never ends it."""
    net_width: int = 64
    """Units in each of the two hidden layers of the policy, and in each of the value's."""

    def check(self, place: str) -> None:
        """Checks the settings before any work.

        Args:
            place: Where they stand among a command's settings, such as "fit.ppo.".

        Raises:
            InputError: If stable-baselines3 cannot train with one of them.
        """
        least = {"total_timesteps": 1, "num_envs": 1, "n_steps": 1, "batch_size": 2}
        least |= {"n_epochs": 1, "net_width": 1}
        ranges = {name: (getattr(self, name) >= n, f"at least {n}") for name, n in least.items()}
        for name in ("learning_rate", "clip_range"):
            ranges[name] = (0 < getattr(self, name) < math.inf, "positive and finite")
        for name in ("ent_coef", "vf_coef"):
            ranges[name] = (0 <= getattr(self, name) < math.inf, "0 or more, and finite")
        kl = self.target_kl
        ranges["target_kl"] = (kl is None or 0 < kl < math.inf, "positive and finite")
        ranges["gae_lambda"] = (0 <= self.gae_lambda <= 1, "between 0 and 1")
        check_ranges(self, ranges, place)


def make_ppo(
    env: BatchedEnv,
    observing: Observing,
    config: PPOConfig,
    *,
    mean_points: float,
    seed: int,
    log_dir: Path | None = None,
) -> Agent:
    """Returns an untrained agent that starts from the evidence, halting about once a trace.

    From the default initialisation the probability of halting is a half at every point: a long
    episode is never seen past its first points, and training collapses to halting at once. A
    bias of -log(mean points) on the log-odds is the cure.

    Args:
        env: A batched environment that restarts episodes in the same step.
        observing: The environment's observing; its price range makes every price count alike.
        config: The hyper-parameters; `config.num_envs` must be the environment's.
        mean_points: The mean number of decision points in a trace.
        seed: The seed of the initialisation, the actions and the environment.
        log_dir: The folder that TensorBoard's files go to; None writes none.
    """
    ppo = PPO(
        HaltingPolicy,
        BalancedVecEnv(env, observing, seed=seed),
        learning_rate=LinearSchedule(config.learning_rate, 0.1 * config.learning_rate, 1.0),
        n_steps=config.n_steps,
        batch_size=config.batch_size,
        n_epochs=config.n_epochs,
        gamma=1.0,
        gae_lambda=config.gae_lambda,
        clip_range=config.clip_range,
        ent_coef=config.ent_coef,
        vf_coef=config.vf_coef,
        target_kl=config.target_kl,
        policy_kwargs={"net_arch": [config.net_width, config.net_width]},
        tensorboard_log=str(log_dir) if log_dir else None,
        seed=seed,
        # A network this small is slower on a GPU than on a CPU.
        device="cpu",
    )
    net = log_odds_net(ppo)
    with torch.no_grad():
        net.out.bias.fill_(-math.log(max(mean_points, 2.0)))
        net.straight.weight.copy_(evidence_of(observing)[None])
    set_log_odds(ppo, net)
    return ppo


def log_odds_net(ppo: Agent) -> LogOdds:
    """Returns the policy as one network from observations (.., F + 1) to log-odds of halting.

    It shares its hidden layers with the agent. Its output layers (.., 1) are new ones: the
    difference of the two action logits.
    """
    first, second, action = _layers(ppo)
    num_hidden = second.out_features
    out = nn.Linear(num_hidden, 1)
    straight = nn.Linear(action.in_features - num_hidden, 1, bias=False)
    with torch.no_grad():
        weight = action.weight[1:] - action.weight[:1]
        out.weight.copy_(weight[:, :num_hidden])
        straight.weight.copy_(weight[:, num_hidden:])
        out.bias.copy_(action.bias[1:] - action.bias[:1])
    return LogOdds(first, second, out, straight)


def set_log_odds(ppo: Agent, net: LogOdds) -> None:
    """Puts the output layers of a network from `log_odds_net` back into the policy.

    The two action logits become (0, log-odds).
    """
    action = _layers(ppo)[2]
    with torch.no_grad():
        weight = torch.cat([net.out.weight, net.straight.weight], dim=1)
        action.weight.copy_(torch.cat([torch.zeros_like(weight), weight]))
        action.bias.copy_(torch.cat([torch.zeros_like(net.out.bias), net.out.bias]))


def take_up(ppo: Agent, head: HaltHead) -> None:
    """Puts the weights of a head into the policy, which then decides as the head does.

    Raises:
        InputError: If the head is of another size.
    """
    first, second, action = _layers(ppo)
    num_hidden, size = head.weights["b0"].size, head.config.observing.size
    if (num_hidden, size) != (first.out_features, first.in_features):
        raise InputError(
            f"head with {num_hidden} units and {size} observations, expected "
            f"{first.out_features} and {first.in_features}"
        )
    net = log_odds_net(ppo)
    weights = {name: torch.from_numpy(value.copy()) for name, value in head.weights.items()}
    out, straight = weights["w2"].split([num_hidden, weights["w2"].shape[1] - num_hidden], dim=1)
    with torch.no_grad():
        for layer, at in ((first, "0"), (second, "1")):
            layer.weight.copy_(weights[f"w{at}"])
            layer.bias.copy_(weights[f"b{at}"])
        net.out.weight.copy_(out)
        net.out.bias.copy_(weights["b2"])
        # Heads without a straight path are older than it.
        net.straight.weight.copy_(
            straight if straight.numel() else torch.zeros_like(action.weight[:1, num_hidden:])
        )
    set_log_odds(ppo, net)


def export(ppo: Agent, config: HeadConfig) -> HaltHead:
    """Returns the policy as a head.

    Its forward pass in numpy equals stable-baselines3's own to 1e-5.
    """
    net = log_odds_net(ppo)
    last = torch.cat([net.out.weight, net.straight.weight], dim=1)
    tensors = {
        "w0": net.first.weight,
        "b0": net.first.bias,
        "w1": net.second.weight,
        "b1": net.second.bias,
        "w2": last,
        "b2": net.out.bias,
    }
    weights = {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}
    return HaltHead(config, weights)


def _layers(ppo: Agent) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """Returns the two hidden layers and the action layer of the policy."""
    first, _, second, _ = ppo.policy.mlp_extractor.policy_net
    return cast(nn.Linear, first), cast(nn.Linear, second), cast(nn.Linear, ppo.policy.action_net)


_THIRDS = ("low", "middle", "high")


class HaltLog(BaseCallback):
    """Logs the episodes that finished in a rollout to TensorBoard, under halt/.

    Logged are the means of their EM (em), cost in tokens (tokens) and return (return), and the
    share of them that was halted (rate): for the third of the episodes with the lowest prices, the
    third in the middle and that with the highest ones, since a mean over all would hide what each
    of them does.
    """

    def __init__(self) -> None:
        """Starts with no finished episode."""
        super().__init__()
        self._finished: list[tuple[float, float, float, float, float]] = []

    def _on_step(self) -> bool:
        """Notes the episodes that end in this step; returns True: the training goes on."""
        for info in self.locals["infos"]:
            if "halt" in info:
                halt = info["halt"]
                self._finished.append(
                    (halt["price"], halt["em"], halt["cost"], info["episode"]["r"], halt["halted"])
                )
        return True

    def _on_rollout_end(self) -> None:
        """Logs the means of the episodes that were noted, and forgets them."""
        cheapest_first = np.array(sorted(self._finished)).reshape(-1, 5)
        for which, episodes in zip(_THIRDS, np.array_split(cheapest_first, 3), strict=True):
            if len(episodes):
                means = episodes[:, 1:].mean(axis=0)
                for name, value in zip(("em", "tokens", "return", "rate"), means, strict=True):
                    self.logger.record(f"halt/{name}_{which}_price", float(value))
        self._finished.clear()
