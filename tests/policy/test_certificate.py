"""Certificates: hand-computed cases, and how often they are wrong on known populations."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value
from numpy.typing import NDArray
from scipy.stats import binom

from evaluation.certify import (
    Measured,
    certify,
    certify_segments,
    fewest_questions,
    measure,
    measure_segments,
    most_saving,
    p_values,
    questions_needed,
    segments_to_test,
    smallest_drop,
)
from evaluation.outcome import Outcome, halt_outcome
from haltwise import Certificate, HaltHead, InputError
from haltwise.policy.certificate import SegmentCertificate
from policies.baselines import Confidence
from traces import Traces, read_traces

MakeTraces = Callable[..., Traces]
Float = NDArray[np.float64]

DELTA, DRAWS = 0.1, 1000


def population(risks: list[float], wins: float = 0.0, size: int = 10_000) -> Measured:
    """Questions that lose 1 with these probabilities and win 1 with another; looser saves more."""
    u = ((np.arange(size) + 0.5) / size)[:, None]
    lost = (u < np.array(risks) + wins).astype(np.float64)
    return Measured(lost - (u > 1 - wins), np.linspace(0.1, 0.8, len(risks)))


GENTLE = [0.002, 0.005, 0.01, 0.014, 0.018, 0.022, 0.026, 0.03, 0.04, 0.06]
JUST_ABOVE = [0.0201] * 10


def of_r1(path: Path) -> Measured:
    """Confidence thresholds on a real recording: 456 questions, 6 traces each."""
    traces = read_traces(path)
    policy = Confidence()
    signal = policy.signal(traces)
    assert signal is not None
    thresholds = 1 - np.geomspace(1e-4, 0.5, 12)
    halts = [policy.halts(signal, threshold) for threshold in thresholds]
    outcomes = [halt_outcome(traces, of, "always") for of in halts]
    return measure(traces, outcomes, "net-em-loss")


def choices(
    true: Measured, drop: float, num: int, delta: float = DELTA, seed: int = 0
) -> list[int | None]:
    """What is certified from each of 1,000 draws of questions, with replacement."""
    rng = np.random.default_rng(seed)
    found: list[int | None] = []
    for _ in range(DRAWS // 100):
        rows = rng.integers(len(true.losses), size=(num, 100))
        p = p_values(true.losses[rows], drop, delta)
        found += [most_saving(of, true.savings, delta) for of in p]
    return found


def wrong(true: Measured, drop: float, found: list[int | None]) -> NDArray[np.bool_]:
    risk = true.losses.mean(axis=0)
    return np.array([k is not None and risk[k] > drop for k in found])


def at_most(delta: float) -> float:
    """How often something may be seen in 1,000 draws that happens with probability `delta`."""
    return float(binom.ppf(0.999, DRAWS, delta)) / DRAWS


def some(found: list[int | None]) -> float:
    """In how many draws some saving is certified."""
    return 1 - found.count(None) / len(found)


@pytest.mark.parametrize("num", [150, 2000])
@pytest.mark.parametrize("wins", [0.0, 0.03])
@pytest.mark.parametrize("risks", [GENTLE, JUST_ABOVE])
def test_a_certificate_is_wrong_at_most_as_often_as_stated(
    risks: list[float], wins: float, num: int
) -> None:
    """Without wins the risk is right-to-wrong, with them it is the net loss."""
    true = population(risks, wins)
    found = choices(true, 0.02, num)
    assert wrong(true, 0.02, found).mean() <= at_most(DELTA)
    if risks is GENTLE and num == 2000:
        assert some(found) >= 0.9


@pytest.mark.parametrize("drop", [0.005, 0.01, 0.02])
def test_so_it_is_on_a_real_recording(bench: Callable[[str], Path], drop: float) -> None:
    true = of_r1(bench("r1_math_dev.parquet"))
    assert (true.losses.mean(axis=0) > drop).any()
    found = choices(true, drop, 456), choices(true, drop, 1500)
    assert max(wrong(true, drop, of).mean() for of in found) <= at_most(DELTA)
    assert some(found[1]) >= 0.9


def test_statements_on_segments_hold_together() -> None:
    segments = [population(GENTLE), population(JUST_ABOVE), population(JUST_ABOVE, 0.03)]
    found = [choices(of, 0.02, 400, DELTA / 3, seed) for seed, of in enumerate(segments)]
    any_wrong = np.any([wrong(of, 0.02, k) for of, k in zip(segments, found, strict=True)], axis=0)
    assert 0 < any_wrong.mean() <= at_most(DELTA)
    assert some(found[0]) >= 0.9


def test_choosing_by_what_was_observed_is_wrong_far_more_often() -> None:
    true = population(GENTLE, 0.03)
    rng = np.random.default_rng(0)
    naive = []
    for _ in range(200):
        losses = true.losses[rng.integers(len(true.losses), size=500)]
        within = np.flatnonzero(losses.mean(axis=0) <= 0.02)
        naive.append(int(within[-1]) if len(within) else None)
    assert wrong(true, 0.02, naive).mean() > 3 * DELTA


def test_a_certificate_of_all_questions_is_broken_in_a_hard_segment() -> None:
    """A fifth of the questions has all losses."""
    hard = population([4.5 * risk for risk in GENTLE], size=2500)
    both = Measured(np.concatenate([hard.losses, np.zeros((10_000, 10))]), hard.savings)
    found = choices(both, 0.02, 1000)
    assert wrong(both, 0.02, found).mean() <= at_most(DELTA)
    assert wrong(hard, 0.02, found).mean() > 0.8
    alone = choices(hard, 0.02, 200, DELTA / 2)
    assert wrong(hard, 0.02, alone).mean() <= at_most(DELTA / 2)


def test_of_losses_of_0_or_1_it_certifies_as_much_as_the_binomial_test() -> None:
    lost = np.random.default_rng(0).random((800, 1000)) < 0.01
    binomial = compute_hoeffding_bentkus_p_value(lost.mean(axis=0), 800, 0.02, binary=True)[:, 0]
    power = (p_values(lost.astype(np.float64), 0.02, DELTA) <= DELTA).mean()
    assert power == pytest.approx((binomial <= DELTA).mean(), abs=0.03)
    assert power > 0.75


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        # All is staked twice, at factors of 1 + 2 * 0.5: twice a doubling reaches 1 / 0.25.
        ([0.0, 0.0], 0.25),
        # pace sqrt(2 log 4 / (2 * 0.5)) = 1.665, damped 1.176: all is staked, and lost but 1e-9.
        ([1.0, 0.0], 1.0),
        # 1 + 2 * 0.5, then 2 log 2 / 0.5 gives the same pace: 1e-9 is left.
        ([0.0, 1.0], 1.0),
        # A win is a loss of -1: a factor of 1 + 2 * 1.5 reaches the goal, and no more is staked.
        ([-1.0, 0.0], 0.25),
        # Above the drop in the mean.
        ([-1.0, 1.0, 1.0, 1.0], 1.0),
    ],
)
def test_p_values_by_hand(losses: list[float], expected: float) -> None:
    assert p_values(np.array(losses), 0.5, 0.25) == pytest.approx(expected, rel=1e-4)


def test_a_bet_that_is_not_the_whole_capital_by_hand() -> None:
    """Drop and delta 0.5, losses 0 and 1; nothing is lacking of the spread, 0.5."""
    first = math.sqrt(2 * math.log(2) / (2 * 0.5))
    first /= 1 + first / 4
    second = math.sqrt(2 * math.log(2 / (1 + first)) / 0.5)
    second /= 1 + second / 4
    p = p_values(np.array([0.0, 1.0]), 0.5, 0.5)
    assert p == 1 / ((1 + first) * (1 - second)) == pytest.approx(0.8561, abs=1e-4)


def test_places_are_tests_of_their_own() -> None:
    losses = np.random.default_rng(0).choice(
        [-1.0, 0.0, 0.5, 1.0], (60, 3, 2), p=[0.2, 0.6, 0.1, 0.1]
    )
    p = p_values(losses, 0.2, DELTA)
    assert p.shape == (3, 2)
    assert p[2, 1] == p_values(losses[:, 2, 1], 0.2, DELTA)


def test_299_questions_without_a_loss_suffice_for_a_point_at_95_percent() -> None:
    for drop, delta, fewest in [(0.01, 0.05, 299), (0.02, 0.1, 114), (0.05, 0.1, 45)]:
        assert fewest_questions(drop, delta) == fewest
        assert p_values(np.zeros(fewest), drop, delta) <= delta
        assert p_values(np.zeros(fewest - 1), drop, delta) > delta
        assert all(p_values(np.zeros(num), drop, delta) <= delta for num in range(fewest, 400, 9))


def test_prices_are_certified_in_order_until_the_first_that_is_not() -> None:
    savings = np.array([-0.1, 0.3, 0.2, 0.9])
    assert most_saving(np.array([0.01, 0.1, 0.01, 0.2]), savings, 0.1) == 1
    assert most_saving(np.array([0.01, 0.1, 0.01, 0.1]), savings, 0.1) == 3
    assert most_saving(np.array([0.2, 0.01, 0.01, 0.01]), savings, 0.1) is None
    assert most_saving(np.array([0.01, 0.2, 0.01, 0.01]), savings, 0.1) is None  # saves nothing


def test_segments_share_the_error_as_long_as_their_questions_suffice() -> None:
    # At 0.1, 0.05 and 0.0333 a segment needs 45, 59 and 67 questions without a loss.
    assert [fewest_questions(0.05, 0.1 / k) for k in (1, 2, 3)] == [45, 59, 67]
    # As docs/YOUR_DATA.md has it.
    of_points = [fewest_questions(points / 100, 0.1) for points in (10, 5, 3, 2, 1)]
    assert of_points == [22, 45, 76, 114, 230]
    assert segments_to_test({"a": 60, "b": 59, "c": 66}, 0.05, 0.1) == ["c", "a"]
    assert segments_to_test({"a": 67, "b": 80, "c": 67}, 0.05, 0.1) == ["b", "a", "c"]
    assert segments_to_test({"a": 44, "b": 1}, 0.05, 0.1) == []
    measured = {
        name: Measured(np.zeros((num, 1)), np.array([0.5]))
        for name, num in {"a": 60, "b": 58, "c": 45}.items()
    }
    assert certify_segments(measured, 0.05, 0.1) == {"a": 0, "b": None, "c": None}


def test_each_of_two_segments_is_certified_at_half_of_the_error() -> None:
    losses = np.zeros((80, 1))
    losses[40] = 1
    saves = np.array([0.5])
    measured = {"a": Measured(losses, saves), "b": Measured(np.zeros((80, 1)), saves)}
    assert certify(measured["a"], 0.05, 0.1) == 0  # alone
    assert certify_segments(measured, 0.05, 0.1) == {"a": None, "b": 0}


def test_questions_needed_by_hand() -> None:
    """1 % lost, bound 2 %: (1.2816 + 0.8416)^2 (0.01 + 0.01 - 0.02^2) / 0.01^2 = 883.6."""
    one, savings = np.repeat([1.0, 0.0], [1, 99])[:, None], np.array([-0.1, 0.5])
    assert questions_needed(Measured(one, savings[1:]), 0.02, 0.1) == 884
    strict_first = np.concatenate([one, np.zeros((100, 1))], axis=1)
    assert questions_needed(Measured(strict_first, savings), 0.02, 0.1) == 884
    none = np.zeros((100, 2))  # 4.508 (0.02 - 0.02^2) / 0.02^2 = 220.9
    assert questions_needed(Measured(none, savings), 0.02, 0.1) == 221
    assert questions_needed(Measured(one, savings[:1]), 0.02, 0.1) is None  # nothing to save
    assert questions_needed(Measured(one, savings[1:]), 0.01, 0.1) is None  # no gap


def test_as_many_questions_as_planned_do_mostly_suffice() -> None:
    for true in (population([0.01]), population([0.01], 0.02), population([0.0], 0.05)):
        num = questions_needed(true, 0.02, DELTA)
        assert num is not None
        assert 0.75 <= some(choices(true, 0.02, num)) <= 0.97


def test_the_smallest_drop_is_where_certifying_begins() -> None:
    rng = np.random.default_rng(0)
    true = population(GENTLE, 0.03)
    measured = replace(true, losses=true.losses[rng.integers(len(true.losses), size=600)])
    smallest = smallest_drop(measured, 0.5, DELTA)
    assert smallest is not None and 0 < smallest < 0.05
    assert certify(measured, smallest, DELTA) is not None
    assert certify(measured, smallest - 1e-4, DELTA) is None
    assert smallest_drop(measured, smallest - 1e-4, DELTA) == smallest
    assert smallest_drop(measured, smallest, DELTA) == smallest
    assert smallest_drop(Measured(measured.losses, np.zeros(10)), 0.02, DELTA) is None


def test_a_question_s_loss_is_the_mean_over_its_traces(make_traces: MakeTraces) -> None:
    ends = [("a", True), ("a", True), ("a", False), ("b", False)]
    traces = make_traces(
        [{"question_id": q, "final_correct": right, "segment": None} for q, right in ends]
    )
    halted = np.ones(4, dtype=bool)
    ems = ([True, False, False, True], [False, False, True, False])
    outcomes = [Outcome(np.array(em), np.full(4, 300), halted) for em in ems]
    net = measure(traces, outcomes, "net-em-loss")
    assert sorted(net.losses.tolist()) == [[-1, 0], pytest.approx([1 / 3, 1 / 3])]
    assert net.savings.tolist() == [0.5, 0.5]
    lost = measure(traces, outcomes, "right-to-wrong")
    assert sorted(lost.losses.tolist()) == [[0, 0], pytest.approx([1 / 3, 2 / 3])]


def test_segments_are_measured_by_themselves(make_traces: MakeTraces) -> None:
    traces = make_traces([{"segment": "x"}, {"segment": ""}, {"segment": None}])
    outcome = Outcome(
        np.array([True, False, True]), np.array([300, 0, 600]), np.ones(3, dtype=bool)
    )
    found = measure_segments(traces, [outcome], "net-em-loss")
    assert list(found) == ["toy", "x"]  # the task where there is no segment
    assert sorted(found["toy"].losses[:, 0].tolist()) == [0, 1]
    assert {name: of.savings.tolist() for name, of in found.items()} == {"toy": [0.5], "x": [0.5]}


def certificate_of(head: HaltHead) -> Certificate:
    return Certificate(
        risk="net-em-loss",
        max_em_drop=0.02,
        confidence=0.9,
        price=0.5,
        saving=0.3,
        observed_loss=-0.01,
        num_questions=300,
        num_traces=600,
        traces="digest",
        lm="lm",
        head=head.digest,
        smallest_em_drop=0.0123,
        command="calibrate.py",
        segments=(
            SegmentCertificate("easy", 200, 0.75, 0.4, 0.0),
            SegmentCertificate("hard", 100, None, 0.0, 0.0),
        ),
    )


def certified(head: HaltHead) -> HaltHead:
    return HaltHead(replace(head.config, certificate=certificate_of(head)), head.weights)


def test_a_certificate_is_saved_and_loaded_with_its_head(
    run_head: HaltHead, tmp_path: Path
) -> None:
    certified(run_head).save(tmp_path)
    assert HaltHead.load(tmp_path).config.certificate == certificate_of(run_head)
    run_head.save(tmp_path)
    assert HaltHead.load(tmp_path).config.certificate is None


def test_a_segment_has_its_own_price_and_an_unknown_one_is_never_halted(
    run_head: HaltHead,
) -> None:
    certificate = certificate_of(run_head)
    assert [certificate.price_of(name) for name in ("easy", "hard", "new")] == [0.75, 0.0, 0.0]


def test_a_certificate_of_another_or_changed_head_is_refused(
    run_head: HaltHead, tmp_path: Path
) -> None:
    head = certified(run_head)
    other = run_head.weights | {"b1": run_head.weights["b1"] + 1}
    observing = replace(head.config.observing, mean=(0.5,) * 7)
    halting = replace(head.config.halting, decision_rule="every 60 tokens")
    for config, weights in [
        (head.config, other),
        (replace(head.config, observing=observing), head.weights),
        (replace(head.config, halting=halting), head.weights),
        (replace(head.config, threshold=0.4), head.weights),
    ]:
        with pytest.raises(InputError, match="the certificate is for another head"):
            HaltHead(config, weights)
    HaltHead(replace(head.config, default_price=2.0), head.weights)
    head.save(tmp_path / "certified")
    HaltHead(run_head.config, other).save(tmp_path / "other")
    (tmp_path / "other" / "head.json").write_bytes(
        (tmp_path / "certified" / "head.json").read_bytes()
    )
    with pytest.raises(InputError, match=r"other: head\.json and .* are not of one head"):
        HaltHead.load(tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"risk": "regret"}, "risk is 'regret'"),
        ({"max_em_drop": 0.0}, "drop in exact match is 0.0"),
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"price": -1.0}, "price is -1.0"),
        ({"price": None}, "expected 0 without a price"),
        ({"saving": 1.5}, "saving 1.5"),
        ({"observed_loss": 0.03}, "a loss above its own bound"),
        ({"num_questions": 0}, "0 questions"),
        ({"num_traces": 299}, "300 questions with 299 traces"),
        ({"smallest_em_drop": 1.0}, "smallest drop is 1.0"),
        ({"confidence": "high"}, "not readable"),
        ({"surprise": 1}, "not readable"),
        ({"segments": [{"segment": "easy"}]}, "not readable"),
    ],
)
def test_damaged_certificates_are_refused(
    change: dict[str, Any], told: str, run_head: HaltHead, tmp_path: Path
) -> None:
    certified(run_head).save(tmp_path)
    data = json.loads((tmp_path / "head.json").read_text())
    data["certificate"] |= change
    (tmp_path / "head.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=told):
        HaltHead.load(tmp_path)


def test_a_segment_is_named_once(run_head: HaltHead) -> None:
    certificate = certificate_of(run_head)
    with pytest.raises(InputError, match="twice"):
        replace(certificate, segments=certificate.segments[:1] * 2)
    data = json.loads(json.dumps(asdict(certificate)))
    assert Certificate.from_json(data) == certificate
