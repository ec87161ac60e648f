"""Compares a cascade with routers, confidence cascades and either LM alone, net of both bills.

Costs are in tokens of the small LM: its own and its probes, and the large LM's times the price
ratio. Everything is told against the large LM that answers all questions to its end. Numbers are
chosen on the train and dev splits, out of fold where something learns; there every policy also
keeps only those numbers that no other one of it beats. Test questions tune nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.frontier import frontier_savings
from evaluation.intervals import Float, Resamples, interval
from evaluation.outcome import Outcome
from evaluation.rows import Interval
from evaluation.wording import between, counted, gate_title, number, percent, points
from policies.course import AT_START, Bills, Course, Escalating, LargeAnswers, Parameter
from policies.policy import Signal
from traces import Pairs

#: How much mean EM, against the large LM's, points may lose on the questions they are chosen on.
GATES = (0.0, 0.01, 0.02)

#: How much cheaper a cascade has to be than what it is compared with.
MARGIN = 0.05

_ROUNDING = 1e-9

_TITLES = {
    "always_large": "always large",
    "always_small": "always small",
    "budget": "small, on a token budget",
    "head": "small, halted by its head",
    "confidence_cascade": "confidence cascade",
    "confidence_cascade_head": "head, then confidence",
    "oracle": "hindsight",
}


def billed(
    pairs: Pairs,
    bills: Bills,
    course: Course,
    large: LargeAnswers,
    price: float,
    price_ratio: float,
) -> Outcome:
    """Returns what a course comes to: EM, tokens of both LMs, and which pairs were escalated.

    Args:
        pairs: N pairs.
        bills: Those of the small LM.
        course: Where the questions leave it.
        large: What the large LM answers.
        price: The price that its own tokens have.
        price_ratio: What one of them costs in tokens of the small LM.
    """
    at_point = course.point >= 0
    place = course.point[at_point]
    em, cost = bills.end_em.copy(), bills.end_cost.astype(np.float64)
    em[at_point] = bills.halt_em[place]
    left = np.where(course.escalated[at_point], bills.leave_cost[place], bills.halt_cost[place])
    cost[at_point] = left
    cost[course.point == AT_START] = 0
    k = int(large.nearest(price))
    em = np.where(course.escalated, large.em[k], em)
    cost += np.where(course.escalated, price_ratio * large.cost[k], 0)
    return Outcome(em, cost, course.escalated)


@dataclass(frozen=True)
class Chosen:
    """What is frozen of a policy before any test question is looked at."""

    policy: Escalating
    parameters: list[Parameter]
    """The numbers that no other ones beat in both EM and cost."""
    points: dict[float, Parameter | None]
    """By gate, the cheapest numbers within it; None if there are none: then the large LM answers
    everything."""
    cost: float
    """What a question costs in the mean at the strictest gate, on the pairs that it was chosen
    on."""


@dataclass(frozen=True)
class Played:
    """A policy on some pairs, with whose signal it has looked at."""

    policy: Escalating
    pairs: Pairs
    signal: Signal
    bills: Bills
    large: LargeAnswers
    price_ratio: float

    @classmethod
    def of(
        cls, policy: Escalating, pairs: Pairs, large: LargeAnswers, price_ratio: float
    ) -> Played:
        """Lets a policy look at some pairs.

        Args:
            policy: The policy.
            pairs: The pairs.
            large: What the large LM answers to them.
            price_ratio: What a token of the large LM costs, in tokens of the small one.
        """
        bills = Bills.of(pairs.small, policy.probing)
        return cls(policy, pairs, policy.signal(pairs), bills, large, price_ratio)

    def outcome(self, parameter: Parameter) -> Outcome:
        """Returns the outcome at some numbers."""
        course = self.policy.course(self.pairs, self.signal, parameter)
        price = self.policy.large_price(parameter)
        return billed(self.pairs, self.bills, course, self.large, price, self.price_ratio)

    def choose(self) -> Chosen:
        """Freezes the numbers of the policy on these pairs."""
        grid = self.policy.grid(self.signal)
        each = (self.outcome(parameter) for parameter in grid)
        em, cost = np.array([(of.em.mean(), of.cost.mean()) for of in each]).T
        order = np.lexsort([-em, cost])
        best_before = np.maximum.accumulate(np.concatenate([[-1.0], em[order][:-1]]))
        kept = order[em[order] > best_before]
        least = self.pairs.large.final_correct.mean()
        points: dict[float, Parameter | None] = {}
        for gate in GATES:
            within = [k for k in kept if em[k] >= least - gate - _ROUNDING]
            points[gate] = grid[within[0]] if within else None  # the cheapest comes first
        if len(grid) == 1:  # there is nothing to choose
            points = dict.fromkeys(GATES, grid[0])
        strictest = points[min(GATES)]
        all_large = self.price_ratio * self.pairs.large.num_tokens.mean()
        paid = all_large if strictest is None else cost[grid.index(strictest)]
        return Chosen(self.policy, [grid[k] for k in kept], points, float(paid))


@dataclass(frozen=True)
class CascadeRow:
    """What a policy comes to at its frozen numbers."""

    policy: str
    gate: float
    parameter: list[float] | None
    """Its numbers; None where no numbers were within the gate: then the large LM answers all."""
    em: float
    em_delta: float
    """The EM less the large LM's."""
    em_delta_interval: Interval
    tokens: float
    """Tokens of a question in the mean, those of the large LM times the ratio."""
    saving: float
    """The share of the large LM's bill for all questions that is not spent."""
    saving_interval: Interval
    escalated: float
    """The share of the questions that the large LM answers."""
    cheaper: float
    """How much cheaper the cascade is at its point, at equal EM, as a share of this policy's cost:
    its frontier is read at the cascade's EM."""
    cheaper_interval: Interval
    """What the promise of a margin rests on: the 95 % interval of that, paired by question."""
    cheaper_frozen: float
    """How much cheaper the cascade is where each is at its own point."""
    cheaper_frozen_interval: Interval


def judge(
    pairs: Pairs, large: LargeAnswers, price_ratio: float, chosen: Sequence[Chosen], name: str
) -> list[CascadeRow]:
    """Judges frozen policies on pairs that tuned nothing.

    Args:
        pairs: N pairs.
        large: What the large LM answers to them.
        price_ratio: What a token of it costs, in tokens of the small LM.
        chosen: The policies.
        name: The name of the one that the others are compared with.

    Returns:
        A row for each policy at each gate.
    """
    reference = Outcome(
        pairs.large.final_correct,
        price_ratio * pairs.large.num_tokens.astype(np.float64),
        np.ones(len(pairs), dtype=bool),
    )
    resamples = Resamples.draw(pairs.small.question_id)
    swept = {of.policy.name: _Swept.of(of, pairs, large, price_ratio) for of in chosen}
    samples = {key: of.resample(resamples, reference) for key, of in swept.items()}
    rows = []
    for gate in GATES:
        frozen = {key: of.frozen(gate, reference) for key, of in swept.items()}
        drawn = {key: _resample(resamples, reference, [o]) for key, o in frozen.items()}
        own_delta, own_saving = (float(v[0]) for v in _means(reference, [frozen[name]]))
        own_deltas, own_savings = (v[0] for v in drawn[name])
        for key, of in swept.items():
            outcome = frozen[key]
            delta, saving = (float(v[0]) for v in _means(reference, [outcome]))
            deltas, savings = (v[0] for v in drawn[key])
            means = tuple(v[:, None] for v in _means(reference, of.outcomes))
            rival = frontier_savings(means[0], means[1], np.array([own_delta]))
            rivals = frontier_savings(*samples[key], own_deltas)
            parameter = of.chosen.points[gate]
            rows.append(
                CascadeRow(
                    policy=key,
                    gate=gate,
                    parameter=None if parameter is None else [_finite(v) for v in parameter],
                    em=float(outcome.em.mean()),
                    em_delta=delta,
                    em_delta_interval=interval(deltas),
                    tokens=float(outcome.cost.mean()),
                    saving=saving,
                    saving_interval=interval(savings),
                    escalated=float(outcome.halted.mean()),
                    cheaper=float(_cheaper(np.array([own_saving]), rival)[0]),
                    cheaper_interval=interval(_cheaper(own_savings, rivals)),
                    cheaper_frozen=float(_cheaper(np.array([own_saving]), np.array([saving]))[0]),
                    cheaper_frozen_interval=interval(_cheaper(own_savings, savings)),
                )
            )
    return rows


@dataclass(frozen=True)
class _Swept:
    """A frozen policy's outcomes on some pairs."""

    chosen: Chosen
    outcomes: list[Outcome]

    @classmethod
    def of(cls, chosen: Chosen, pairs: Pairs, large: LargeAnswers, price_ratio: float) -> _Swept:
        played = Played.of(chosen.policy, pairs, large, price_ratio)
        return cls(chosen, [played.outcome(parameter) for parameter in chosen.parameters])

    def resample(self, resamples: Resamples, reference: Outcome) -> tuple[Float, Float]:
        return _resample(resamples, reference, self.outcomes)

    def frozen(self, gate: float, reference: Outcome) -> Outcome:
        parameter = self.chosen.points[gate]
        if parameter is None:
            return reference
        return self.outcomes[self.chosen.parameters.index(parameter)]


def _means(reference: Outcome, outcomes: Sequence[Outcome]) -> tuple[Float, Float]:
    """Returns EM change and saving (K,) of K outcomes against a reference."""
    em = np.array([float(o.em.mean()) for o in outcomes]) - float(reference.em.mean())
    cost = np.array([float(o.cost.sum()) for o in outcomes])
    return em, 1 - cost / float(reference.cost.sum())


def _resample(
    resamples: Resamples, reference: Outcome, outcomes: Sequence[Outcome]
) -> tuple[Float, Float]:
    """Returns EM change and saving (K, R) of K outcomes in each resample."""
    gained = [o.em.astype(float) - reference.em for o in outcomes]
    saved = [reference.cost - o.cost for o in outcomes]
    sums = resamples.sums([np.ones(len(reference.em)), reference.cost, *gained, *saved])
    em_delta, saving = np.split(sums[2:], 2)
    return em_delta / sums[0], saving / sums[1]


def _cheaper(own: Float, rival: Float) -> Float:
    """Returns how much cheaper one is than a rival, as a share of its cost, of both savings."""
    cheaper: Float = 1 - (1 - own) / np.maximum(1 - rival, _ROUNDING)
    return cheaper


def _finite(value: float) -> float:
    """Returns a number as JSON can hold it: infinities become the largest that there are."""
    return float(np.nan_to_num(value))


def questions_needed(row: CascadeRow, num_questions: int, margin: float = 0.0) -> int | None:
    """Returns about how many questions would put the interval of a lead above a margin.

    Intervals shrink with the root of the number of questions.

    Args:
        row: What the cascade is compared with.
        num_questions: The number of questions that the row is of.
        margin: What the lead is to be above.

    Returns:
        The number; None if the lead itself is not above the margin.
    """
    lead = row.cheaper - margin
    if lead <= 0:
        return None
    return int(np.ceil(num_questions * ((row.cheaper - row.cheaper_interval[0]) / lead) ** 2))


def format_rows(rows: Sequence[CascadeRow]) -> str:
    """Returns the table of all policies at all gates, for a terminal."""
    titles = ("policy", "EM", "change", "tokens", "saving %", "escalated %", "cascade cheaper by %")
    lines = []
    for gate in sorted({row.gate for row in rows}):
        cells = [titles] + [
            (
                title(row.policy),
                f"{100 * row.em:.2f}",
                f"{points(row.em_delta)} {between(row.em_delta_interval, points)}".strip(),
                f"{row.tokens:.1f}",
                percent(row.saving),
                percent(row.escalated),
                f"{percent(row.cheaper)} {between(row.cheaper_interval, percent)}".strip(),
            )
            for row in rows
            if row.gate == gate
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += ["", f"Chosen to lose {gate_title(gate)} of the large LM's EM:"]
        lines += ["  " + "  ".join(map(str.ljust, each, widths)).rstrip() for each in cells]
    return "\n".join(lines[1:])


def _ends(interval: Interval) -> str:
    """Returns an interval behind a blank; nothing where there is none."""
    found = between(interval, percent)
    return f" {found}" if found else ""


def title(policy: str) -> str:
    """Returns the readable name of a policy."""
    return _TITLES.get(policy, policy.replace("_", " "))


def strongest_of(chosen: Sequence[Chosen], begins: str) -> str:
    """Returns the cheapest of the policies whose names begin in a way, as they were chosen."""
    named = [of for of in chosen if of.policy.name.startswith(begins)]
    return min(named, key=lambda of: of.cost).policy.name


def verdict(
    rows: Sequence[CascadeRow],
    strongest: Mapping[str, str],
    price_ratio: float,
    num_questions: int,
) -> str:
    """Returns the sentence with which the command ends, about the strictest gate.

    Args:
        rows: Those of `judge`.
        strongest: By kind, router or confidence cascade, the policy that was cheapest out of fold.
        price_ratio: What a token of the large LM costs, in tokens of the small one.
        num_questions: The number of questions that the rows are of.
    """
    gate = min(row.gate for row in rows)
    known = {row.policy: row for row in rows if row.gate == gate}
    own, small = known["cascade"], known["always_small"]
    rivals = {kind: known[name] for kind, name in strongest.items()}
    rivals = {"the large LM for all": known["always_large"]} | rivals
    is_clear = [row.cheaper >= MARGIN and row.cheaper_interval[0] > 0 for row in rivals.values()]
    said = "cheaper than all of them" if all(is_clear) else "no clear gain over all of them"
    each = "; ".join(
        f"{percent(row.cheaper)} %{_ends(row.cheaper_interval)} than {kind}"
        + (f" ({title(row.policy)})" if row.policy != "always_large" else "")
        for kind, row in rivals.items()
    )
    price = "no price" if own.parameter is None else f"a price of {number(own.parameter[0])}"
    return (
        f"Verdict: {said}: at a ratio of {price_ratio:g} and {price}, the cascade is "
        f"right on {100 * own.em:.2f} % of {counted(num_questions, 'test question')} (small "
        f"{100 * small.em:.2f} %, large {100 * (own.em - own.em_delta):.2f} %), escalates "
        f"{percent(own.escalated)} %, and at equal EM is cheaper by {each}."
    )
