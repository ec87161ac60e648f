"""How well the governor keeps its promise, and what that costs, on traces that are drawn again.

Of every trace it is known what each price would have lost and saved, so that a stream of requests
is drawn from them, with audits as the governor wants them, many streams at a time. Requests between
two audits change no state; they are counted, with what the served price loses and costs in the
mean. An audit costs its full answer and every probe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.timing import BenchResult
from envs.reward import never_costs
from evaluation.cascade import billed
from evaluation.outcome import Outcome, sweep
from haltwise import InputError
from haltwise.control.ceiling import Counted
from haltwise.control.governor import GroupState, Promise, audit_rate, counted, felt, stakes
from haltwise.control.replay import prices_of
from haltwise.policy.cascade import Cascade
from haltwise.policy.cascade_head import CascadeHead
from haltwise.policy.halting import Probing
from policies.baselines import Evidence
from policies.cascade import CascadePolicy
from policies.course import Bills, LargeAnswers
from policies.head import judging_heads
from policies.policy import decisions
from runs import Run
from traces import Traces, read_pairs

Float = NDArray[np.float64]
Int = NDArray[np.int64]

_PART = "control"
_LEVEL = 0.1


@dataclass(frozen=True)
class ControlConfig:
    """How well the governor keeps its promise."""

    run: Path | None = None
    """A run with folds on these traces, whose heads that never saw a question decide on it.
    Default: the evidence rule, whose thresholds stand for prices."""
    large: Path | None = None
    """The large LM's traces of the same questions, if the run is that of a cascade: what is lost
    and saved is then against the large LM alone, on the run's test questions."""
    draws: int = 1_000
    """The number of streams."""
    num_prices: int = 36
    """The number of prices, if there are more: a head is governed by 36."""
    num_audits: int = 2_000
    """The audits before the requests that are measured."""
    num_requests: int = 20_000
    """The requests that are measured."""
    target: float = 0.02
    """The mean loss that is promised."""


@dataclass(frozen=True, eq=False)
class Population:
    """What N traces lose and cost at K prices, the strictest first; step 0 halts nothing."""

    losses: Float
    """(N, K + 1) the losses."""
    costs: Float
    """(N, K + 1) the tokens."""
    audited: Float
    """(N,) the tokens of an audit: the full answer and every probe."""

    @property
    def risk(self) -> Float:
        """(K + 1,) the mean loss."""
        risk: Float = self.losses.mean(axis=0)
        return risk

    @property
    def saving(self) -> Float:
        """(K + 1,) the share of the tokens that is not spent."""
        cost = self.costs.sum(axis=0)
        saving: Float = 1 - cost / cost[0]
        return saving

    def best(self, target: float) -> int:
        """Returns the step within a target that saves most, which only hindsight knows."""
        within = np.flatnonzero(self.risk <= target)
        return int(within[np.argmax(self.saving[within])])

    def select(self, rows: NDArray[np.bool_]) -> Population:
        """Returns the population of some traces (N,)."""
        return Population(self.losses[rows], self.costs[rows], self.audited[rows])


def population(traces: Traces, config: ControlConfig) -> Population:
    """Works out what the traces lose and cost at every price.

    Raises:
        InputError: If the run has no folds on these traces, or they have no confidence.
    """
    by_price, probing = _evidence(traces) if config.run is None else _of_run(traces, config.run)
    outcomes = list(by_price.values())
    num = min(config.num_prices, len(outcomes))
    chosen = np.linspace(0, len(outcomes) - 1, num).round().astype(int)
    ems = np.stack([outcomes[k].em for k in chosen], axis=1).astype(float)
    costs = np.stack([outcomes[k].cost for k in chosen], axis=1).astype(float)
    full = traces.num_tokens.astype(float)
    return Population(
        np.column_stack([np.zeros(len(traces)), traces.final_correct[:, None] - ems]),
        np.column_stack([full, costs]),
        never_costs(traces, probing).astype(float),
    )


def _of_cascade(small: Path | None, large: Path, config: ControlConfig) -> Population:
    """Works out what a cascade loses and costs on the pairs that it did not learn from.

    Raises:
        InputError: If there are no such pairs, or no cascade.
    """
    if small is None or config.run is None:
        raise InputError("--control.large is given, expected --traces and --control.run with it")
    cascade = Cascade.load(config.run)
    pairs = read_pairs(small, large)
    fresh = ~Run(config.run).learned().among(pairs.small.question_id)
    if not fresh.any():
        raise InputError(f"{config.run} has learned from all of these questions, expected others")
    pairs, policy = pairs.select(fresh), CascadePolicy(cascade)
    answers, bills = LargeAnswers.unhalted(pairs.large), Bills.of(pairs.small, policy.probing)
    signal, ratio = policy.signal(pairs), cascade.config.price_ratio
    courses = [policy.course(pairs, signal, (p,)) for p in prices_of(CascadeHead(cascade))]
    found = [billed(pairs, bills, course, answers, 1.0, ratio) for course in courses]
    full = ratio * pairs.large.num_tokens.astype(float)
    ems = np.stack([one.em for one in found], axis=1).astype(float)
    lost = pairs.large.final_correct[:, None] - ems
    costs = np.stack([one.cost for one in found], axis=1).astype(float)
    return Population(
        np.column_stack([np.zeros(len(pairs)), lost]),
        np.column_stack([full, costs]),
        full + never_costs(pairs.small, policy.probing),
    )


def _evidence(traces: Traces) -> tuple[dict[float, Outcome], Probing]:
    """Returns what the evidence rule comes to, the strictest threshold first."""
    policy = Evidence()
    signal = policy.signal(traces)
    if signal is None:
        raise InputError("the traces have no confidence, expected some, or a run")
    by_threshold = sweep(traces, decisions(policy, signal), "always")
    return dict(sorted(by_threshold.items(), reverse=True)), "always"


def _of_run(traces: Traces, folder: Path) -> tuple[dict[float, Outcome], Probing]:
    """Returns what heads come to on questions that they never saw, those of the first seed."""
    run = Run(folder)
    learned = run.learned()
    if not set(traces.question_id.tolist()) <= set(learned.questions):
        raise InputError(f"{folder} has not learned from all of these questions by folds")
    kept_back = run.kept_back(learned)
    head = next(iter(kept_back.values()))
    probing, prices = head.config.halting.probing, prices_of(head).tolist()
    policy = judging_heads(head, kept_back, learned.folds)[0]
    signal = policy.signal(traces)
    return sweep(traces, {p: policy.halts(signal, p) for p in prices}, probing), probing


@dataclass(frozen=True, eq=False)
class Audited:
    """One audit in each of D streams."""

    state: GroupState
    """The states after it."""
    step: Int
    """(D,) the steps that were served until then."""
    gap: Int
    """(D,) requests since the audit before, this one included."""
    audited: Float
    """(D,) the tokens of the audit."""


def stream(
    state: GroupState, drawn: Population, promise: Promise, seed: int, more: float = 0.0
) -> Iterator[Audited]:
    """Yields audits of D streams without end.

    Args:
        state: The states of D groups.
        drawn: Where requests are drawn from.
        promise: What is promised.
        seed: Of everything random.
        more: The share of requests that lose 1 more, wherever they are halted.
    """
    rng, streams = np.random.default_rng(seed), np.arange(len(state.level))
    while True:
        step, rate = state.step, audit_rate(state, promise)
        gap = rng.geometric(rate)
        rows = rng.integers(0, len(drawn.losses), len(streams))
        losses = drawn.losses[rows]
        hit = rng.random((len(streams), 1)) < more
        losses[:, 1:] += hit & (losses[:, 1:] < 1)
        state = counted_at_once(state, losses[:, 1:], promise)
        state = felt(state, losses[streams, step], rate, promise)
        yield Audited(state, step, gap, drawn.audited[rows])


def counted_at_once(state: GroupState, losses: Float, promise: Promise) -> GroupState:
    """Returns the states after audits whose losses (D, K) are known as soon as they are drawn."""
    audit = Counted(stakes(state, promise), losses, np.zeros(losses.shape, dtype=bool))
    return counted(state, audit, promise)


@dataclass
class Account:
    """What D streams came to over their first requests."""

    drawn: Population
    num_requests: int
    target: float
    draws: int
    """D."""

    def __post_init__(self) -> None:
        """Begins with nothing."""
        self.num, self.audits, self.spent, self.late = np.zeros((4, self.draws))
        self.over = np.zeros(self.draws, dtype=bool)

    def add(self, audit: Audited) -> bool:
        """Adds what came until an audit, and returns whether some stream has requests left."""
        left = self.num_requests - self.num
        halted = np.minimum(audit.gap - 1, left)
        asked = (left >= audit.gap).astype(float)
        self.spent += halted * self.drawn.costs.mean(axis=0)[audit.step] + asked * audit.audited
        late = np.clip(self.num + halted - np.maximum(self.num, self.num_requests / 2), 0, None)
        self.late += late * self.drawn.risk[audit.step]
        self.over |= (left > 0) & (self.drawn.risk[audit.step] > self.target + 1e-12)
        self.num += halted + asked
        self.audits += asked
        return bool((self.num < self.num_requests).any())

    @property
    def saving(self) -> Float:
        """(D,) net of all that audits cost."""
        saving: Float = 1 - self.spent / (self.num_requests * self.drawn.costs[:, 0].mean())
        return saving

    @property
    def late_loss(self) -> Float:
        """(D,) the mean loss of the second half of the requests; audits lose nothing."""
        loss: Float = self.late / (self.num_requests / 2)
        return loss


def measure(traces: Traces, config: ControlConfig, source: Path | None = None) -> list[BenchResult]:
    """Measures all figures of the governor on some traces.

    Args:
        traces: The traces.
        config: The settings.
        source: Where they were read; None if they were made up.

    Raises:
        InputError: If the traces or the run cannot be used.
    """
    if config.large is None:
        drawn = population(traces, config)
    else:
        drawn = _of_cascade(source, config.large, config)
    promise = Promise(target=config.target)
    results = at_rest(drawn, config, promise) + sudden(drawn, config, promise)
    lms = np.unique(traces.model).tolist()
    for new in lms if len(lms) > 1 else []:
        fresh = drawn.select(traces.model == new)
        known = drawn.select(traces.model != new).best(config.target)
        results += stranger(new, fresh, known, config, promise)
    return results


def at_rest(drawn: Population, config: ControlConfig, promise: Promise) -> list[BenchResult]:
    """Begins with nothing, certifies, and serves, at two rates of audits."""
    best = drawn.saving[drawn.best(config.target)]
    results = [_percent("best fixed price in hindsight: saving", best)]
    for rate in (0.05, 0.025):
        kept = replace(promise, rest=rate)
        begun = GroupState.begin(config.num_prices, np.full(config.draws, _LEVEL))
        audits = stream(begun, drawn, kept, 0)
        over = np.zeros(config.draws, dtype=bool)
        for _ in range(config.num_audits):
            audit = next(audits)
            over |= drawn.risk[audit.step] > config.target + 1e-12
        ceiling = drawn.saving[audit.state.ceiling].mean()
        account = _accounted(audits, drawn, config)
        name = f"audits decay to {rate:.1%}"
        results += [
            _percent(f"{name}: runs that ever serve over target", (over | account.over).mean()),
            _percent(f"{name}: ceiling's saving short of the best", best - ceiling),
            _percent(f"{name}: saving, audits paid, of the best", account.saving.mean() / best),
            _percent(f"{name}: audited", account.audits.mean() / config.num_requests),
            _percent(f"{name}: late loss", account.late_loss.mean()),
        ]
    return results


def sudden(drawn: Population, config: ControlConfig, promise: Promise) -> list[BenchResult]:
    """Lets a certified group lose 8 points more from one request to the next."""
    calm = replace(promise, rest=0.05)
    top = drawn.best(0.75 * config.target)
    begun = GroupState.begin(config.num_prices, np.full(config.draws, _LEVEL), certified=top)
    num, audits = 0, max(config.num_requests // 20, 1)
    resting = stream(begun, drawn, calm, 1)
    for _ in range(audits):
        audit = next(resting)
        num += audit.gap.sum()
    at_rest = audit.state
    passed = np.zeros(config.draws)
    opened = np.full(config.draws, np.inf)
    for audit in stream(at_rest, drawn, calm, 2, more=0.08):
        passed += audit.gap
        opens = np.isinf(opened) & (audit.state.epoch > at_rest.epoch)
        opened[opens] = passed[opens]
        if not np.isinf(opened).any() or passed.min() > config.num_requests:
            break
    return [
        _result("8 points lost: requests until it stops, median", "requests", np.median(opened)),
        _result("8 points lost: 90 of 100", "requests", np.percentile(opened, 90)),
        _percent("8 points lost: audited before", config.draws * audits / num),
        _result(
            "8 points lost: audits between false alarms before, at least",
            "audits",
            config.draws * audits / max(float(at_rest.epoch.sum()), 1.0),
        ),
    ]


def stranger(
    name: str, drawn: Population, known: int, config: ControlConfig, promise: Promise
) -> list[BenchResult]:
    """Begins on an LM with the best price of the others, which nobody vouches for there."""
    begun = GroupState.begin(
        config.num_prices, np.full(config.draws, _LEVEL), ceiling=known, trial=1_000
    )
    account = _accounted(stream(begun, drawn, promise, 3), drawn, config)
    best = drawn.saving[drawn.best(config.target)]
    return [
        _percent(f"{name} from others' price: it loses", drawn.risk[known]),
        _percent(
            f"{name} from others' price: late loss within target",
            (account.late_loss <= config.target).mean(),
        ),
        _percent(f"{name} from others' price: saving of the best", account.saving.mean() / best),
    ]


def _accounted(audits: Iterator[Audited], drawn: Population, config: ControlConfig) -> Account:
    account = Account(drawn, config.num_requests, config.target, config.draws)
    while account.add(next(audits)):
        pass
    return account


def _percent(name: str, share: Any) -> BenchResult:
    return _result(name, "%", 100 * share)


def _result(name: str, unit: str, value: Any) -> BenchResult:
    return BenchResult(_PART, name, unit, (float(value),))
