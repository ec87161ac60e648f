import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haltwise import FEATURE_GROUPS, FeatureState, InputError, Signals, answer_keys, feature_names

GROUPS = tuple(FEATURE_GROUPS)
ONE = np.zeros(1, dtype=np.int64)


def signals(position: int, confidence: float, answer: str) -> Signals:
    return Signals(
        np.array([position]), np.array([confidence], dtype=np.float32), answer_keys([answer])
    )


def stream(points: list[tuple[int, float, str]]) -> list[dict[str, float]]:
    state = FeatureState(1, GROUPS)
    return [
        dict(zip(state.names, state.update(signals(*p), ONE)[0].tolist(), strict=True))
        for p in points
    ]


def test_pace_of_three_points() -> None:
    first, _, third = stream([(100, 0.5, "a"), (250, 0.5, "a"), (400, 0.5, "a")])
    assert first["log_position"] == pytest.approx(np.log(101))
    assert first["log_gap"] == pytest.approx(np.log(101))
    assert third["log_gap"] == pytest.approx(np.log(151))
    assert (first["log_point"], third["log_point"]) == pytest.approx((0, np.log(3)))


def test_confidence_of_three_points() -> None:
    first, second, third = stream([(1, 0.5, "a"), (2, 0.9, "a"), (3, 0.2, "a")])
    assert [p["confidence_logit"] for p in (first, second, third)] == pytest.approx(
        [0, np.log(9), np.log(0.25)], abs=1e-6
    )
    assert third["confidence_max"] == pytest.approx(np.log(9), rel=1e-6)
    assert second["confidence_mean"] == pytest.approx(0.3 * np.log(9), rel=1e-6)
    assert third["confidence_change"] == pytest.approx(np.log(0.25 / 9), rel=1e-6)
    assert third["confidence_low"] == pytest.approx(np.log(0.2), rel=1e-6)


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


@given(st.lists(answers, min_size=1, max_size=4), st.randoms())
def test_a_row_of_a_batch_is_as_it_would_be_alone(rows: list[list[str]], random: object) -> None:
    state = FeatureState(len(rows), GROUPS)
    for i in range(max(map(len, rows))):
        at = np.array([n for n, row in enumerate(rows) if len(row) > i])
        random.shuffle(at)  # type: ignore[attr-defined]
        batch = Signals(
            np.full(len(at), 10 * i + 10),
            np.full(len(at), 0.7, dtype=np.float32),
            answer_keys([rows[n][i] for n in at]),
        )
        together = state.update(batch, at)
        for features, n in zip(together, at, strict=True):
            alone = stream([(10 * j + 10, 0.7, a) for j, a in enumerate(rows[n][: i + 1])])[-1]
            assert features.tolist() == list(alone.values())


def test_reset_forgets() -> None:
    state = FeatureState(2, GROUPS)
    fresh = state.update(signals(5, 0.3, "x"), ONE)
    state.update(signals(9, 0.8, "y"), ONE)
    state.reset(ONE)
    assert (state.update(signals(5, 0.3, "x"), ONE) == fresh).all()


def test_answer_keys_tell_answers_apart() -> None:
    keys = answer_keys(["7", "", "7", "8", "\ud800"])
    assert keys[0] == keys[2] != keys[3]
    assert keys[1] == 0 and len(set(keys.tolist())) == 4


@pytest.mark.parametrize("groups", [(), ("pace", "mood")])
def test_unknown_groups_are_refused(groups: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="pace"):
        feature_names(groups)
