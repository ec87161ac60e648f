"""Trains a cascade: the exact gradient of the expected return of three actions.

Traces of both LMs on the same questions hold the return of every course, so that nothing is
sampled, as in `agents.pathwise`. At a price, with EM_t and c_t what halting at point t gains and
has cost, b_t what has been spent where the small LM is left there, and EM_L and c_L what the large
LM comes to, whose token costs r tokens of the small one,

    V_t = p_halt (EM_t - price c_t) + p_escalate (EM_L - price (b_t + r c_L)) + p_continue V_{t+1}

in thousands of tokens. Before the first token p_halt is 0; at the thought's end p_continue is 0,
and to halt is to take the small LM's own answer. The probabilities are the softmax
of 0, the head's log-odds of halting, and the network's of escalating.

The hidden layers also learn whether the small LM's answer there, its last one and the large LM's
are right, for which they are not used later.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from agents.balance import balance
from agents.fit import FitConfig, fit
from agents.network import LogOdds
from agents.pathwise import PathwiseConfig
from agents.ppo import PPOConfig, export
from envs.replay import observed_features
from haltwise import HaltHead, HeadConfig, Observing
from haltwise.errors import check_ranges
from haltwise.policy.cascade import (
    PLACES,
    Cascade,
    CascadeConfig,
    joined,
    observed_size,
)
from haltwise.policy.question import QuestionReader
from policies.cascade import last_features
from policies.course import Bills, LargeAnswers
from policies.observing import cascade_prices, observing_at_prices
from traces import Pairs

# The most prices, in the mean, that each pair has in one gradient step.
_MOST_PRICES = 4
# Stands for the log-odds of what cannot be done.
_NEVER = -30.0
# The log-odds of escalating at the start of training: before the first token, at the thought's end;
# at a decision point as much less than 0 as there are points, so that later ones are reached.
_AT_START, _AT_END = -2.0, -1.0
# How fast they fall with the log price, whose range is 2 wide.
_DIAL = -1.0
# The correctness of the answer at hand, of the small LM's last one, and of the large one's.
_NUM_RIGHT = 3


@dataclass(frozen=True)
class CascadeFitConfig:
    """How a cascade is trained."""

    head: PathwiseConfig = field(default_factory=PathwiseConfig)
    """The training of the small LM's head by itself, unless a head is given."""
    both: PathwiseConfig = field(
        default_factory=lambda: PathwiseConfig(steps=600, prior_questions=450)
    )
    """The training of the cascade: of the second network, and of the head unless it is given. The
    whole of that head counts for `parent_questions`."""
    net_width: int = 32
    """Units in each of the two hidden layers of the network that escalates."""

    def check(self, place: str) -> None:
        """Checks the settings before any work.

        Args:
            place: Where they stand among a command's settings, such as "fit.".

        Raises:
            InputError: If nothing can be trained with one of them.
        """
        self.head.check(f"{place}head.")
        self.both.check(f"{place}both.")
        check_ranges(self, {"net_width": (self.net_width >= 1, "at least 1")}, place)


@dataclass(frozen=True)
class Trained:
    """What a training leaves."""

    cascade: Cascade
    alone: HaltHead
    """The small LM's head as it is without a large LM: a given head, or the start of the other."""


def fit_cascade(
    pairs: Pairs,
    large: LargeAnswers,
    head: HaltHead | HeadConfig,
    told: CascadeConfig,
    config: CascadeFitConfig,
    seed: int,
) -> Trained:
    """Trains a cascade on recorded pairs.

    Args:
        pairs: The pairs to learn from.
        large: What the large LM answers to them.
        head: The small LM's head, which stays as it is; or the conditions of one to train, which is
            standardised by the pairs.
        told: The conditions of the cascade, whose reader is fitted to the pairs.
        config: The settings of the training.
        seed: The seed of everything random.

    Raises:
        InputError: If no trace has a decision point.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    given = isinstance(head, HaltHead)
    alone = head if isinstance(head, HaltHead) else _fit_head(pairs, head, config, seed)
    observing = alone.config.observing
    told = replace(told, reader=QuestionReader.fit(pairs.questions))
    table = Table.of(pairs, large, alone, told)
    halting = _net_of(alone)
    mean_points = max(pairs.small.num_points / len(pairs), 2.0)
    escalating = _start(observed_size(observing, told.reader), config.net_width, mean_points)
    prices = cascade_prices(pairs.large, told.price_ratio)
    _train(halting, escalating, table, observing, prices, config.both, seed, keep_head=given)
    end = alone if given else HaltHead(alone.config, _weights(halting))
    return Trained(Cascade(end, told, _weights(escalating)), alone)


def _fit_head(pairs: Pairs, head: HeadConfig, config: CascadeFitConfig, seed: int) -> HaltHead:
    """Trains a head of the small LM by itself, by the exact gradient alone."""
    groups, prices = head.observing.groups, head.observing.price_range
    observing = observing_at_prices(pairs.small, groups, head.halting, prices)
    head = replace(head, observing=observing)
    fitting = FitConfig(config.head, PPOConfig(total_timesteps=0))
    return export(fit(pairs.small, head, fitting, seed), head)


def _start(size: int, width: int, mean_points: float) -> LogOdds:
    """Returns a network that escalates seldom, and more seldom the higher the price is."""
    straight = nn.Linear(size, 1, bias=False)
    net = LogOdds(nn.Linear(size, width), nn.Linear(width, width), nn.Linear(width, 1), straight)
    at_point = -2 - float(np.log(mean_points))
    with torch.no_grad():
        straight.weight.zero_()
        places = [_AT_START - at_point, _AT_END - at_point, 0.0]
        straight.weight[0, -1 - len(PLACES) : -1] = torch.tensor(places)
        straight.weight[0, -1] = _DIAL
        net.out.weight.mul_(0.1)
        net.out.bias.fill_(at_point)
    return net


def _net_of(head: HaltHead) -> LogOdds:
    """Returns a head's network."""
    weights = {name: torch.from_numpy(value.copy()) for name, value in head.weights.items()}
    hidden, size = weights["w0"].shape
    straight = nn.Linear(size, 1, bias=False)
    net = LogOdds(
        nn.Linear(size, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1), straight
    )
    with torch.no_grad():
        for layer, at in ((net.first, "0"), (net.second, "1")):
            layer.weight.copy_(weights[f"w{at}"])
            layer.bias.copy_(weights[f"b{at}"])
        net.out.weight.copy_(weights["w2"][:, :hidden])
        net.out.bias.copy_(weights["b2"])
        straight.weight.zero_()
        if weights["w2"].shape[1] > hidden:
            straight.weight.copy_(weights["w2"][:, hidden:])
    return net


def _weights(net: LogOdds) -> dict[str, NDArray[np.float32]]:
    """Returns a network's weights as heads and cascades have them."""
    tensors = {
        "w0": net.first.weight,
        "b0": net.first.bias,
        "w1": net.second.weight,
        "b1": net.second.bias,
        "w2": torch.cat([net.out.weight, net.straight.weight], dim=1),
        "b2": net.out.bias,
    }
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Table:
    """All that decides the return of N pairs with P points, T at most in one; on the CPU.

    A pair has T + 2 places: before the first token, its points, and its end, which is the last one.
    """

    obs: Tensor  # (P + 2N, X) what the network is fed at each place, at a price of 1
    row: Tensor  # (N, T + 2) the place's row in obs
    real: Tensor  # (N, T + 2) whether the place exists, and all that is seen there is known
    right: Tensor  # (P + 2N, 3) correctness: of the answer there, of the last one, of the large one
    em: Tensor  # (N, T + 2) the EM of halting there
    halt_cost: Tensor  # (N, T + 2) likewise, in thousands of tokens
    leave_cost: Tensor  # (N, T + 2) what is spent where the small LM is left there
    large_em: Tensor  # (K, N) the EM of the large LM
    large_cost: Tensor  # (K, N) its bill, in thousands of tokens of the small one
    large: LargeAnswers
    price_ratio: float
    features: int  # F, the number of features

    @classmethod
    def of(cls, pairs: Pairs, large: LargeAnswers, head: HaltHead, told: CascadeConfig) -> Table:
        """Lays pairs out in rows as long as the longest."""
        small, config = pairs.small, head.config
        lengths = np.diff(small.offsets)
        num, longest = len(small), int(lengths.max(initial=0))
        features = observed_features(small, config.observing, config.halting)
        asked = told.reader.read(pairs.questions)
        unseen = np.full((num, features.shape[1]), np.nan, dtype=np.float32)
        places = [
            (features, asked[small.trace_of_point], (False, False, False)),
            (unseen, asked, (True, False, False)),
            (last_features(small, features), asked, (False, True, ~small.finished)),
        ]
        obs = np.concatenate([_observe(config.observing, *place) for place in places])
        at = small.trace_of_point, np.arange(small.num_points) - small.offsets[:-1].repeat(lengths)
        at = (at[0], at[1] + 1)
        row = np.zeros((num, longest + 2), dtype=np.int64)
        real = np.zeros((num, longest + 2), dtype=bool)
        row[at], real[at] = np.arange(small.num_points), np.isfinite(features).all(axis=1)
        row[:, 0] = small.num_points + np.arange(num)
        row[:, -1] = small.num_points + num + np.arange(num)
        real[:, [0, -1]] = True
        bills = Bills.of(small, config.halting.probing)

        def laid(of_points: NDArray[Any], at_end: NDArray[Any]) -> Tensor:
            table = np.zeros((num, longest + 2), dtype=np.float32)
            table[at], table[:, -1] = of_points, at_end
            return torch.from_numpy(table)

        last, each = small.final_correct, np.arange(num)
        rights = [(small.correct, small.trace_of_point), (last, each), (last, each)]
        both = np.stack([last, pairs.large.final_correct], axis=1)
        right = np.concatenate([np.column_stack([now, both[of]]) for now, of in rights])
        return cls(
            torch.from_numpy(obs),
            torch.from_numpy(row),
            torch.from_numpy(real),
            torch.from_numpy(right.astype(np.float32)),
            laid(bills.halt_em, bills.end_em),
            laid(bills.halt_cost / 1000, bills.end_cost / 1000),
            laid(bills.leave_cost / 1000, bills.end_cost / 1000),
            torch.from_numpy(large.em.astype(np.float32)),
            torch.from_numpy((told.price_ratio * large.cost / 1000).astype(np.float32)),
            large,
            told.price_ratio,
            features.shape[1],
        )


def _observe(
    observing: Observing, features: NDArray[np.float32], asked: NDArray[np.float32], places: Any
) -> NDArray[np.float32]:
    """Returns what the network is fed (B, X) at a price of 1."""
    obs = np.nan_to_num(observing.observe(features, 1.0))
    return joined(obs[:, :-1], asked, places, obs[:, -1])


@dataclass(frozen=True)
class Batch:
    """B pairs, each at a price, with T + 2 places at most."""

    obs: Tensor  # (Q, X) what the network is fed at the places that exist
    right: Tensor  # (Q, 3) what is right there
    features: int  # F
    at_point: Tensor  # (Q,) whether the place is a decision point
    real: Tensor  # (B, T + 2) whether the place exists
    halt: Tensor  # (B, T + 2) the return of halting there
    escalate: Tensor  # (B, T + 2) the return of escalating from there

    @classmethod
    def of(
        cls, table: Table, rows: Tensor, price: NDArray[np.float64], observing: Observing
    ) -> Batch:
        """Takes the pairs of some rows (B,), which may repeat, at prices (B,)."""
        reached = table.real[rows, :-1].any(dim=0).nonzero().max().item()
        columns = [*range(int(reached) + 1), -1]
        real = table.real[rows][:, columns]
        index = table.row[rows][:, columns][real]
        obs = table.obs[index]
        dial = torch.from_numpy(observing.dial(price))[:, None].expand(-1, len(columns))
        obs[:, -1] = dial[real]
        each = torch.from_numpy(price).float()[:, None]
        at = torch.from_numpy(table.large.nearest(price * table.price_ratio))
        large_em, large_cost = table.large_em[at, rows], table.large_cost[at, rows]
        halt = table.em[rows][:, columns] - each * table.halt_cost[rows][:, columns]
        spent = table.leave_cost[rows][:, columns] + large_cost[:, None]
        places = torch.zeros_like(real)
        places[:, 1:-1] = True
        escalate = large_em[:, None] - each * spent
        right = table.right[index]
        return cls(obs, right, table.features, places[real], real, halt, escalate)


def expected_return(log_odds: Tensor, halt_log_odds: Tensor, batch: Batch) -> Tensor:
    """Returns the expected return (B,) of a stochastic cascade.

    Args:
        log_odds: (Q,) of escalating, at the places that exist.
        halt_log_odds: (Q,) of halting there; those that are at no decision point do not count.
        batch: The pairs.
    """
    logits = log_odds.new_zeros((*batch.real.shape, 3))
    halt, escalate = (log_odds.new_full(batch.real.shape, _NEVER) for _ in range(2))
    escalate[batch.real] = log_odds
    halt[batch.real] = torch.where(batch.at_point, halt_log_odds, _NEVER)
    last = torch.zeros_like(batch.real)
    last[:, -1] = True
    # At the end, halting is what the log-odds are against.
    logits[..., 0] = torch.where(last, _NEVER, 0.0)
    logits[..., 1] = torch.where(last, 0.0, halt)
    logits[..., 2] = escalate
    log_prob = torch.log_softmax(logits, dim=2)
    going = torch.cumsum(log_prob[..., 0], dim=1) - log_prob[..., 0]
    prob = torch.exp(going[..., None] + log_prob[..., 1:])
    return (prob[..., 0] * batch.halt + prob[..., 1] * batch.escalate).sum(dim=1)


def _train(
    halting: LogOdds,
    escalating: LogOdds,
    table: Table,
    observing: Observing,
    prices: tuple[float, float],
    config: PathwiseConfig,
    seed: int,
    *,
    keep_head: bool,
) -> None:
    """Follows the gradient; the networks are trained in place, the first one unless it is kept.

    Prices are drawn from a range of their own: a given head may have learned another one.
    """
    drawing = replace(observing, price_range=prices)
    rng = np.random.default_rng(seed)
    right_net = nn.Linear(escalating.out.in_features, _NUM_RIGHT)
    size = min(config.batch_size, _MOST_PRICES * len(table.em))
    rate = config.learning_rate
    # The hidden layers decay to 0, the straight path to its start, and a head to what it has been.
    kept = [] if keep_head else [(config.parent_questions, w) for w in halting.parameters()]
    kept += [(config.prior_questions, weight) for weight in escalating.straight.parameters()]
    starts = [
        (weight, weight.detach().clone(), min(prior / len(table.em), 1 / rate))
        for prior, weight in kept
    ]
    free = nn.ModuleList([escalating.first, escalating.second, escalating.out, right_net])
    decay = min(config.prior_questions / len(table.em), 1 / rate)
    groups: list[dict[str, Any]] = [
        {"params": list(free.parameters()), "weight_decay": decay},
        {"params": [weight for _, weight in kept], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=max(config.steps, 1)
    )
    for _ in range(config.steps):
        rows = torch.from_numpy(rng.integers(len(table.em), size=size))
        price = drawing.draw_price(rng, size)
        batch = Batch.of(table, rows, price, observing)
        hidden = escalating.hidden(batch.obs)
        halt_odds = halting(torch.cat([batch.obs[:, : batch.features], batch.obs[:, -1:]], dim=1))
        if keep_head:
            halt_odds = halt_odds.detach()
        expected = expected_return(escalating.of(hidden, batch.obs)[:, 0], halt_odds[:, 0], batch)
        weight = torch.from_numpy(balance(price, drawing)).float()
        loss = -(expected * weight).mean()
        loss += config.correct_coef * binary_cross_entropy_with_logits(
            right_net(hidden), batch.right
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for parameter, start, share in starts:
                parameter.lerp_(start, share * schedule.get_last_lr()[0])
        schedule.step()
