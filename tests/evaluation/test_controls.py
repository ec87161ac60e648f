"""Controls that must fail: nothing is to be saved where there is nothing to see.

Answers are right as often at every point, and the LM's own more often. So halting buys tokens for
EM, and a policy that sees nothing can do no better than to halt a random share of the traces at
once: it lies on the chord from never halting to always halting at the first point.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from agents.fit import FitConfig, out_of_fold
from agents.pathwise import PathwiseConfig
from agents.ppo import PPOConfig
from evaluation.outcome import Outcome, em_delta, halt_outcome, saving, sweep
from evaluation.protocol import folds
from haltwise import Halting, HeadConfig
from policies.head import price_grid
from policies.observing import observing_of
from policies.policy import Policy, decisions
from policies.supervised import SUPERVISED, Supervised
from tests.conftest import trace_row
from traces import Traces, read_traces, write_shard

NUM, POINTS = 600, 4
HALTING = Halting("always", "every 50 tokens", "</think>", "source")
FIT = FitConfig(
    PathwiseConfig(steps=200, batch_size=128, prior_questions=50),
    PPOConfig(total_timesteps=2048, num_envs=64, n_steps=16, batch_size=256, net_width=16),
)

Change = Callable[[dict[str, Any], np.random.Generator], None]


def as_it_is(columns: dict[str, Any], rng: np.random.Generator) -> None:
    pass


def shuffled_labels(columns: dict[str, Any], rng: np.random.Generator) -> None:
    columns["correct"] = rng.permutation(columns["correct"].ravel()).reshape(NUM, POINTS)
    columns["final_correct"] = rng.permutation(columns["final_correct"])


def white_noise(columns: dict[str, Any], rng: np.random.Generator) -> None:
    columns["confidence"] = rng.random((NUM, POINTS))


def population(path: Path, change: Change) -> Traces:
    """600 questions; a right answer is mostly a confident one, unless something is changed."""
    rng = np.random.default_rng(1)
    correct = rng.random((NUM, POINTS)) < 0.6
    columns = {
        "correct": correct,
        "confidence": np.clip(rng.normal(0.35 + 0.45 * correct, 0.15), 0, 1),
        "final_correct": rng.random(NUM) < 0.9,
    }
    change(columns, rng)
    rows = [
        trace_row(
            trace_id=f"t{n}",
            question_id=f"q{n}",
            position=[100, 150, 200, 250],
            probe_tokens=[5] * POINTS,
            num_tokens=1000,
            answer=["7"] * POINTS,
            correct=columns["correct"][n].tolist(),
            confidence=columns["confidence"][n].tolist(),
            answer_logprobs=[[]] * POINTS,
            final_correct=bool(columns["final_correct"][n]),
        )
        for n in range(NUM)
    ]
    write_shard(path / "made.parquet", rows, {})
    return read_traces(path / "made.parquet")


def leads(traces: Traces, outcomes: dict[float, Outcome]) -> NDArray[np.float64]:
    """How much more each outcome saves than the chord at its own EM."""
    always = halt_outcome(traces, np.ones(traces.num_points, dtype=bool), "always")
    slope = saving(traces, always) / em_delta(traces, always)
    return np.array([saving(traces, o) - slope * em_delta(traces, o) for o in outcomes.values()])


def head_outcomes(traces: Traces, cache: Path) -> dict[float, Outcome]:
    """Of a head that is trained and judged as train.py does it, at all prices."""
    observing = observing_of(traces, ("confidence",), HALTING)
    config = HeadConfig(observing, HALTING, default_price=1.0)
    prices = price_grid(observing)
    fold = {0: folds(traces.question_id, 2)}
    (decided,) = out_of_fold(traces, fold, config, FIT, prices, cache).values()
    return sweep(traces, dict(zip(prices, decided[-1], strict=True)), "always")


def supervised_outcomes(name: str, traces: Traces) -> dict[float, Outcome]:
    observing = observing_of(traces, ("confidence",), HALTING)
    config = HeadConfig(observing, HALTING, default_price=1.0)
    of = folds(traces.question_id, 2)
    fold = dict(zip(traces.question_id.tolist(), of.tolist(), strict=True))
    policy: Policy = Supervised(name, traces, fold, config)
    return sweep(traces, decisions(policy, policy.signal(traces)), "always")


#: Four standard errors of the EM of a policy that halts everything, in tokens along the chord.
NOISE = 4 * np.sqrt(0.6 * 0.4 / NUM) * 0.895 / 0.3


@pytest.mark.whole
@pytest.mark.parametrize("change", [shuffled_labels, white_noise])
def test_nothing_to_see_saves_nothing_beyond_random_halting(change: Change, tmp_path: Path) -> None:
    traces = population(tmp_path, change)
    assert leads(traces, head_outcomes(traces, tmp_path)).max() < NOISE
    for name in SUPERVISED:
        assert leads(traces, supervised_outcomes(name, traces)).max() < NOISE


@pytest.mark.whole
def test_the_same_check_finds_what_there_is_to_see(tmp_path: Path) -> None:
    traces = population(tmp_path, as_it_is)
    assert leads(traces, head_outcomes(traces, tmp_path)).max() > 2 * NOISE
    for name in SUPERVISED:
        assert leads(traces, supervised_outcomes(name, traces)).max() > 2 * NOISE
