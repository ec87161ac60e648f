"""Hidden states: the projection by hand, learned from points, and in a head."""

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from agents.fit import FitConfig, _fit_fold, _Fold
from agents.pathwise import PathwiseConfig
from agents.ppo import PPOConfig
from envs.replay import availability, point_features, projection_of
from haltwise import (
    FeatureState,
    HaltHead,
    Halting,
    HaltMonitor,
    HeadConfig,
    InputError,
    Observing,
    Projection,
    Signals,
)
from policies.head import HeadPolicy
from policies.observing import observing_of
from tests.projections import some_projection
from traces import Traces

HALTING = Halting("at_halt", "every 50 tokens", "</think>", "source")
ONE = np.zeros(1, dtype=np.int64)
GROUPS = ("pace", "hidden")


def seen(states: list[list[float]]) -> Signals:
    hidden = np.array(states, dtype=np.float32)
    return Signals(np.full(len(states), 10), hidden=hidden)


def test_features_by_hand() -> None:
    directions = np.zeros((16, 17), dtype=np.float32)
    directions[0, :2] = 0.6, 0.8
    directions[1, 16] = -1
    center = np.zeros(17, dtype=np.float32)
    center[:2] = 1, 2
    state = FeatureState(2, ("hidden",), Projection(directions, center))
    first, second = [11.0, 7.0, *[9.0] * 14, 3.0], [1.0, 2.0, *[np.nan] * 15]
    features = state.update(seen([first, second]), np.array([1, 0]))
    assert state.names == tuple(f"hidden_{i}" for i in range(16))
    # 0.6 * (11 - 1) + 0.8 * (7 - 2) and -(3 - 0)
    assert features[0] == pytest.approx([10, -3] + [0] * 14)
    assert np.isnan(features[1]).all()


def line(size: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Points at 0, 1 .. 3000 on a line, and its direction."""
    direction = np.zeros(size)
    direction[3:5] = 0.6, -0.8
    return np.ones(size) + np.arange(3001)[:, None] * direction, direction


def test_points_on_a_line_spread_along_it() -> None:
    points, direction = line()
    projection = Projection.fit(points)
    assert projection.center == pytest.approx(1 + 1500 * direction, rel=1e-6)
    assert projection.directions[0] == pytest.approx(-direction, abs=1e-6)
    assert (projection.directions[1:] == 0).all()
    features = projection.features(points.astype(np.float32))
    assert features[:, 0] == pytest.approx(1500 - np.arange(3001.0), abs=1e-3)


def test_directions_are_the_principal_components() -> None:
    rng = np.random.default_rng(0)
    states = (rng.normal(size=(2500, 24)) @ rng.normal(size=(24, 24))).astype(np.float16)
    projection = Projection.fit(states)
    centered = states.astype(np.float64) - states.astype(np.float64).mean(axis=0)
    expected = np.linalg.svd(centered, full_matrices=False)[2][:16]
    cosines = (projection.directions * expected).sum(axis=1)
    assert np.abs(cosines) == pytest.approx(np.ones(16), abs=1e-5)
    largest = np.abs(projection.directions).argmax(axis=1)
    assert (projection.directions[np.arange(16), largest] > 0).all()
    assert Projection.fit(states) == projection
    assert hash(Projection.fit(states)) == hash(projection)
    assert Projection.fit(states[1:]) != projection


def test_one_point_has_no_direction() -> None:
    assert (Projection.fit(np.ones((1, 16))).directions == 0).all()


def test_what_cannot_be_projected_is_refused() -> None:
    with pytest.raises(InputError, match="hidden states have 15 values, expected at least 16"):
        Projection.fit(np.ones((3, 15)))
    with pytest.raises(InputError, match="no hidden states"):
        Projection.fit(np.ones((0, 16)))
    with pytest.raises(InputError, match="not finite"):
        Projection.fit(np.full((3, 16), np.nan))
    directions, center = np.zeros((16, 20), dtype=np.float32), np.zeros(20, dtype=np.float32)
    for wrong, told in (
        (
            (directions[:3], center),
            r"directions is \(\(3, 20\), .* expected \(\(16, 20\)",
        ),
        ((directions, center[:19]), r"directions is .* expected \(\(16, 19\)"),
        ((directions, center[None]), r"center is \(\(1, 20\)"),
        ((directions, center.astype(np.float64)), "center is .*float64"),
        ((directions, center + np.inf), "center has values that are not finite"),
        ((directions[:, :15], center[:15]), "15 values, expected at least 16"),
    ):
        with pytest.raises(InputError, match=told):
            Projection(*wrong)


def test_the_group_and_the_projection_come_together() -> None:
    projection = some_projection(16)
    with pytest.raises(InputError, match="no projection: feature group 'hidden' expects one"):
        FeatureState(1, GROUPS)
    with pytest.raises(InputError, match="a projection without feature group 'hidden'"):
        FeatureState(1, ("pace",), projection)
    with pytest.raises(InputError, match="no projection"):
        Observing(("hidden",), (0.0,) * 16, (1.0,) * 16, (0.1, 1.0))
    with pytest.raises(InputError, match="a projection without"):
        Observing(("pace",), (0.0,) * 3, (1.0,) * 3, (0.1, 1.0), projection)
    with pytest.raises(InputError, match="have 17 values, the head's projection expects 16"):
        FeatureState(1, GROUPS, projection).update(seen([[0.0] * 17]), ONE)
    with pytest.raises(InputError, match="signal 'hidden' is missing"):
        FeatureState(1, GROUPS, projection).update(Signals(ONE), ONE)


def test_small_states_are_no_feature_group(random_traces: Traces) -> None:
    small = random_traces.signals["hidden"][:, :15]
    traces = replace(random_traces, signals=random_traces.signals | {"hidden": small})
    assert "hidden" not in availability(traces, HALTING).groups
    with pytest.raises(InputError, match="15 values, expected at least 16"):
        projection_of(traces, GROUPS)


def test_a_projection_is_learned_from_the_states_that_are_known(random_traces: Traces) -> None:
    states = random_traces.signals["hidden"].copy()
    states[5, 7] = np.nan
    traces = replace(random_traces, signals=random_traces.signals | {"hidden": states})
    known = Projection.fit(np.delete(states, 5, axis=0))
    found = projection_of(traces, GROUPS)
    assert found is not None and np.array_equal(found.directions, known.directions)
    features = point_features(traces, GROUPS, projection=found)
    assert np.flatnonzero(~np.isfinite(features).all(axis=1)).tolist() == [5]
    nowhere = replace(traces, signals=traces.signals | {"hidden": np.full_like(states, np.nan)})
    with pytest.raises(InputError, match="column 'hidden' is missing or unknown everywhere"):
        point_features(nowhere, GROUPS, projection=some_projection(20))


def test_the_projection_is_that_of_the_training_points(random_traces: Traces) -> None:
    observing = observing_of(random_traces, GROUPS, HALTING)
    states = random_traces.signals["hidden"]
    assert observing.projection == Projection.fit(states)
    assert observing_of(random_traces, ("pace",), HALTING).projection is None
    features = point_features(random_traces, GROUPS, projection=observing.projection)
    assert features[:, 3:] == pytest.approx(observing.projection.features(states), abs=1e-6)
    # what is not looked at changes nothing, and labels are not
    told = replace(random_traces, correct=~random_traces.correct)
    assert observing_of(told, GROUPS, HALTING) == observing


def test_a_fold_learns_its_own_projection(
    random_traces: Traces, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    held_out = np.arange(len(random_traces)) % 2 == 0
    train, rest = random_traces.select(~held_out), random_traces.select(held_out)
    learned: list[np.ndarray] = []
    learn = Projection.fit

    def spy(states: np.ndarray) -> Projection:
        learned.append(states)
        return learn(states)

    whole = HeadConfig(observing_of(random_traces, GROUPS, HALTING), HALTING, 1.0)
    monkeypatch.setattr(Projection, "fit", spy)
    config = FitConfig(PathwiseConfig(2), PPOConfig(total_timesteps=0, net_width=4))
    (tmp_path / "traces.pickle").write_bytes(pickle.dumps(random_traces))
    decided = tmp_path / "0-0.npy"
    source = tmp_path / "traces.pickle"
    _fit_fold(_Fold(source, held_out, whole, config, (1.0,), 0, tmp_path, decided))
    assert np.load(decided).shape[2] == rest.num_points
    assert len(learned) == 1
    assert (learned[0] == train.signals["hidden"]).all()


@pytest.fixture
def hidden_head() -> HaltHead:
    """Halts where hidden_0 is positive."""
    observing = Observing(
        GROUPS, (0.0,) * 19, (1.0,) * 19, (0.1, 10.0), projection=some_projection(20)
    )
    w0 = np.zeros((1, observing.size), dtype=np.float32)
    w0[0, 3] = 1
    one, zero = np.ones((1, 1), dtype=np.float32), np.zeros(1, dtype=np.float32)
    weights = {"w0": w0, "b0": zero, "w1": one, "b1": zero, "w2": one, "b2": zero}
    return HaltHead(HeadConfig(observing, HALTING, default_price=1.0), weights)


def test_saved_and_loaded_the_head_is_the_same(hidden_head: HaltHead, tmp_path: Path) -> None:
    hidden_head.save(tmp_path)
    loaded = HaltHead.load(tmp_path)
    assert loaded.config == hidden_head.config
    projection, same = hidden_head.config.observing.projection, loaded.config.observing.projection
    assert projection is not None and same is not None
    assert projection.directions.tobytes() == same.directions.tobytes()
    assert projection.center.tobytes() == same.center.tobytes()
    assert "projection" not in (tmp_path / "head.json").read_text()
    tensors = load_file(tmp_path / "head.safetensors")
    assert tensors.keys() - loaded.weights.keys() == {"projection.directions", "projection.center"}
    before = {name: (tmp_path / name).read_bytes() for name in ("head.json", "head.safetensors")}
    loaded.save(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_a_head_without_its_projection_is_refused(
    hidden_head: HaltHead, run_head: HaltHead, tmp_path: Path
) -> None:
    zeros = {
        "projection.directions": np.zeros((16, 20), dtype=np.float32),
        "projection.center": np.zeros(20, dtype=np.float32),
    }
    small = {name: tensor[..., :15].copy() for name, tensor in zeros.items()}
    broken = zeros | {"projection.center": np.full(20, np.nan, dtype=np.float32)}
    one = {"projection.center": zeros["projection.center"]}
    for head, tensors, told in (
        (hidden_head, {}, "no projection"),
        (hidden_head, one, "not a readable head .*directions"),
        (hidden_head, zeros | {"projection.more": np.zeros(1)}, "not a readable head .*more"),
        (hidden_head, small, "15 values"),
        (hidden_head, broken, "not finite"),
        (run_head, zeros, "a projection without feature group"),
    ):
        head.save(tmp_path)
        save_file(head.weights | tensors, tmp_path / "head.safetensors")
        told_of = json.loads((tmp_path / "head.json").read_text())
        content = (tmp_path / "head.safetensors").read_bytes()
        told_of["weights"] = hashlib.sha256(content).hexdigest()
        (tmp_path / "head.json").write_text(json.dumps(told_of))
        with pytest.raises(InputError, match=told):
            HaltHead.load(tmp_path)


def test_monitor_and_replay_decide_alike(hidden_head: HaltHead, random_traces: Traces) -> None:
    policy = HeadPolicy(hidden_head)
    expected = policy.halts(policy.signal(random_traces), 1.0)
    assert 0.1 < expected.mean() < 0.9
    for n in range(5):
        monitor = HaltMonitor(hidden_head, 1)
        for at in range(random_traces.offsets[n], random_traces.offsets[n + 1]):
            states = random_traces.signals["hidden"][at : at + 1].astype(np.float32)
            signals = Signals(random_traces.position[at : at + 1], hidden=states)
            assert monitor.observe(signals, ONE)[0] == expected[at]


def test_a_state_that_is_unknown_goes_on_and_is_counted(hidden_head: HaltHead) -> None:
    monitor = HaltMonitor(hidden_head, 1, price=10.0)
    assert not monitor.observe(seen([[np.nan] * 20]), ONE)[0]
    assert monitor.num_bad_signals.tolist() == [1]
