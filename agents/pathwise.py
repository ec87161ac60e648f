"""A start for PPO: the exact gradient of the expected return on recorded traces.

A trace holds the return of every halting time, so the expected return of a stochastic halting
policy needs no sampling. With hazards h_t = sigmoid(z_t) and survival S_t = prod_{s<t} (1 - h_s),

    J = sum_t S_t h_t R_t + S_T R_never

is differentiated directly (the relaxation of Reppen, Soner and Tissot-Daguette, "Neural Optimal
Stopping Boundary"; the same product of hazards as in Becker, Cheridito and Jentzen, "Deep Optimal
Stopping", JMLR 20, 2019).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from agents.balance import balance
from envs.replay import point_features
from envs.reward import halt_costs, never_costs
from haltwise import InputError, Observing
from haltwise.halting import Probing
from traces import Traces


@dataclass(frozen=True)
class PathwiseConfig:
    """How the exact gradient is followed before PPO."""

    steps: int = 600
    """Gradient steps; 0 leaves PPO to start from its own initialisation."""
    batch_size: int = 2048
    """Traces a step, each at a price of its own."""
    learning_rate: float = 3e-3
    """Peak of the one-cycle schedule."""
    weight_decay: float = 1e-3
    """Of AdamW."""


@dataclass(frozen=True)
class _Returns:
    """All that decides the return of N traces with up to T points, padded; on the CPU."""

    obs: Tensor  # (N, T, F + 1)
    real: Tensor  # (N, T) whether the point exists
    em: Tensor  # (N, T + 1), the last column: never halted
    cost: Tensor  # (N, T + 1), in thousand tokens


def start_from_traces(
    policy_net: nn.Sequential,
    traces: Traces,
    observing: Observing,
    probing: Probing,
    config: PathwiseConfig,
    seed: int,
) -> None:
    """Trains a network in place to halt recorded traces well at every price of the range.

    Args:
        policy_net: Observations (.., F + 1) to log-odds of halting (.., 1).
        traces: To learn from.
        observing: How features become observations; prices are drawn from its range.
        probing: See `haltwise.Halting`.
        config: Schedule.
        seed: Of the batches and prices.

    Raises:
        InputError: If no trace has a decision point.
    """
    returns = _lay_out(traces, observing, probing)
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(
        policy_net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps
    )
    for _ in range(config.steps):
        rows = torch.from_numpy(rng.integers(len(returns.em), size=config.batch_size))
        price = observing.draw_price(rng, config.batch_size)
        weight = torch.from_numpy(balance(price, observing)).float()
        expected = _expected_return(policy_net, returns, rows, price, observing)
        loss = -(expected * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _expected_return(
    policy_net: nn.Sequential,
    returns: _Returns,
    rows: Tensor,
    price: NDArray[np.float64],
    observing: Observing,
) -> Tensor:
    """Expected return (B,) of some traces at prices (B,)."""
    longest = int(returns.real[rows].sum(dim=1).max())
    real = returns.real[rows, :longest]
    dial = torch.from_numpy(observing.dial(price))[:, None].expand(-1, longest)
    obs = returns.obs[rows, :longest][real]
    obs[:, -1] = dial[real]
    # A point that does not exist is continued past.
    log_odds = obs.new_full(real.shape, -30.0)
    log_odds[real] = policy_net(obs)[:, 0]
    log_halt, log_continue = logsigmoid(log_odds), logsigmoid(-log_odds)
    survival = torch.cumsum(log_continue, dim=1)
    reached = survival - log_continue
    prob = torch.cat([torch.exp(reached + log_halt), torch.exp(survival[:, -1:])], dim=1)
    columns = [*range(longest), -1]
    cost = returns.cost[rows][:, columns] * torch.from_numpy(price).float()[:, None]
    return (prob * (returns.em[rows][:, columns] - cost)).sum(dim=1)


def _lay_out(traces: Traces, observing: Observing, probing: Probing) -> _Returns:
    lengths = np.diff(traces.offsets)
    if not lengths.any():
        raise InputError("no trace has a decision point: there is nothing to decide")
    traces = traces.select(lengths > 0)
    lengths = lengths[lengths > 0]
    num, longest = len(traces), int(lengths.max())
    at = (
        traces.trace_of_point,
        np.arange(traces.num_points) - np.repeat(traces.offsets[:-1], lengths),
    )
    obs = np.zeros((num, longest, observing.size), dtype=np.float32)
    obs[at] = observing.observe(point_features(traces, observing.groups), 1.0)
    real = np.zeros((num, longest), dtype=bool)
    real[at] = True
    em = np.zeros((num, longest + 1), dtype=np.float32)
    em[at] = traces.correct
    em[:, -1] = traces.final_correct
    cost = np.zeros((num, longest + 1), dtype=np.float32)
    cost[at] = halt_costs(traces, probing) / 1000
    cost[:, -1] = never_costs(traces, probing) / 1000
    return _Returns(*map(torch.from_numpy, (obs, real, em, cost)))
