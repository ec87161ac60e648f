"""Every number of a frozen row, by hand."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from evaluation import frozen as frozen_rows
from evaluation.frozen import AtPoint, choose_points, strongest
from evaluation.intervals import Resamples, interval
from evaluation.outcome import Outcome, halt_outcome, never_outcome
from evaluation.rows import FrozenRow, MissingPoint, to_json
from evaluation.table import format_table
from tests.evaluation.reports import frozen, known, made_frozen
from traces import Traces

MakeTraces = Callable[..., Traces]
Row = dict[str, Any]

# The worked example; one that is right at first and wrong at last; one that is never right; and
# one without a decision point. 1,200 tokens, half of the final answers are right.
FOUR: list[Row] = [
    {},
    {
        "num_tokens": 200,
        "final_correct": False,
        "position": [50, 100],
        "probe_tokens": [5, 5],
        "answer": ["7", "3"],
        "correct": [True, False],
        "confidence": [0.5, 0.5],
        "answer_logprobs": [[], []],
    },
    {
        "num_tokens": 300,
        "final_correct": False,
        "position": [100],
        "probe_tokens": [10],
        "answer": ["3"],
        "correct": [False],
        "confidence": [0.5],
        "answer_logprobs": [[]],
    },
    {
        "num_tokens": 100,
        "position": [],
        "probe_tokens": [],
        "answer": [],
        "correct": [],
        "confidence": [],
        "answer_logprobs": [],
    },
]


def report_rows(*args: Any) -> tuple[list[Row], list[Row]]:
    """The rows, as they are written."""
    rows, frozen = frozen_rows.report_rows(*args)
    return to_json(rows), to_json(frozen)


@pytest.fixture
def four(make_traces: MakeTraces) -> Traces:
    return make_traces(FOUR)


def rules(traces: Traces) -> dict[str, Outcome]:
    return {
        "never": never_outcome(traces),
        "hindsight": halt_outcome(traces, traces.correct, "always"),
    }


def frozen_at_best(
    traces: Traces, sweeps: Mapping[str, Mapping[float, Outcome] | None]
) -> dict[str, Row]:
    """Frozen rows by policy; each at the first parameter of its sweep."""
    points = {name: AtPoint(*next(iter(swept.items()))) for name, swept in sweeps.items() if swept}
    _, frozen = report_rows(traces, "test", sweeps, {0.0: points}, rules(traces))
    return {row["policy"]: row for row in frozen}


def flat(traces: Traces, em_delta: float, saving: float) -> Outcome:
    """The same change and saving on every trace: no resample differs."""
    return Outcome(
        traces.final_correct + em_delta,
        (1 - saving) * traces.num_tokens,
        np.ones(len(traces), dtype=bool),
    )


def test_always_halting_comes_out_exactly(four: Traces) -> None:
    always = halt_outcome(four, np.ones(6, dtype=bool), "always")
    assert always.cost.tolist() == [110, 55, 110, 100]
    row = frozen_at_best(four, {"head": {1.0: always}})["head"]
    expected = {
        "policy": "head",
        "parameter": 1.0,
        "split": "test",
        "gate": 0.0,
        "em": 0.5,
        "em_delta": 0.0,
        "tokens": 375 / 4,
        "saving": 825 / 1200,
        "halt_rate": 0.75,
        "right_to_wrong": 0.25,
        "wrong_to_right": 0.25,
        "gave_up": 0.5,
        "hopeless_saving": 190 / 1200,
        "head_em_lead": 0.0,
        "head_saving_lead": 0.0,
        "saving_at_head_em": 825 / 1200,
        "head_lead_at_equal_em": 0.0,
        "hindsight_share": 825 / 463,  # which spends 272 + 55 + 310 + 100 = 737
        "area": 0.05 * 825 / 1200,  # its only point: never halting's EM for 375 tokens
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)


def test_the_rules_come_out_exactly(four: Traces) -> None:
    everywhere = halt_outcome(four, np.ones(6, dtype=bool), "always")
    found = frozen_at_best(four, {"head": {1.0: everywhere}})
    never, hindsight = found["never"], found["hindsight"]
    zero = ("saving", "em_delta", "halt_rate", "right_to_wrong", "gave_up", "hopeless_saving")
    assert {never[name] for name in (*zero, "hindsight_share")} == {0.0}
    assert never["tokens"] == 300
    assert never["em_delta_interval"] == never["saving_interval"] == [0.0, 0.0]
    assert (never["head_em_lead"], never["head_saving_lead"]) == (0.0, 825 / 1200)
    assert hindsight["em"] == 0.75 and hindsight["saving"] == pytest.approx(463 / 1200)
    assert hindsight["hopeless_saving"] == pytest.approx(-10 / 1200)
    assert (hindsight["right_to_wrong"], hindsight["gave_up"]) == (0.0, 0.0)
    assert hindsight["hindsight_share"] == 1.0
    # Of 10,000 resamples, some draw the trace that is never right four times: nothing to share.
    assert hindsight["hindsight_share_interval"] is None
    assert hindsight["head_em_lead"] == -0.25
    assert hindsight["head_saving_lead"] == pytest.approx((825 - 463) / 1200)
    for row in (never, hindsight):
        assert row["head_lead_at_equal_em"] is row["saving_at_head_em"] is row["area"] is None


def test_probing_and_never_halting_pays_its_probes(four: Traces) -> None:
    nowhere = np.zeros(6, dtype=bool)
    probing, blind = (halt_outcome(four, nowhere, how) for how in ("always", "at_halt"))
    found = frozen_at_best(four, {"head": {1.0: probing}, "budget": {1.0: blind}})
    assert found["head"]["saving"] == pytest.approx(-53 / 1200)
    assert found["head"]["saving_interval"][1] < 0
    assert found["head"]["em_delta_interval"] == [0.0, 0.0]
    assert found["head"]["area"] == 0.0
    assert found["budget"]["saving"] == found["budget"]["em_delta"] == 0.0
    assert found["budget"]["head_saving_lead"] == pytest.approx(-53 / 1200)
    assert found["head"]["saving_at_head_em"] == 0.0  # its frontier holds never halting


def test_nothing_is_a_share_of_no_hindsight_saving(make_traces: MakeTraces) -> None:
    traces = make_traces([{"correct": [False] * 3}] * 2)  # hindsight probes, and never halts
    found = frozen_at_best(traces, {"head": {1.0: flat(traces, 0, 0.5)}})
    assert found["head"]["hindsight_share"] is found["head"]["hindsight_share_interval"] is None


def test_the_lead_at_equal_em_is_over_the_frontier(make_traces: MakeTraces) -> None:
    # The head loses 0.1 and saves 0.5; the frontier goes straight from (0, 0.1) to (-0.2, 0.8).
    traces = make_traces([{}] * 5)
    swept = {1.0: flat(traces, -0.2, 0.8), 2.0: flat(traces, 0, 0.1), 3.0: flat(traces, -0.2, 0.3)}
    found = frozen_at_best(traces, {"head": {1.0: flat(traces, -0.1, 0.5)}, "budget": swept})
    row = found["budget"]
    assert row["saving_at_head_em"] == pytest.approx(0.45)
    assert row["head_lead_at_equal_em"] == pytest.approx(0.05)
    assert row["head_lead_at_equal_em_interval"] == pytest.approx([0.05, 0.05])
    assert row["head_saving_lead"] == pytest.approx(-0.3)
    assert row["head_em_lead"] == pytest.approx(0.1)
    assert row["area"] == pytest.approx(0.05 * 0.1)  # never halting's EM for 0.9 of its tokens


def test_a_policy_without_that_em_is_read_at_its_highest(make_traces: MakeTraces) -> None:
    traces = make_traces([{"final_correct": False}] * 5)
    swept = {1.0: flat(traces, 0.05, 0.2), 2.0: flat(traces, 0, 0.25)}
    found = frozen_at_best(traces, {"head": {1.0: flat(traces, 0.1, 0.3)}, "budget": swept})
    row = found["budget"]
    assert row["saving_at_head_em"] is None
    assert row["head_lead_at_equal_em"] == pytest.approx(0.1)
    assert row["head_lead_at_equal_em_interval"] == pytest.approx([0.1, 0.1])


def test_the_frontier_is_built_anew_in_every_resample(random_traces: Traces) -> None:
    """Interval columns, against one resample after the other and a sorted frontier."""
    rng = np.random.default_rng(3)
    made = [
        halt_outcome(random_traces, rng.random(random_traces.num_points) < rate, "at_halt")
        for rate in (0.1, 0.05, 0.2, 0.5)
    ]
    sweeps = {"head": {1.0: made[0]}, "random": dict(zip([1.0, 2.0, 3.0], made[1:], strict=True))}
    found = frozen_at_best(random_traces, sweeps)
    row = found["random"]
    resamples = Resamples.draw(random_traces.question_id)
    leads, shares = [], []
    possible = halt_outcome(random_traces, random_traces.correct, "always")
    for drawn in resamples.counts[:, resamples.question].astype(float):
        tokens = drawn @ random_traces.num_tokens
        delta, saved = (
            np.array([values @ drawn for values in columns])
            for columns in (
                [outcome.em * 1 - random_traces.final_correct for outcome in made],
                [random_traces.num_tokens - outcome.cost for outcome in (*made, possible)],
            )
        )
        frontier: list[tuple[float, float]] = []
        for saving, em in sorted([*zip(saved[1:4], delta[1:], strict=True), (0, 0)], reverse=True):
            if not frontier or em > frontier[-1][0]:
                frontier.append((em, saving))
        deltas, savings = np.array(frontier).T
        leads.append((saved[0] - np.interp(delta[0], deltas, savings)) / tokens)
        shares.append(saved[1] / saved[4])
    assert row["head_lead_at_equal_em_interval"] == pytest.approx(interval(np.array(leads)))
    assert row["hindsight_share_interval"] == pytest.approx(interval(np.array(shares)))
    assert found["hindsight"]["hindsight_share_interval"] == [1.0, 1.0]
    assert found["never"]["hindsight_share_interval"] == [0.0, 0.0]


def test_every_row_of_a_sweep_has_its_intervals(random_traces: Traces) -> None:
    head = {1.0: flat(random_traces, -0.1, 0.2), 2.0: never_outcome(random_traces)}
    at_points = {0.0: {"head": AtPoint(None, never_outcome(random_traces))}}
    sweeps = {"head": head, "entropy": None}
    rows, _ = report_rows(random_traces, "dev", sweeps, at_points, rules(random_traces))
    assert [(row["policy"], row["parameter"]) for row in rows] == [
        ("never", None),
        ("hindsight", None),
        ("head", 1.0),
        ("head", 2.0),
        ("entropy", None),
    ]
    assert len({tuple(row) for row in rows}) == 1  # the same keys, available or not
    assert rows[2]["em_delta_interval"] == pytest.approx([-0.1, -0.1])
    assert rows[2]["saving_interval"] == pytest.approx([0.2, 0.2])
    assert rows[3]["saving_interval"] == [0.0, 0.0]
    assert rows[4]["saving_interval"] is None


def test_a_single_question_has_no_intervals(make_traces: MakeTraces) -> None:
    traces = make_traces([{"question_id": "q"}] * 3)
    sweeps = {"head": {1.0: flat(traces, 0, 0.2)}, "budget": {1.0: flat(traces, -0.1, 0.3)}}
    points = {name: AtPoint(1.0, swept[1.0]) for name, swept in sweeps.items()}
    rows, frozen = report_rows(traces, "dev", sweeps, {0.0: points}, rules(traces))
    intervals = [row[key] for row in rows + frozen for key in row if key.endswith("_interval")]
    assert len(intervals) == 2 * 4 + 6 * 4 and set(intervals) == {None}
    assert [row["saving"] for row in frozen[:2]] == pytest.approx([0.2, 0.3])


def test_a_policy_without_a_point_is_not_available_at_that_gate(random_traces: Traces) -> None:
    head, budget = ({1.0: flat(random_traces, 0, saving)} for saving in (0.3, 0.1))
    both = {"head": AtPoint(1.0, head[1.0]), "budget": AtPoint(1.0, budget[1.0])}
    at_points = {0.01: both, 0.0: {"head": both["head"]}}
    sweeps = {"head": head, "budget": budget}
    _, frozen = report_rows(random_traces, "dev", sweeps, at_points, rules(random_traces))
    names = ["head", "budget", "never", "hindsight"]
    assert [row["gate"] for row in frozen] == [0.01] * 4 + [0.0] * 4
    assert sorted(row["policy"] for row in frozen[4:]) == sorted(names)
    missing = next(row for row in frozen[4:] if row["policy"] == "budget")
    assert missing["em"] is missing["head_lead_at_equal_em"] is None
    made = [made_frozen(row) for row in frozen]
    assert (strongest(made, 0.01), strongest(made, 0.0)) == ("budget", None)


def test_points_are_chosen_and_then_reported(make_traces: MakeTraces) -> None:
    traces = make_traces([{}] * 10)
    head = {1.0: flat(traces, 0, 0.2), 2.0: flat(traces, -0.01, 0.4), 3.0: flat(traces, -0.1, 0.9)}
    budget = {5.0: flat(traces, -0.2, 0.5)}
    outcomes = {"head": head, "budget": budget, "entropy": None}
    choice = choose_points(traces, outcomes, rules(traces))
    assert choice.gates == {0.0: {"head": 1.0, "budget": None}, 0.01: {"head": 2.0, "budget": None}}
    found = {(row["gate"], row["policy"]): row for row in to_json(choice.frozen)}
    assert found[0.01, "head"]["saving"] == pytest.approx(0.4)
    assert found[0.01, "budget"]["saving"] == 0.0  # it never halts, and does not probe
    # At the head's EM the budget's frontier is a 20th of the way from (0, 0) to (-0.2, 0.5).
    assert found[0.01, "budget"]["head_lead_at_equal_em"] == pytest.approx(0.4 - 0.5 / 20)
    assert len(choice.rows) == 2 + 3 + 1 + 1


def test_random_halts_as_often_as_the_head_whatever_it_saves(make_traces: MakeTraces) -> None:
    traces = make_traces([{}] * 10)

    def halting(num: int, em_delta: float, saving: float) -> Outcome:
        return replace(flat(traces, em_delta, saving), halted=np.arange(10) < num)

    head = {1.0: halting(4, -0.01, 0.3)}  # within the second gate only
    random = {0.1: halting(1, 0.0, 0.9), 0.4: halting(5, -0.5, 0.2), 0.7: halting(8, -0.6, 0.4)}
    choice = choose_points(traces, {"head": head, "random": random}, rules(traces))
    assert choice.gates == {0.0: {"head": None, "random": None}, 0.01: {"head": 1.0, "random": 0.4}}


def row_of(
    policy: str,
    lead: float | None,
    gate: float = 0.0,
    parameter: float | None = 1.0,
    saving: float = 0.0,
    em_delta: float = 0.0,
) -> FrozenRow | MissingPoint:
    return made_frozen(frozen(gate, known(policy, parameter, em_delta, saving), lead))


def test_the_strongest_baseline_is_the_one_that_the_head_leads_least() -> None:
    rows = [
        row_of("head", -0.5),
        row_of("budget", 0.3),
        row_of("confidence", -0.1),
        row_of("stability", None),
        row_of("never", None),
        row_of("head", -0.5, gate=0.01),
        row_of("budget", -0.2, gate=0.01),
    ]
    assert strongest(rows, 0.0) == "confidence"
    assert strongest(rows, 0.01) == "budget"
    assert strongest(rows[:1], 0.0) is None


def test_a_head_that_never_halts_is_compared_with_what_saves_most_at_its_own_point() -> None:
    rows = [
        row_of("head", None, parameter=None),
        row_of("random", -0.71, parameter=None),  # on its frontier alone
        row_of("budget", -0.2, saving=0.1),
        row_of("confidence", -0.3, saving=0.3),
        row_of("entropy", -0.1, saving=0.9, em_delta=-0.05),  # shown to lose
    ]
    assert strongest(rows, 0.0) == "confidence"
    assert strongest(rows[:2], 0.0) is None


def test_the_table_marks_the_strongest_baseline_and_keeps_what_is_not_available(
    make_traces: MakeTraces,
) -> None:
    traces = make_traces([{"final_correct": False, "correct": [False] * 3}] * 5)
    sweeps = {
        "head": {0.5: flat(traces, 0.01, 0.3)},
        "budget": {0.999999: flat(traces, 0.02, 0.2)},
        "entropy_variance": {123456.0: flat(traces, 0.0, 0.25)},
        "entropy": None,
    }
    title, header, *lines = format_table(
        [made_frozen(row) for row in frozen_at_best(traces, sweeps).values()]
    ).split("\n")
    assert "* strongest baseline" in title
    assert "head saves more at equal EM [95 %]" in header
    by_name = {line.split()[0]: line for line in lines}
    assert by_name["entropy_variance"].startswith("entropy_variance *")
    assert by_name["budget"].endswith(" +10.0 [+10.0, +10.0]")
    assert by_name["entropy_variance"].endswith(" > +5.0 [+5.0, +5.0]")
    assert by_name["entropy"].split() == ["entropy", "not", "available"]
    assert max(map(len, lines)) <= 170
