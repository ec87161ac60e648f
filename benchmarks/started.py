"""A head that has learned from traces by the exact gradient alone, as PPO would find it."""

from __future__ import annotations

from collections.abc import Sequence

from agents.pathwise import PathwiseConfig, start_from_traces
from agents.ppo import PPOConfig, export, log_odds_net, make_ppo, set_log_odds
from envs.replay import ReplayEnv, availability
from haltwise import HaltHead, Halting, HeadConfig
from policies.observing import observing_of
from traces import Traces


def started_head(
    learns: Traces, pathwise: PathwiseConfig, seed: int, groups: Sequence[str] = ()
) -> tuple[HaltHead, int]:
    """Learns from traces.

    Args:
        learns: The traces.
        pathwise: How it learns.
        seed: The seed of what it begins as, and of its prices.
        groups: The groups of features that it sees; none for all that the traces have.

    Returns:
        The head, and the number of gradient steps.
    """
    halting = Halting.of_recorder(learns.recorder, None)
    seen = tuple(groups) or availability(learns, halting).groups
    observing = observing_of(learns, seen, halting)
    env = ReplayEnv(learns, observing, halting, 1)
    mean_points = learns.num_points / len(learns)
    ppo = make_ppo(env, observing, PPOConfig(num_envs=1), mean_points=mean_points, seed=seed)
    net = log_odds_net(ppo)
    num_steps = start_from_traces(net, learns, observing, halting, pathwise, seed)
    set_log_odds(ppo, net)
    return export(ppo, HeadConfig(observing, halting, default_price=0.0)), num_steps
