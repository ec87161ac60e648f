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
from collections.abc import Callable
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
from command import progress
from envs.replay import observations
from envs.reward import halt_costs, never_costs
from haltwise import Halting, InputError, Observing
from haltwise.errors import check_ranges
from haltwise.training import StoppingConfig, StoppingRule
from traces import Chunks, Traces, chunks_of

# The most prices, in the mean, that each trace has in one gradient step.
_MOST_PRICES = 4
# With questions held out: steps from no learning rate to the whole one, steps between evaluations,
# prices of an evaluation, the gain in the return over all prices (see `balance`) that is asked of
# each, and the steps that follow at a small rate.
_WARM_UP, _EVERY, _NUM_PRICES, _LEAST_GAIN, _COOLDOWN = 30, 20, 6, 0.01, 60


@dataclass(frozen=True)
class PathwiseConfig:
    """How the exact gradient is followed before PPO."""

    steps: int = 300
    """Gradient steps; 0 leaves PPO to start from its own initialisation."""
    batch_size: int = 1024
    """Traces in a gradient step, each at a price of its own; fewer if there are few traces."""
    learning_rate: float = 3e-3
    """Peak of the one-cycle schedule of the learning rate."""
    prior_questions: float = 1500.0
    """Questions that the start, which is a linear rule, counts for. This by the number of questions
    to learn from is the weight decay: that times the learning rate is the share of the way back to
    the rule that each step takes every weight."""
    parent_questions: float = 150.0
    """The same of a parent, where a head goes on from one: its whole network is such a start."""
    correct_coef: float = 2.0
    """Weight, in the loss, of predicting whether the answer at a point and the trace's last answer
    are correct."""
    held_out: float = 0.0
    """Share of the questions that tell when the gradient has been followed far enough, at most for
    `steps`; nothing is learned from them. At 0 all are learned from, and all steps are done."""

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
        ranges["held_out"] = (0 <= self.held_out < 1, "0 or more, below 1")
        check_ranges(self, ranges, place)


@dataclass(frozen=True)
class Returns:
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
    before: Callable[[int], None] | None = None,
    progress_bar: bool = False,
) -> int:
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
        before: Called before each step with the number of steps that are done.
        progress_bar: Whether to tell how far it is.

    Returns:
        The number of gradient steps.

    Raises:
        InputError: If no trace has a decision point, or questions are held out and they are too
            few, or come in chunks.
    """
    chunks = chunks_of(traces)
    watch = None
    if config.held_out:
        learned_from, held_out = _without_held_out(chunks, config.held_out, seed)
        chunks = chunks_of(learned_from)
        watch = _Watch(policy_net, held_out, observing, halting, config.steps)
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
    schedule: torch.optim.lr_scheduler.LRScheduler
    if watch is None:
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, config.learning_rate, total_steps=steps * len(chunks)
        )
    else:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, watch.rate)
    curve = _Curve(log_dir)
    for chunk in chunks:
        returns = lay_out(chunk, observing, halting)
        num_questions = len(np.unique(chunk.question_id)) * len(chunks)
        # No step takes more than the whole way.
        decay = min(prior / num_questions, 1 / config.learning_rate)
        optimizer.param_groups[0]["weight_decay"] = decay
        # Few traces are soon known; the rest of a batch would only be more prices for them.
        size = min(config.batch_size, _MOST_PRICES * len(returns.em))
        for num in progress(range(steps), "start", disable=not progress_bar):
            if before is not None:
                before(curve.num)
            rows = torch.from_numpy(rng.integers(len(returns.em), size=size))
            price = observing.draw_price(rng, size)
            batch = Batch.of(returns, rows, price, observing)
            loss, gained = _loss(policy_net, correct_net, batch, balance(price, observing), config)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for weight, start in starts:
                    weight.lerp_(start, decay * schedule.get_last_lr()[0])
            curve.add(loss, gained)
            if watch is not None and watch.is_over(num + 1, curve):
                break
            schedule.step()
    curve.close()
    return curve.num


def _without_held_out(chunks: Chunks, share: float, seed: int) -> tuple[Traces, Traces]:
    """Returns traces to learn from, and those of a share of the questions.

    Raises:
        InputError: If there are several chunks, or no question for one of both.
    """
    if len(chunks) > 1:
        raise InputError(
            f"held_out is {share}, expected 0: the traces come in {len(chunks)} chunks"
        )
    (traces,) = chunks
    traces = traces.select(np.diff(traces.offsets) > 0)
    question = np.unique(traces.question_id)
    num = round(share * len(question))
    if not 0 < num < len(question):
        raise InputError(f"held_out is {share} of {len(question)} questions, expected at least 1")
    chosen = np.random.default_rng([seed, 1]).permutation(question)[:num]
    out = np.isin(traces.question_id, chosen)
    return traces.select(~out), traces.select(out)


class _Watch:
    """Judges a network as it learns by questions that are held out, and says when it is enough."""

    def __init__(
        self,
        policy_net: LogOdds,
        traces: Traces,
        observing: Observing,
        halting: Halting,
        most_steps: int,
    ) -> None:
        """Judges the network as it is.

        Args:
            policy_net: The network that learns.
            traces: Those of the held-out questions, with points.
            observing: How features become observations.
            halting: The conditions of halting.
            most_steps: The steps after which it is enough in any case.
        """
        returns, rows = lay_out(traces, observing, halting), torch.arange(len(traces))
        prices = np.geomspace(*observing.price_range, _NUM_PRICES)
        self._net = policy_net
        self._weights = balance(prices, observing)
        self._batches = [
            Batch.of(returns, rows, np.full(len(traces), price), observing) for price in prices
        ]
        self._question = np.unique(traces.question_id, return_inverse=True)[1]
        width = [batch.value.amax(dim=1) - batch.value.amin(dim=1) for batch in self._batches]
        config = StoppingConfig(
            patience=1,
            least_gain=_LEAST_GAIN,
            interval="normal",
            span=float(self._by_question(width).max()),
            most_steps=most_steps,
            cooldown_steps=min(_COOLDOWN, most_steps // 2),
        )
        self._rule = StoppingRule(config)
        self._rule.evaluated(0, self._judge())

    def rate(self, step: int) -> float:
        """Returns what the learning rate of a step is multiplied with."""
        return min(1.0, (step + 1) / _WARM_UP) * self._rule.rate

    def is_over(self, step: int, curve: _Curve) -> bool:
        """Returns whether the network has learned enough after some steps, and tells the curve."""
        if step % _EVERY == 0:
            self._rule.evaluated(step, self._judge())
            curve.judge(self._rule.curve.means[-1])
        return self._rule.stepped(step).action == "stop"

    @torch.no_grad()
    def _judge(self) -> NDArray[np.float64]:
        """Returns the expected return of each question, over all prices."""
        return self._by_question(
            [expected_return(self._net(batch.obs)[:, 0], batch) for batch in self._batches]
        )

    def _by_question(self, found: list[Tensor]) -> NDArray[np.float64]:
        """Returns the mean of each question's traces (N,), over prices by their weights."""
        each = np.mean(
            [w * one.numpy() for w, one in zip(self._weights, found, strict=True)], axis=0
        )
        mean: NDArray[np.float64] = np.bincount(self._question, each) / np.bincount(self._question)
        return mean


class _Curve:
    """TensorBoard's curve of the start; without a folder, its number of steps."""

    _EVERY = 10

    def __init__(self, log_dir: Path | None) -> None:
        """Starts before the first step."""
        self._writer = None if log_dir is None else SummaryWriter(str(log_dir / "start"))
        self.num = 0

    def add(self, loss: Tensor, gained: Tensor) -> None:
        """Takes in the loss and the mean return of a step."""
        if self._writer is not None and self.num % self._EVERY == 0:
            self._writer.add_scalar("start/loss", loss.item(), self.num)
            self._writer.add_scalar("start/return", gained.item(), self.num)
        self.num += 1

    def judge(self, mean: float) -> None:
        """Takes in the mean return of held-out questions after the steps so far."""
        if self._writer is not None:
            self._writer.add_scalar("start/held_out_return", mean, self.num)

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is not None:
            self._writer.close()


def _loss(
    policy_net: LogOdds,
    correct_net: nn.Linear,
    batch: Batch,
    weight: NDArray[np.float64],
    config: PathwiseConfig,
) -> tuple[Tensor, Tensor]:
    """Returns the loss that a step goes down, and the mean of the expected returns (B,).

    The loss is the expected return, negative, in the mean of the traces times their weights (B,),
    and the cross-entropy of the two predictions of correctness.
    """
    hidden = policy_net.hidden(batch.obs)
    expected = expected_return(policy_net.of(hidden, batch.obs)[:, 0], batch)
    loss = -(expected * torch.from_numpy(weight).float()).mean()
    if config.correct_coef:
        predicted = correct_net(hidden)
        loss += config.correct_coef * binary_cross_entropy_with_logits(predicted, batch.correct)
    return loss, expected.detach().mean()


@dataclass(frozen=True)
class Batch:
    """B traces, each at a price, with Q points in all, at most T in one trace."""

    obs: Tensor  # (Q, F + 1) the observations at the points that exist
    correct: Tensor  # (Q, 2) whether the answer there is correct, and whether the last one is
    real: Tensor  # (B, T) whether the point exists
    value: Tensor  # (B, T + 1) the return of halting at each point; in the last column, of never

    @classmethod
    def of(
        cls, returns: Returns, rows: Tensor, price: NDArray[np.float64], observing: Observing
    ) -> Batch:
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


def expected_return(log_odds: Tensor, batch: Batch) -> Tensor:
    """Returns the expected return (B,) of halting with log-odds (Q,) at the points that exist."""
    # At a point that does not exist, the policy continues.
    odds = log_odds.new_full(batch.real.shape, -30.0)
    odds[batch.real] = log_odds
    log_halt, log_continue = logsigmoid(odds), logsigmoid(-odds)
    survival = torch.cumsum(log_continue, dim=1)
    reached = survival - log_continue
    prob = torch.cat([torch.exp(reached + log_halt), torch.exp(survival[:, -1:])], dim=1)
    return (prob * batch.value).sum(dim=1)


def lay_out(traces: Traces, observing: Observing, halting: Halting) -> Returns:
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
    return Returns(*map(torch.from_numpy, (obs, traces.offsets[:-1], real, em, cost)))
