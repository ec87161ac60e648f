import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from evaluation.compare import compare
from evaluation.honest import CONFIDENCE, chosen_points, honest_point, honest_rows, price_words
from evaluation.outcome import Outcome, never_outcome
from evaluation.protocol import operating_point
from evaluation.rows import to_json
from evaluation.table import format_honest
from haltwise import InputError
from policies.baselines import Budget, Entropy
from traces import Traces

MakeTraces = Callable[..., Traces]

NUM = 400
# How often halting at each of four prices turns a right answer wrong, and a wrong one right. Nine
# of ten answers are right, so that the losses of EM are 0.1, 0.6, 1.1 and 3.3 points.
PRICES = (0.1, 0.2, 0.4, 0.8)
LOSES, WINS = np.array([0.002, 0.01, 0.02, 0.05]), np.array([0.008, 0.03, 0.07, 0.12])
TRUE_LOSS = 0.9 * LOSES - 0.1 * WINS


@pytest.fixture
def asked(make_traces: MakeTraces) -> Traces:
    return make_traces([{"trace_id": f"t{n}", "question_id": f"q{n}"} for n in range(NUM)])


def drawn(traces: Traces, rng: np.random.Generator) -> tuple[Traces, dict[float, Outcome]]:
    """Draws answers of the population above, and what every price makes of them."""
    right, luck = rng.random(len(traces)) < 0.9, rng.random(len(traces))
    outcomes = {}
    for k, price in enumerate(PRICES):
        em = np.where(right, luck >= LOSES[k], luck < WINS[k])
        cost = traces.num_tokens * (0.9 - 0.2 * k)
        outcomes[price] = Outcome(em, cost, np.ones(len(traces), dtype=bool))
    return replace(traces, final_correct=right), outcomes


@pytest.mark.parametrize("num_draws", [60, pytest.param(1_000, marks=pytest.mark.slow)])
def test_what_is_promised_is_kept_as_often_as_is_said(asked: Traces, num_draws: int) -> None:
    rng, broken = np.random.default_rng(0), np.zeros(2)
    loss_at = dict(zip(PRICES, TRUE_LOSS, strict=True)) | {None: 0.0}
    found = []
    for _ in range(num_draws):
        traces, outcomes = drawn(asked, rng)
        chosen = [choose(traces, outcomes, 0.01) for choose in (honest_point, operating_point)]
        broken += [loss_at[at] > 0.01 for at in chosen]
        found.append(chosen[0])
    share = broken / num_draws
    assert share[0] <= 1 - CONFIDENCE + 3 * np.sqrt(0.09 / num_draws)
    assert share[1] > 0.3  # the point estimate promises what it does not keep
    assert sum(at is not None for at in found) > 0.5 * num_draws  # and yet it saves something


def test_strict_parameters_are_tested_first_whichever_end_they_are_at(asked: Traces) -> None:
    traces, outcomes = drawn(asked, np.random.default_rng(1))
    turned = {-at: outcome for at, outcome in outcomes.items()}
    found = honest_point(traces, outcomes, 0.03)
    assert found == 0.4
    assert honest_point(traces, turned, 0.03) == -found


def test_it_is_told_in_words_and_in_a_table(asked: Traces, make_traces: MakeTraces) -> None:
    traces, outcomes = drawn(asked, np.random.default_rng(1))
    sweeps = {"head": outcomes, "entropy": None, "confidence": outcomes, "random": outcomes}
    rows = honest_rows(traces, "dev", sweeps, never_outcome(traces))
    assert [(row.policy, row.gate, row.confidence) for row in rows] == [
        ("head", 0.01, 0.9),
        ("confidence", 0.01, 0.9),
    ]
    assert rows[0].saving == pytest.approx(0.1) and rows[0].parameter == 0.1
    assert format_honest(rows).splitlines()[2].split()[:2] == ["head", "0.1"]
    said = "To lose at most 1 point on new questions of this kind too, by an estimate: "
    own, promised, last = price_words(0.4, [], rows, traces, "Serve it.").splitlines()
    assert own == (
        "The head's own price is 0.4, which lost nothing on the questions that it was chosen on: a "
        "request that names no price takes it. Serve it."
    )
    num = len(np.unique(traces.question_id))
    saves = f"which saves 10.0 % on the {num:,} questions that it was chosen on"
    name_it = "name it (price=0.1, or haltwise serve --price 0.1 for a head that servers take)."
    assert promised == f"{said}a price of 0.1, {saves}, and is not the head's own: {name_it}"
    # The test's 90 % are about the heads of folds, and none of them is served.
    assert "90" not in promised and last.startswith("That is an estimate and no certificate: ")
    assert "calibrate.py --apply gives this one a price that is certified" in last
    _, promised, _ = price_words(0.1, [], rows, traces).splitlines()
    assert promised == f"{said}a price of 0.1, {saves}, and is the head's own."
    by_segment = price_words(0.1, ["b", "a"], rows, traces)
    assert "takes it; one that names its segment (a, b) takes that of the segment." in by_segment
    few = make_traces([{}] * 20)
    halted = {0.1: Outcome(few.final_correct, few.num_tokens * 0.5, np.ones(20, dtype=bool))}
    rows = honest_rows(few, "dev", {"head": halted}, never_outcome(few))
    assert rows[0].parameter is None and rows[0].saving == 0
    own, promised, _ = price_words(0.0, [], rows, few).splitlines()
    assert own == "The head's own price is 0: of a request that names no price it halts nothing."
    assert promised == (
        f"{said}no price; without a single loss that takes 230 questions, here are 20."
    )


def test_honest_points_are_judged_on_other_questions_as_they_were_chosen(
    asked: Traces, make_traces: MakeTraces
) -> None:
    traces, outcomes = drawn(asked, np.random.default_rng(1))
    rows = honest_rows(traces, "dev", {"head": outcomes, "budget": outcomes}, never_outcome(traces))
    read = json.loads(json.dumps(to_json(rows)))
    points = chosen_points(read)
    assert points == {0.01: {"head": 0.1, "budget": 0.1}}
    test = make_traces([{"final_correct": n > 0} for n in range(4)])
    budget = {0.01: {"budget": 260.0, "entropy": 0.5, "random": None}}
    found = compare(
        test, "test", {"budget": [Budget()], "entropy": [Entropy()]}, {}, "at_halt", budget
    )
    # Halted at the 260th token, so at the first point from there on: at 400, with a look of 11.
    (row,) = found.honest
    assert (row.policy, row.split, row.parameter, row.gate) == ("budget", "test", 260.0, 0.01)
    assert row.saving == pytest.approx(1 - 411 / 600) and row.em_delta == pytest.approx(0.25)
    wrong: list[Any] = [{}, {"gate": "x", "policy": "head", "parameter": 1}, 3]
    for one in wrong:
        with pytest.raises(InputError, match="honest points are not readable"):
            chosen_points([one])
