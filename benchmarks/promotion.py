"""How often challengers take over that should, and that should not, on traces drawn again.

Of every trace it is known what each price of the champion and of the challenger would have lost and
saved. Audits are drawn from them, many streams at a time. Both heads have a governor of their own
that learns from the same audits: the champion begins with a price that is certified, and the
challenger with none. What is bet and when a step is taken is the books' own; a test holds this
against them, audit by audit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.control import ControlConfig, Population, counted_at_once, population
from benchmarks.timing import BenchResult
from haltwise.control.betting import STAKES, Float, growth, log_mean_exp
from haltwise.control.canary import SHARES, STEP_AUDITS
from haltwise.control.governor import GroupState, Promise, felt, is_open
from haltwise.control.groups import EVERYTHING, Groups
from haltwise.control.trial import ENOUGH, MARGIN
from traces import Traces

Int = NDArray[np.int64]
Bool = NDArray[np.bool_]

_PART = "promotion"
# Of the target, what the champion's price loses at most that it begins with.
_CERTIFIED = 0.75
_ALL = len(SHARES) + 1
"""The step of who serves all requests; 0 is for who serves none."""


@dataclass(frozen=True)
class PromotionConfig:
    """How often challengers take over that should, and that should not."""

    run: Path | None = None
    """A run with folds on these traces, whose heads serve, and challenge the evidence rule, on
    questions that they never saw. Default: the evidence rule serves, and none challenges it."""
    draws: int = 1_000
    """The number of streams."""
    num_audits: int = 2_000
    """The audits of each, from the challenger's registration on."""
    num_prices: int = 12
    """The number of prices of either head; all pairs of them are compared."""
    target: float = 0.02
    """The mean loss that is promised."""


@dataclass(frozen=True, eq=False)
class Rival:
    """What one head would have lost and saved on N traces at K prices, the strictest first."""

    losses: Float
    """(N, K)."""
    saved: Float
    """(N, K) shares of the full answer's tokens."""

    @classmethod
    def of(cls, drawn: Population) -> Rival:
        """Returns the head whose population this is."""
        return cls(drawn.losses[:, 1:], 1 - drawn.costs[:, 1:] / drawn.costs[:, :1])

    def losing_more(self, share: float, seed: int = 0) -> Rival:
        """Returns one that loses so much more in the mean, wherever it halts."""
        rng = np.random.default_rng(seed)
        right = self.losses.max(axis=1) < 1
        hit = right & (rng.random(len(right)) < share / right.mean())
        return replace(self, losses=self.losses + hit[:, None])

    def elsewhere(self, seed: int = 0) -> Rival:
        """Returns one that loses and saves as much in the mean, but on other traces."""
        rows = np.random.default_rng(seed).permutation(len(self.losses))
        return Rival(self.losses[rows], self.saved[rows])

    def saving_more(self, share: float) -> Rival:
        """Returns one that saves so much more of every answer."""
        return replace(self, saved=self.saved + share)


@dataclass(eq=False)
class Streams:
    """D streams of audits, in each of which a challenger is tried against the champion.

    Args:
        champion: The head that serves.
        challenger: The head that is to take over if it is better.
        begins: The champion's certified step at the beginning.
        promise: What is promised by both.
        draws: D.
    """

    champion: Rival
    challenger: Rival
    begins: int
    promise: Promise
    draws: int

    def __post_init__(self) -> None:
        """Begins with a challenger in the shadow."""
        num = self.challenger.losses.shape[1]
        own = Groups.begin(self.promise, num).groups[EVERYTHING].level
        level = np.full(self.draws, own)
        self.serving = GroupState.begin(self.champion.losses.shape[1], level, self.begins)
        self.trying = GroupState.begin(num, level)
        num_old = self.champion.losses.shape[1] + 1
        self.worse, self.dearer = np.zeros((2, self.draws, num, num_old, len(STAKES)))
        self.as_good = np.zeros((self.draws, len(STAKES)))
        self.step: Int = np.zeros(self.draws, dtype=np.int64)
        """(D,) 0 in the shadow, then counted through the shares, and `_ALL`."""
        self.audits: Int = np.zeros(self.draws, dtype=np.int64)
        """(D,) since the step began."""
        self.stopped: Bool = np.zeros(self.draws, dtype=np.bool_)

    def audit(self, rows: Int) -> None:
        """Takes in one audit of each stream, of these traces (D,)."""
        at, nothing = np.arange(self.draws), np.zeros((self.draws, 1))
        old, new = self.champion.losses[rows], self.challenger.losses[rows]
        before = np.column_stack([nothing, self.champion.saved[rows]])
        saved = np.clip(self.challenger.saved[rows][..., None] - before[:, None], -1, 1)
        lost, losing = (np.column_stack([nothing, one]) for one in (old, new))
        felt_old, felt_new = lost[at, self.serving.step], losing[at, self.trying.step]
        self.worse += growth(new[..., None] - lost[:, None], MARGIN)
        self.dearer += growth(-saved, 0.0)
        self.as_good += np.log1p(STAKES / (1 + MARGIN) * ((felt_new - felt_old)[:, None] - MARGIN))
        promise, rate = self.promise, self.promise.audit
        serving = felt(self.serving, felt_old, rate, promise)
        trying = felt(self.trying, felt_new, rate, promise)
        self.serving = counted_at_once(serving, old, promise)
        self.trying = counted_at_once(trying, new, promise)
        self._move()

    def _move(self) -> None:
        """Stops challengers, lets them begin, or go on to the next share."""
        tried, going = (self.step > 0) & (self.step < _ALL), ~self.stopped
        self.audits += tried
        self.stopped |= tried & ((_enough(self.as_good)) | is_open(self.trying))
        going &= ~self.stopped & self.ready
        begins = (self.step == 0) & going
        climbs = tried & going & (self.audits >= STEP_AUDITS)
        self.step = self.step + (begins | climbs)
        self.audits = np.where(begins | climbs, 0, self.audits)
        self.step[self.stopped] = 0

    @property
    def ready(self) -> Bool:
        """(D,) whether it is known that a challenger loses little more, and saves more."""
        at, step, champion = np.arange(self.draws), self.trying.step, self.serving.step
        below = np.logical_and.accumulate(_enough(self.worse[at, :, champion]), axis=-1)
        saves = _enough(self.dearer[at, step - 1, champion])
        ready: Bool = (step > 0) & below[at, step - 1] & saves
        return ready


def _enough(log_capital: Float) -> Bool:
    enough: Bool = log_mean_exp(log_capital) >= np.log(ENOUGH)
    return enough


@dataclass(frozen=True, eq=False)
class Played:
    """What became of the challengers of D streams."""

    quarter: Bool
    """(D,) whether it has ever served the largest share."""
    promoted: Bool
    """(D,) whether it serves all at the end."""
    ready: Float
    """(D,) audits until it began to serve; infinite where it never did."""


def play(streams: Streams, num_audits: int, seed: int) -> Played:
    """Plays streams of audits to their end.

    Args:
        streams: They begin.
        num_audits: Of each stream.
        seed: Of everything random.
    """
    rng, num = np.random.default_rng(seed), len(streams.champion.losses)
    quarter = np.zeros(streams.draws, dtype=np.bool_)
    ready = np.full(streams.draws, np.inf)
    for at in range(1, num_audits + 1):
        streams.audit(rng.integers(0, num, streams.draws))
        quarter |= streams.step >= len(SHARES)
        ready[(streams.step > 0) & np.isinf(ready)] = at
    return Played(quarter, streams.step == _ALL, ready)


def measure(traces: Traces, config: PromotionConfig) -> list[BenchResult]:
    """Measures how often challengers take over: no better ones, worse ones, better ones, a head.

    Raises:
        InputError: If the traces or the run cannot be used.
    """
    rule = ControlConfig(num_prices=config.num_prices)
    drawn = population(traces, replace(rule, run=config.run))
    champion = Rival.of(drawn)
    rivals = {
        "itself": champion,
        "as good, on other traces": champion.elsewhere(),
        "3 points more lost, 5 more saved": champion.losing_more(0.03).saving_more(0.05),
        "as much lost, 5 points more saved": champion.saving_more(0.05),
    }
    results = []
    for seed, (name, rival) in enumerate(rivals.items()):
        results += _told(name, _played(drawn, champion, rival, config, seed))
    if config.run is not None:
        evidence = population(traces, rule)
        found = _played(evidence, Rival.of(evidence), champion, config, len(rivals))
        results += _told("the run's heads against the evidence rule", found)
    return results


def _played(
    drawn: Population, champion: Rival, challenger: Rival, config: PromotionConfig, seed: int
) -> Played:
    """Plays streams in which the champion begins with a price of its population that is safe."""
    begins = drawn.best(_CERTIFIED * config.target)
    promise = Promise(target=config.target)
    streams = Streams(champion, challenger, begins, promise, config.draws)
    return play(streams, config.num_audits, seed)


def _told(name: str, played: Played) -> list[BenchResult]:
    shares = {"ever served 25 %": played.quarter, "serve all": played.promoted}
    results = [
        BenchResult(_PART, f"{name}: {what}", "%", (100 * float(found.mean()),))
        for what, found in shares.items()
    ]
    begun = played.ready[np.isfinite(played.ready)]
    if not len(begun):
        return results
    what = f"{name}: audits until it begins to serve, where it does, median"
    return [*results, BenchResult(_PART, what, "audits", (float(np.median(begun)),))]
