"""A report with small numbers: as the JSON that evaluate.py writes, and what that stands for."""

from dataclasses import fields
from typing import Any, TypeVar

from evaluation.behaviour import (
    Behaviour,
    Case,
    Driver,
    EmptyBin,
    Reliability,
    ReliabilityBin,
    WhereHalted,
)
from evaluation.results import JudgedTraces, Report
from evaluation.rows import FrozenRow, GroupRow, HonestRow, MissingPoint, MissingSweep, SweepRow
from evaluation.training_curve import THIRDS, CurvePoint
from haltwise import Certificate

Row = dict[str, Any]
Kind = TypeVar("Kind")

GATES = (0.0, 0.01)


def of(kind: type[Kind], found: Row) -> Kind:
    """A dataclass from its JSON object, with None for what that lacks."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: found.get(name) for name in names})


def made_row(found: Row) -> SweepRow | MissingSweep:
    return of(MissingSweep, found) if found["em"] is None else of(SweepRow, found)


def made_frozen(found: Row) -> FrozenRow | MissingPoint:
    return of(MissingPoint, found) if found["em"] is None else of(FrozenRow, found)


def made_group(found: Row) -> GroupRow:
    return of(GroupRow, found)


def made_reliability(found: Row) -> Reliability:
    bins = [
        of(ReliabilityBin, each) if each["num"] else of(EmptyBin, each) for each in found["bins"]
    ]
    return Reliability(bins, found["error"])


def made_behaviour(found: Row) -> Behaviour:
    cases = [
        of(Case, case | {"drivers": [of(Driver, driver) for driver in case["drivers"]]})
        for case in found["cases"]
    ]
    where, bins = of(WhereHalted, found["where"]), made_reliability(found["reliability"])
    return of(Behaviour, found | {"where": where, "reliability": bins, "cases": cases})


def made(found: Row) -> Report:
    """The report that is written as some JSON."""
    certified = found["certificate"]
    parts = {
        "traces": of(JudgedTraces, found["traces"]),
        "rows": [made_row(each) for each in found["rows"]],
        "frozen": [made_frozen(each) for each in found["frozen"]],
        "strongest": {float(gate): name for gate, name in found["strongest"].items()},
        "groups": [made_group(each) for each in found["groups"]],
        "behaviour": [made_behaviour(each) for each in found["behaviour"]],
        "certificate": None if certified is None else Certificate.from_json(certified),
        "honest": [of(HonestRow, each) for each in found["honest"]],
        "curve": [CurvePoint.from_json(each) for each in found["curve"]],
    }
    return of(Report, found | parts)


def row(policy: str, **values: Any) -> Row:
    """A row of a sweep; without values, of a policy that is not available."""
    names = [field.name for field in fields(SweepRow)]
    return dict.fromkeys(names) | {"policy": policy, "split": "test"} | values


def known(policy: str, parameter: float | None, em_delta: float, saving: float) -> Row:
    """Of 1,000 tokens and an EM of 80 % never halted; intervals 2 and 3 points to each side."""
    return row(
        policy,
        parameter=parameter,
        em=0.8 + em_delta,
        em_delta=em_delta,
        tokens=1000 * (1 - saving),
        saving=saving,
        halt_rate=0.625,
        right_to_wrong=0.0175,
        wrong_to_right=0.0075,
        hopeless_saving=0.0525,
        gave_up=0.1325,
        em_delta_interval=[em_delta - 0.02, em_delta + 0.02],
        saving_interval=[saving - 0.03, saving + 0.03],
    )


def frozen(gate: float, found: Row, lead: float | None = None) -> Row:
    """A frozen row; the lead at equal EM has an interval of 2 points to each side."""
    nothing = found["em"] is None
    return found | {
        "gate": gate,
        "em_delta_interval": found.get("em_delta_interval"),
        "saving_interval": found.get("saving_interval"),
        "head_em_lead": None if nothing else 0.0125,
        "head_em_lead_interval": None if nothing else [0.0025, 0.0225],
        "head_saving_lead": None if nothing else 0.0775,
        "head_saving_lead_interval": None if nothing else [0.0675, 0.0875],
        "head_lead_at_equal_em": lead,
        "head_lead_at_equal_em_interval": None if lead is None else [lead - 0.02, lead + 0.02],
        "saving_at_head_em": None if lead is None else 0.5 - lead,
        "hindsight_share": None if nothing else found["saving"] / 0.625,
        "hindsight_share_interval": None if nothing else [0.1125, 0.9875],
        "area": None if nothing else 0.0123,
    }


def group(by: str, name: str, gate: float, policy: str, num_questions: int = 40) -> Row:
    """A group's row; the head loses exact match in "hard", its interval without 0."""
    delta = -0.0825 if name == "hard" else 0.0025
    return {
        "by": by, "group": name, "gate": gate, "policy": policy,
        "num_questions": num_questions, "num_traces": 2 * num_questions,
        "em": 0.7 + delta, "em_never": 0.7, "em_delta": delta,
        "em_delta_interval": [delta - 0.02, delta + 0.02],
        "saving": 0.425, "saving_interval": None,
    }  # fmt: skip


def behaviour(gate: float, price: float) -> Row:
    """Half the traces halted, a tenth of these at a wrong answer; one case."""
    bins = [
        {"low": k / 10, "high": (k + 1) / 10, "num": 0, "mean_prob": None}
        | dict.fromkeys(("better", "correct", "gain"))
        for k in range(10)
    ]
    bins[1] |= {"num": 300, "mean_prob": 0.125, "better": 0.25, "correct": 0.375, "gain": -0.1}
    bins[8] |= {"num": 1200, "mean_prob": 0.8625, "better": 0.9125, "correct": 0.75, "gain": 0.1}
    case = {
        "trace_id": "t1", "question_id": "q1", "task": "math", "segment": "hard", "model": "lm",
        "position": 1234, "num_tokens": 5678, "answer": "42", "prob_halt": 0.9375,
        "trainings": 1.0, "right_again": 2345, "indifference_price": 0.0625,
        "drivers": [
            {"feature": "log_run", "value": -1.5, "contribution": 1.25},
            {"feature": "doubt", "value": 2.0, "contribution": -0.75},
        ],
    }  # fmt: skip
    return {
        "gate": gate,
        "price": price,
        "where": {
            "edges": [k / 20 for k in range(21)],
            "right": [0.0225] * 20,
            "wrong": [0.0025] * 20,
            "never": 0.5,
            "median_share": 0.4875,
            "median_position": 1111.0,
        },
        "reliability": {"bins": bins, "error": 0.0651},
        "cases": [case],
    }


def certificate(price: float | None = 0.25) -> Row:
    return {
        "risk": "net-em-loss", "max_em_drop": 0.02, "confidence": 0.9, "price": price,
        "saving": 0.3125 if price else 0.0, "observed_loss": 0.0025 if price else 0.0,
        "num_questions": 1500, "num_traces": 3000,
        "traces": "abcdef", "lm": "lm", "head": "fedcba", "smallest_em_drop": 0.0175,
        "segments": [
            {"segment": "easy", "num_questions": 700, "price": 0.2, "saving": 0.2875,
             "observed_loss": -0.0125},
            {"segment": "hard", "num_questions": 800, "price": None, "saving": 0.0,
             "observed_loss": 0.0},
        ],
        "command": "python calibrate.py --head run",
    }  # fmt: skip


def curve() -> list[Row]:
    """A start, and what PPO made of it, which was taken."""
    return [
        {
            "ppo": ppo, "step": 1000 * ppo, "em": dict.fromkeys(THIRDS, 0.75 + 0.05 * ppo),
            "tokens": dict.fromkeys(THIRDS, 1234.0), "balanced_return": 5.5, "area": 0.0125,
            "taken": ppo,
        }
        for ppo in (False, True)
    ]  # fmt: skip


def short(lead: float = 0.05) -> Row:
    """A report with one figure, quick to draw."""
    return report(lead) | {"groups": [], "behaviour": [], "certificate": None, "curve": []}


def report(lead: float = 0.05) -> Row:
    """A whole report whose head leads the confidence threshold at equal EM by `lead`."""
    rules = [known("never", None, 0.0, 0.0), known("hindsight", None, 0.125, 0.625)]
    head, confidence = known("head", 0.75, -0.0125, 0.5), known("confidence", 0.99, -0.0075, 0.425)
    sweep = [known("head", 0.1 * k, 0.01 - 0.01 * k, 0.1 * k) for k in range(1, 7)]
    return {
        "head": "checkpoints/run",
        "command": "python evaluate.py --head checkpoints/run",
        "traces": {"path": "traces.parquet", "digest": "0123", "num": 400, "num_questions": 200},
        "split": "test",
        "judged": "Every question by a head that had not seen it.",
        "num_trainings": 1,
        "evidence": True,
        "rows": [*rules, *sweep, confidence, row("entropy")],
        "frozen": [
            frozen(gate, found, lead if found is confidence else None)
            for gate in GATES
            for found in (head, confidence, row("entropy"), *rules)
        ],
        "strongest": {str(gate): "confidence" for gate in GATES},
        "groups": [
            group(by, name, gate, policy)
            for by, name in (("segment", "easy"), ("segment", "hard"), ("model", "lm"))
            for gate in GATES
            for policy in ("head", "confidence")
        ],
        "behaviour": [behaviour(0.0, 0.5), behaviour(0.01, 0.75)],
        "certificate": certificate(),
        "own_price": 0.75,
        "honest": [],
        "curve": curve(),
    }
