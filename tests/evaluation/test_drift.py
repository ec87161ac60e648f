"""What has changed between two stretches of questions is told apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.drift import LEVEL, Drift, drift_between
from haltwise import Halting, HeadConfig
from policies.observing import observing_of
from traces import Traces, read_traces
from traces.arrays import concatenate

Asked = dict[str, tuple[str, int | None]]
GROUPS = ("pace", "distribution")
KINDS = 3


@dataclass(frozen=True)
class World:
    """What questions are asked, and who answers and scores them."""

    shares: tuple[float, ...] = (0.5, 0.3, 0.2)
    """Of each kind of question."""
    harder: tuple[float, ...] = (0.0, 0.0, 0.0)
    """How much harder each kind is than it was."""
    certain: float = 0.0
    """How much more certain the LM sounds, whatever it is asked."""
    wordy: float = 1.0
    """How many times as long it thinks."""
    misjudged: float = 0.0
    """Share of the traces whose verdicts are the wrong ones."""

    def traces(self, num: int, seed: int, base: Traces) -> tuple[Traces, Asked]:
        """Questions of this world, each with 5 points; and what was known of them before."""
        rng = np.random.default_rng(seed)
        kind = rng.choice(KINDS, num, p=self.shares)
        hard = rng.normal(size=num) + np.array([-0.5, 0.0, 1.0])[kind] + np.array(self.harder)[kind]
        prompt = np.exp(4 + 0.5 * kind + 0.4 * rng.normal(size=num)).astype(int)
        gap = np.maximum(self.wordy * np.exp(4 + 0.4 * hard + 0.3 * rng.normal(size=num)), 9)
        right = rng.random(num) < 1 / (1 + np.exp(hard - 2))
        right ^= rng.random(num) < self.misjudged
        names = [f"{seed} {n}" for n in range(num)]
        noise = 0.2 * rng.normal(size=(num, 5))
        entropy = np.exp(0.3 * hard[:, None] + noise - 1 - self.certain).ravel()
        signals = dict.fromkeys(("entropy", "max_entropy"), entropy.astype(np.float32))
        signals |= dict.fromkeys(("logprob", "min_logprob"), -signals["entropy"])
        signals["margin"] = np.exp(-signals["entropy"])
        made = replace(
            base.select(np.zeros(num, np.int64)),
            trace_id=np.array(names),
            question_id=np.array(names),
            task=np.array(["a", "b", "c"])[kind],
            num_tokens=(6 * gap).astype(int),
            final_correct=right,
            position=np.outer(gap, np.arange(1, 6)).astype(int).ravel(),
            correct=np.repeat(right, 5),
            signals=signals,
        )
        return made, {name: ("", int(of)) for name, of in zip(names, prompt, strict=True)}


@pytest.fixture
def base(make_traces: Callable[..., Traces]) -> Traces:
    points = {"position": [1, 2, 3, 4, 5], "probe_tokens": [1] * 5, "answer": ["7"] * 5}
    points |= {"correct": [True] * 5, "confidence": [0.5] * 5, "answer_logprobs": [[]] * 5}
    return make_traces([points])


def config_of(traces: Traces, groups: tuple[str, ...] = GROUPS) -> HeadConfig:
    halting = Halting.of_recorder(traces.recorder, "always")
    return HeadConfig(observing_of(traces, groups, halting), halting, 0.0)


def told(base: Traces, now: World, num: int, seed: int, hides: bool = False) -> Drift:
    """What is told of a world that was the usual one before."""
    first, asked = World().traces(num, 2 * seed, base)
    second, more = now.traces(num, 2 * seed + 1, base)
    return drift_between(first, second, config_of(first), {} if hides else asked | more, seed)


CASES: dict[str, tuple[World, int, tuple[str, ...]]] = {
    "another mix": (World(shares=(0.2, 0.3, 0.5)), 200, ("questions",)),
    "one kind is harder": (World(harder=(0.0, 0.0, 2.0)), 200, ("questions",)),
    "surer": (World(certain=0.5), 200, ("LM",)),
    "shorter thoughts": (World(wordy=0.7), 500, ("LM",)),
    "misjudged": (World(misjudged=0.2), 500, ("scorer",)),
    "mix and LM": (World(shares=(0.2, 0.3, 0.5), certain=0.5), 200, ("questions", "LM")),
}


@pytest.mark.whole
@pytest.mark.parametrize("name", CASES)
def test_what_has_changed_is_told_in_nine_of_ten_cases(name: str, base: Traces) -> None:
    world, num, expected = CASES[name]
    found = Counter(told(base, world, num, seed).changed for seed in range(20))
    assert found[expected] >= 18, found


@pytest.mark.whole
def test_nothing_is_told_of_what_has_not_changed_more_often_than_the_level(base: Traces) -> None:
    alarms = sum(bool(told(base, World(), 60, seed).changed) for seed in range(100))
    assert alarms <= 100 * LEVEL + 3 * (100 * LEVEL * (1 - LEVEL)) ** 0.5


def test_what_recordings_tell_is_certain(base: Traces) -> None:
    first, _ = World().traces(40, 0, base)
    second, _ = World().traces(40, 1, base)
    drift = drift_between(first, replace(second, model=np.full(40, "b")), config_of(first), {})
    assert drift.changed == ("LM",) and "The LM is called b, and was lm." in str(drift)


def test_where_no_kind_of_question_came_before_nothing_is_known_of_the_lm(base: Traces) -> None:
    first, _ = World().traces(40, 0, base)
    second, _ = World(certain=2.0).traces(40, 1, base)
    drift = drift_between(first, replace(second, task=np.full(40, "z")), config_of(first), {})
    assert drift.changed == ("questions",) and drift.p_thoughts is None
    assert str(drift).endswith("so that nothing is known of the LM.")


def test_what_was_asked_counts_only_if_it_is_known_of_all(base: Traces) -> None:
    first, asked = World().traces(40, 0, base)
    second, more = World().traces(40, 1, base)
    known = {name: ("segment", of) for name, (_, of) in (asked | more).items()}
    some = {name: known[name] for name in more}  # older rows are deleted
    config = config_of(first)
    none = drift_between(first, second, config, {})
    assert drift_between(first, second, config, some) == none
    assert drift_between(first, second, config, known) != none


def test_a_question_counts_once_a_stretch_however_often_it_came(base: Traces) -> None:
    first, _ = World().traces(30, 0, base)
    again = replace(first, trace_id=np.char.add(first.trace_id, "'"))
    config = config_of(first)
    drift = drift_between(concatenate([first, again]), first, config, {})
    assert (drift.num_before, drift.num_now, drift.changed) == (30, 30, ())
    assert drift_between(first, first.select(np.zeros(30, bool)), config, {}).changed == ()


# On recorded traces of two reasoning LMs, whose names are taken from them


def nameless(traces: Traces) -> Traces:
    return replace(traces, model=np.full(len(traces), "lm"))


def misjudged(traces: Traces, share: float, rng: np.random.Generator) -> Traces:
    wrong = rng.random(len(traces)) < share
    points = traces.correct ^ wrong[traces.trace_of_point]
    return replace(traces, correct=points, final_correct=traces.final_correct ^ wrong)


def recorded_case(traces: Traces, seed: int) -> Mapping[str, tuple[Traces, Traces]]:
    """By what has changed, a stretch before, and one of other questions."""
    rng = np.random.default_rng(seed)
    lms = np.unique(traces.model)
    here, there = (traces.model == lms[(seed + k) % 2] for k in (0, 1))
    asked = rng.permutation(np.unique(traces.question_id))
    early = np.isin(traces.question_id, asked[: len(asked) // 2])
    hard, source = traces.task != "math500", traces.task == "math500"

    def of(rows: Any) -> Traces:
        one_seed = traces.seed == rng.choice(np.unique(traces.seed))
        return nameless(traces.select(rows & one_seed))

    return {
        "": (of(here & early), of(here & ~early)),
        "questions": (of(here & source), of(here & hard)),
        "LM": (of(here & early), of(there & ~early)),
        "scorer": (of(here & early), misjudged(of(here & ~early), 0.2, rng)),
    }


@pytest.mark.slow
def test_it_is_told_apart_on_recorded_traces(bench: Callable[[str], Path]) -> None:
    traces = read_traces(bench("r1_math_dev.parquet"))
    config = config_of(traces, ("pace", "confidence", "tokens", "agreement"))
    found: dict[str, Counter[str]] = {}
    for seed in range(40):
        for changed, (before, now) in recorded_case(traces, seed).items():
            drift = drift_between(before, now, config, {}, seed)
            found.setdefault(changed, Counter())["+".join(drift.changed)] += 1
    assert all(counts[changed] >= 36 for changed, counts in found.items()), found
