from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.decision_path import decision_path
from haltwise import (
    FEATURE_GROUPS,
    FeatureState,
    HaltHead,
    InputError,
    Projection,
    Signals,
    answer_keys,
    feature_names,
)
from haltwise.policy.features import Columns, Feature, FeatureGroup, signals_of
from haltwise.policy.signals import Index
from tests.heads import random_head
from tests.projections import some_projection
from traces import Traces

GROUPS = tuple(FEATURE_GROUPS)
PROJECTION = some_projection(16)
ONE = np.zeros(1, dtype=np.int64)

# The features of one point, as all heads have known them since the groups have versions.
GOLDEN = """
log_position 4.4067192  log_point 2.1972246  log_gap 2.3025851  last_point 0
log_points_left 0.58667493  confidence_logit -1  confidence_max 2.4933827
confidence_mean -0.027723342  confidence_change -2.5771327  confidence_low -1.3132616
doubt -1.0701613  least_doubt -1.30317  log_probe 0.53824621  answered 1  log_run 0.69314718
run_share 0.11111111  top_share 0.55555558  leads 1  log_distinct 1.3862944  returned 1
entropy 0.493  entropy_mean 0.62077564  max_entropy 0.58778667  logprob -0.227
min_logprob -0.66834205  margin 0.32499999  margin_mean 0.36565682  end_think -0.048999999
end_think_max -0.045000002  end_think_mean -0.22639282  log_reflections 0.20048887
reflections_mean 0.37188646  log_reflections_all 1.7776606
"""


def signals(position: int, confidence: float, answer: str, **others: float) -> Signals:
    numbers = {
        "confidence": confidence,
        "worst_logprob": -0.5,
        "probe_tokens": 3,
        "entropy": 0.2,
        "max_entropy": 0.9,
        "logprob": -0.3,
        "min_logprob": -1.5,
        "margin": 0.8,
        "end_think_logprob": -4.0,
        "num_reflections": 1.0,
        "points_left": 5,
        "hidden": 0.5,  # in all places
    } | others
    columns = {name: np.array([number], dtype=np.float32) for name, number in numbers.items()}
    columns["hidden"] = np.tile(columns["hidden"], (1, 16))
    return Signals(np.array([position]), answer=answer_keys([answer]), **columns)  # type: ignore[arg-type]


def stream(points: list[tuple[int, float, str]], **others: list[float]) -> list[dict[str, float]]:
    """Features by name of each point; other signals by name, one number a point."""
    state = FeatureState(1, GROUPS, PROJECTION)
    seen = []
    for i, point in enumerate(points):
        now = {name: numbers[i] for name, numbers in others.items()}
        newest = signals(*point, **now)  # type: ignore[arg-type]
        features = state.update(newest, ONE)[0].tolist()
        seen.append(dict(zip(state.names, features, strict=True)))
    return seen


def three(**others: list[float]) -> list[dict[str, float]]:
    return stream([(1, 0.5, "a"), (2, 0.5, "b"), (3, 0.5, "a")], **others)


def test_pace_of_three_points() -> None:
    first, _, third = stream([(100, 0.5, "a"), (250, 0.5, "a"), (400, 0.5, "a")])
    assert first["log_position"] == pytest.approx(np.log(101))
    assert first["log_gap"] == pytest.approx(np.log(101))
    assert third["log_gap"] == pytest.approx(np.log(151))
    assert (first["log_point"], third["log_point"]) == pytest.approx((0, np.log(3)))


def test_confidence_of_three_points() -> None:
    first, second, third = stream([(1, 0.5, "a"), (2, 0.9, "a"), (3, 0.4, "a")])
    assert [p["confidence_logit"] for p in (first, second, third)] == pytest.approx(
        [0, np.log(9), np.log(2 / 3)], abs=1e-6
    )
    assert third["confidence_max"] == pytest.approx(np.log(9), rel=1e-6)
    assert second["confidence_mean"] == pytest.approx(0.3 * np.log(9), rel=1e-6)
    assert third["confidence_change"] == pytest.approx(np.log(2 / 27), rel=1e-6)
    assert third["confidence_low"] == pytest.approx(np.log(0.4), rel=1e-6)


def test_guesses_are_not_told_apart() -> None:
    low, lower = (stream([(1, confidence, "a")])[0] for confidence in (0.26, 0.01))
    assert low == lower and low["confidence_logit"] == -1
    assert low["confidence_low"] == pytest.approx(-np.log(1 + np.e), rel=1e-6)


def test_extreme_confidences_stay_finite() -> None:
    for confidence in (0.0, 1.0):
        assert np.isfinite(list(stream([(1, confidence, "a")])[0].values())).all()


def test_agreement_as_answers_change_and_return() -> None:
    points = stream([(i + 1, 0.5, a) for i, a in enumerate(["a", "b", "b", "", "a", "b"])])
    columns = ("answered", "log_run", "run_share", "top_share", "leads", "log_distinct", "returned")
    seen = [[round(p[c], 3) for c in columns] for p in points]
    log2, log3 = round(np.log(2), 3), round(np.log(3), 3)
    assert seen == [
        [1, log2, 1, 1, 1, log2, 0],
        [1, log2, 0.5, 0.5, 1, log3, 0],
        [1, log3, round(2 / 3, 3), round(2 / 3, 3), 1, log3, 0],
        [0, 0, 0, 0.5, 0, log3, 0],
        [1, log2, 0.2, 0.4, 1, log3, 1],
        [1, log2, round(1 / 6, 3), 0.5, 1, log3, 1],
    ]


def test_many_points_keep_the_whole_history() -> None:
    points = stream(
        [(i + 1, 0.5, "a" if i == 0 else f"b{i}") for i in range(20)] + [(30, 0.5, "a")]
    )
    assert points[-1]["returned"] == 1
    assert points[-1]["log_distinct"] == pytest.approx(np.log(21))


def test_a_missing_confidence_spoils_its_own_point_only() -> None:
    _, missing, after = stream([(1, 0.9, "a"), (2, np.nan, "a"), (3, 0.9, "a")])
    assert np.isnan(missing["confidence_logit"])
    assert missing["log_run"] == pytest.approx(np.log(3))
    assert after["confidence_change"] == pytest.approx(0, abs=1e-6)
    assert after["confidence_mean"] == pytest.approx(np.log(9), rel=1e-6)


answers = st.lists(st.sampled_from(["", "1", "2", "3"]), min_size=1, max_size=12)


@pytest.mark.whole
@settings(deadline=None)
@given(st.lists(answers, min_size=1, max_size=4), st.randoms())
def test_a_row_of_a_batch_is_as_it_would_be_alone(rows: list[list[str]], random: object) -> None:
    state = FeatureState(len(rows), GROUPS, PROJECTION)
    for i in range(max(map(len, rows))):
        at = np.array([n for n, row in enumerate(rows) if len(row) > i])
        random.shuffle(at)  # type: ignore[attr-defined]
        each = [signals(10 * i + 10, 0.7, rows[n][i]) for n in at]
        batch = {
            name: np.concatenate([getattr(one, name) for one in each])
            for name in signals_of(GROUPS)
        }
        together = state.update(Signals(**batch), at)
        for features, n in zip(together, at, strict=True):
            alone = stream([(10 * j + 10, 0.7, a) for j, a in enumerate(rows[n][: i + 1])])[-1]
            assert features.tolist() == list(alone.values())


def test_doubt_is_the_chance_that_the_worst_token_is_wrong() -> None:
    first, second, third = three(worst_logprob=[np.log(0.9), np.log(0.5), np.log(0.75)])
    assert [p["doubt"] for p in (first, second, third)] == pytest.approx(
        np.log([0.1, 0.5, 0.25]), rel=1e-5
    )
    # "a" was doubted least at its first point
    assert third["least_doubt"] == pytest.approx(np.log(0.1), rel=1e-5)
    assert second["least_doubt"] == pytest.approx(np.log(0.5), rel=1e-5)
    assert first["log_probe"] == pytest.approx(np.log(4))


def test_an_answer_without_tokens_is_doubted_most() -> None:
    none, some = stream([(1, 0.0, ""), (2, 0.5, "a")], worst_logprob=[np.nan, np.nan])
    assert (none["doubt"], none["least_doubt"]) == (0, 0)
    assert np.isnan(some["doubt"])


def test_certain_tokens_leave_doubt_finite() -> None:
    assert three(worst_logprob=[0, 0, 0])[0]["doubt"] == pytest.approx(np.log(1e-6))


def test_the_last_point_is_known() -> None:
    points = three(points_left=[2, 1, 0])
    assert [p["last_point"] for p in points] == [0, 0, 1]
    assert [p["log_points_left"] for p in points] == pytest.approx(np.log([3, 2, 1]))


def test_the_distribution_has_means() -> None:
    points = three(entropy=[1, 0, 0], margin=[0, 1, 1], max_entropy=[1, 2, 3])
    assert [p["entropy"] for p in points] == [1, 0, 0]
    assert [p["entropy_mean"] for p in points] == pytest.approx([1, 0.7, 0.49])
    assert [p["margin_mean"] for p in points] == pytest.approx([0, 0.3, 0.51])
    assert points[2]["max_entropy"] == pytest.approx(np.log(4))
    assert points[0]["min_logprob"] == pytest.approx(-np.log(2.5))
    assert points[0]["logprob"] == pytest.approx(-0.3)


def test_the_end_of_the_thought_comes_nearer() -> None:
    points = three(end_think_logprob=[-4, -1, -3])
    assert [p["end_think_max"] for p in points] == [-4, -1, -1]
    assert points[1]["end_think_mean"] == pytest.approx(0.7 * -4 + 0.3 * -1)


def test_reflections_are_counted() -> None:
    points = three(num_reflections=[1, 0, 2])
    assert [p["log_reflections"] for p in points] == pytest.approx(np.log([2, 1, 3]))
    assert [p["log_reflections_all"] for p in points] == pytest.approx(np.log([2, 2, 4]))
    assert points[1]["reflections_mean"] == pytest.approx(0.7 * np.log(2))


@pytest.mark.parametrize(
    "name", sorted(set(signals_of(GROUPS)) - {"answer", "position", "confidence"})
)
def test_a_signal_that_is_unknown_once_spoils_that_point_only(name: str) -> None:
    numbers = [np.nan if i == 1 else 0.25 for i in range(3)]
    before, missing, after = three(**{name: numbers})
    assert np.isfinite([*before.values(), *after.values()]).all()
    assert np.isnan(list(missing.values())).any()


def test_a_signal_that_nobody_looked_at_is_named() -> None:
    with pytest.raises(InputError, match="'entropy' is missing"):
        FeatureState(1, ("pace", "distribution")).update(Signals(ONE), ONE)


def test_reset_forgets() -> None:
    state = FeatureState(2, GROUPS, PROJECTION)
    fresh = state.update(signals(5, 0.3, "x"), ONE)
    state.update(signals(9, 0.8, "y"), ONE)
    state.reset(ONE)
    assert (state.update(signals(5, 0.3, "x"), ONE) == fresh).all()


def test_answer_keys_tell_answers_apart() -> None:
    keys = answer_keys(["7", "", "7", "8", "\ud800"])
    assert keys[0] == keys[2] != keys[3]
    assert keys[1] == 0 and len(set(keys.tolist())) == 4


@pytest.mark.parametrize("groups", [(), ("pace", "mood"), ("pace", "pace")])
def test_groups_that_make_no_features_are_refused(groups: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="pace"):
        feature_names(groups)


def test_features_of_random_signals_are_as_they_always_were() -> None:
    """A change of these numbers needs a new version of their group."""
    rng = np.random.default_rng(5)
    names = set(signals_of(GROUPS)) - {"position", "confidence", "answer", "hidden"}
    others: dict[str, Any] = {name: rng.random(9).round(3) for name in sorted(names)}
    others |= {name: -values for name, values in others.items() if "logprob" in name}
    points = [(9 * i + 9, float(rng.random()), str(rng.integers(3))) for i in range(9)]
    last = stream(points, **others)[-1]
    words = GOLDEN.split()
    assert words[::2] == list(feature_names(GROUPS[:-1]))  # all but the hidden states'
    for name, value in zip(words[::2], words[1::2], strict=True):
        assert last[name] == pytest.approx(float(value), rel=2e-6), name


class Hedging(FeatureGroup):
    """As a contributor would write it."""

    version = 1
    features = (Feature("hedges", "hedges more", "hedges less"),)
    signals = ("num_reflections",)

    def __init__(self, num_rows: int, projection: Projection | None) -> None:
        self._all = np.zeros(num_rows)

    def update(self, signals: Any, rows: Index) -> Columns:
        self._all[rows] += signals.num_reflections
        return (self._all[rows],)


def test_a_new_group_is_one_entry_and_refuses_no_head(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_traces: Callable[..., Traces]
) -> None:
    shipped = Path(__file__).parents[2] / "checkpoints" / "embedded-head"
    random_head(0, ("pace", "agreement")).save(tmp_path / "old")
    monkeypatch.setitem(FEATURE_GROUPS, "hedging", Hedging)
    for old in (shipped, tmp_path / "old"):
        HaltHead.load(old)
    head = random_head(0, ("pace", "hedging"))
    head.save(tmp_path / "new")
    assert HaltHead.load(tmp_path / "new").config.features[-1] == "hedges"

    state = FeatureState(1, ("hedging",))
    assert [state.update(signals(i, 0.5, "a"), ONE)[0, 0] for i in (1, 2)] == [1, 2]
    state.reset(ONE)
    assert state.update(signals(1, 0.5, "a"), ONE)[0, 0] == 1

    trace = make_traces([{"num_reflections": [1.0, 0.0, 2.0]}])
    assert "hedges more" in decision_path(trace, head, 0.1)
