"""A start for PPO: the exact gradient of the expected return on recorded traces.

A trace holds the return of every halting time, so the expected return of a stochastic halting
policy needs no sampling. With hazards h_t = sigmoid(z_t) and survival S_t = prod_{s<t} (1 - h_s),

    J = sum_t S_t h_t R_t + S_T R_never

is differentiated directly (the relaxation of Reppen, Soner and Tissot-Daguette, "Neural Optimal
Stopping Boundary"; the same product of hazards as in Becker, Cheridito and Jentzen, "Deep Optimal
Stopping", JMLR 20, 2019).

Whether a halt is right is known at every point, but decides the return only where the policy
halts. So the hidden layers learn two more things from every point, for which they are not used
later: whether the forced answer there is correct, and whether the last one will be. With a few
hundred questions this is what keeps them from learning the questions by heart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid
from torch.utils.tensorboard import SummaryWriter

from agents.balance import balance
from agents.network import LogOdds
from envs.replay import observations
from envs.reward import halt_costs, never_costs
from haltwise import Halting, InputError, Observing
from haltwise.errors import check_ranges
from traces import Chunks, Traces, chunks_of

# The most prices, in the mean, that each trace has in one gradient step.
_MOST_PRICES = 4


@dataclass(frozen=True)
class PathwiseConfig:
    """How the exact gradient is followed before PPO."""

    steps: int = 300
    """Gradient steps; 0 leaves PPO to start from its own initialisation."""
    batch_size: int = 1024
    """Traces in a gradient step, each at a price of its own; fewer if there are few traces."""
    learning_rate: float = 3e-3
    """Peak of the one-cycle schedule of the learning rate."""
    prior_questions: float = 450.0
    """Questions that the start, which is a linear rule, counts for. This by the number of questions
    to learn from is the weight decay: that times the learning rate is the share of the way back to
    the rule that each step takes every weight."""
    parent_questions: float = 150.0
    """The same of a parent, where a head goes on from one: its whole network is such a start."""
    correct_coef: float = 2.0
    """Weight, in the loss, of predicting whether the answer at a point and the trace's last answer
    are correct."""

    def check(self, place: str) -> None:
        """Checks the settings before any work.

        Args:
            place: Where they stand among a command's settings, such as "fit.pathwise.".

        Raises:
            InputError: If no gradient can be followed with one of them.
        """
        ranges = {
            "steps": (self.steps >= 0, "0 or more"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "learning_rate": (0 < self.learning_rate < math.inf, "positive and finite"),
        }
        for name in ("prior_questions", "parent_questions", "correct_coef"):
            ranges[name] = (0 <= getattr(self, name) < math.inf, "0 or more, and finite")
        check_ranges(self, ranges, place)


@dataclass(frozen=True)
class _Returns:
    """All that decides the return of N traces with P points, at most T in one trace; on the CPU."""

    obs: Tensor  # (P, F + 1) the observations, at a price of 1
    first: Tensor  # (N,) the index of each trace's first point
    real: Tensor  # (N, T) whether the point exists, and all that is seen there is known
    em: Tensor  # (N, T + 1) the EM of halting at each point; in the last column, of never halting
    cost: Tensor  # (N, T + 1) likewise, in thousands of tokens


def start_from_traces(
    policy_net: LogOdds,
    traces: Traces | Chunks,
    observing: Observing,
    halting: Halting,
    config: PathwiseConfig,
    seed: int,
    log_dir: Path | None = None,
    goes_on: bool = False,
) -> None:
    """Trains a network in place to halt recorded traces well at every price of the range.

    Args:
        policy_net: The network to train.
        traces: The traces to learn from. Chunks get the same number of steps each, one chunk after
            the other.
        observing: How features become observations; prices are drawn from its range.
        halting: The conditions of halting.
        config: The settings of the training.
        seed: The seed of the batches and prices.
        log_dir: The folder that TensorBoard's files go to: the loss and the expected return of
            every tenth step. None writes none.
        goes_on: Whether the network has learned already: then all of it stays near to what it is,
            and not the rule that it starts from alone.

    Raises:
        InputError: If no trace has a decision point.
    """
    chunks = chunks_of(traces)
    prior = config.parent_questions if goes_on else config.prior_questions
    steps = max(config.steps // len(chunks), 1)
    rng = np.random.default_rng(seed)
    correct_net = nn.Linear(policy_net.out.in_features, 2)
    layers = nn.ModuleList([policy_net.first, policy_net.second, policy_net.out, correct_net])
    # AdamW's decay is to 0, where the hidden layers leave the rule as it is; the rule is the start
    # of the straight path, to which the same decay is made by hand. A network that has learned
    # already is such a start as a whole.
    own = list((policy_net if goes_on else policy_net.straight).parameters())
    starts = [(weight, weight.detach().clone()) for weight in own]
    others = list((correct_net if goes_on else layers).parameters())
    decayed: dict[str, Any] = {"params": others}
    kept: dict[str, Any] = {"params": own, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decayed, kept], lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=steps * len(chunks)
    )
    curve = _Curve(log_dir)
    for chunk in chunks:
        returns = _lay_out(chunk, observing, halting)
        num_questions = len(np.unique(chunk.question_id)) * len(chunks)
        # No step takes more than the whole way.
        decay = min(prior / num_questions, 1 / config.learning_rate)
        optimizer.param_groups[0]["weight_decay"] = decay
        # Few traces are soon known; the rest of a batch would only be more prices for them.
        size = min(config.batch_size, _MOST_PRICES * len(returns.em))
        for _ in range(steps):
            rows = torch.from_numpy(rng.integers(len(returns.em), size=size))
            price = observing.draw_price(rng, size)
            batch = _Batch.of(returns, rows, price, observing)
            loss, gained = _loss(policy_net, correct_net, batch, balance(price, observing), config)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for weight, start in starts:
                    weight.lerp_(start, decay * schedule.get_last_lr()[0])
            schedule.step()
            curve.add(loss, gained)
    curve.close()


class _Curve:
    """TensorBoard's curve of the start; without a folder, nothing."""

    _EVERY = 10

    def __init__(self, log_dir: Path | None) -> None:
        """Starts before the first step."""
        self._writer = None if log_dir is None else SummaryWriter(str(log_dir / "start"))
        self._num = 0

    def add(self, loss: Tensor, gained: Tensor) -> None:
        """Takes in the loss and the mean return of a step."""
        if self._writer is not None and self._num % self._EVERY == 0:
            self._writer.add_scalar("start/loss", loss.item(), self._num)
            self._writer.add_scalar("start/return", gained.item(), self._num)
        self._num += 1

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is not None:
            self._writer.close()


def _loss(
    policy_net: LogOdds,
    correct_net: nn.Linear,
    batch: _Batch,
    weight: NDArray[np.float64],
    config: PathwiseConfig,
) -> tuple[Tensor, Tensor]:
    """Returns the loss that a step goes down, and the mean of the expected returns (B,).

    The loss is the expected return, negative, in the mean of the traces times their weights (B,),
    and the cross-entropy of the two predictions of correctness.
    """
    hidden = policy_net.hidden(batch.obs)
    expected = _expected_return(policy_net.of(hidden, batch.obs)[:, 0], batch)
    loss = -(expected * torch.from_numpy(weight).float()).mean()
    if config.correct_coef:
        predicted = correct_net(hidden)
        loss += config.correct_coef * binary_cross_entropy_with_logits(predicted, batch.correct)
    return loss, expected.detach().mean()


@dataclass(frozen=True)
class _Batch:
    """B traces, each at a price, with Q points in all, at most T in one trace."""

    obs: Tensor  # (Q, F + 1) the observations at the points that exist
    correct: Tensor  # (Q, 2) whether the answer there is correct, and whether the last one is
    real: Tensor  # (B, T) whether the point exists
    value: Tensor  # (B, T + 1) the return of halting at each point; in the last column, of never

    @classmethod
    def of(
        cls, returns: _Returns, rows: Tensor, price: NDArray[np.float64], observing: Observing
    ) -> _Batch:
        """Takes the traces of some rows (B,), which may repeat, at prices (B,)."""
        longest = int(returns.real[rows].any(dim=0).nonzero().max()) + 1
        real = returns.real[rows, :longest]
        obs = returns.obs[(returns.first[rows][:, None] + torch.arange(longest))[real]]
        dial = torch.from_numpy(observing.dial(price))[:, None].expand(-1, longest)
        obs[:, -1] = dial[real]
        columns = [*range(longest), -1]
        em = returns.em[rows][:, columns]
        cost = returns.cost[rows][:, columns] * torch.from_numpy(price).float()[:, None]
        both = torch.stack([em[:, :-1], em[:, -1:].expand(-1, longest)], dim=2)
        return cls(obs, both[real], real, em - cost)


def _expected_return(log_odds: Tensor, batch: _Batch) -> Tensor:
    """Returns the expected return (B,) of halting with log-odds (Q,) at the points that exist."""
    # At a point that does not exist, the policy continues.
    odds = log_odds.new_full(batch.real.shape, -30.0)
    odds[batch.real] = log_odds
    log_halt, log_continue = logsigmoid(odds), logsigmoid(-odds)
    survival = torch.cumsum(log_continue, dim=1)
    reached = survival - log_continue
    prob = torch.cat([torch.exp(reached + log_halt), torch.exp(survival[:, -1:])], dim=1)
    return (prob * batch.value).sum(dim=1)


def _lay_out(traces: Traces, observing: Observing, halting: Halting) -> _Returns:
    """Lays the traces that have points out in rows as long as the longest.

    Raises:
        InputError: If no trace has a decision point.
    """
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
    obs, sound = observations(traces, observing, halting)
    real = np.zeros((num, longest), dtype=bool)
    real[at] = sound
    em = np.zeros((num, longest + 1), dtype=np.float32)
    em[at] = traces.correct
    em[:, -1] = traces.final_correct
    cost = np.zeros((num, longest + 1), dtype=np.float32)
    cost[at] = halt_costs(traces, halting.probing) / 1000
    cost[:, -1] = never_costs(traces, halting.probing) / 1000
    return _Returns(*map(torch.from_numpy, (obs, traces.offsets[:-1], real, em, cost)))
