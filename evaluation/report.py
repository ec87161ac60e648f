"""Writes a report as one HTML page, and as TensorBoard's figures.

The page needs no network and no script. All its words and figures are made from the report, which
is what the JSON is written from, so that page and JSON cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from command import whole_file
from evaluation.behaviour import Behaviour, ReliabilityBin
from evaluation.figures import Drawing, compared_groups, draw, style
from evaluation.frontier import AREA_FLOOR
from evaluation.results import Report
from evaluation.rows import FrozenRow, GroupRow, MissingPoint, SweepRow
from evaluation.svg import PALETTE, svg
from evaluation.verdict import GateVerdict, judge
from evaluation.wording import (
    between,
    counted,
    exact_match,
    gained,
    gate_title,
    kind_title,
    lead,
    number,
    percent,
    points,
    policy_title,
    signed,
)
from haltwise import Certificate
from policies.catalogue import in_words
from policies.rules import RULE_NAMES
from traces.arrays import target

_TEMPLATE = "report.html.jinja"
_SCALARS = ("saving", "em_delta", "head_lead_at_equal_em")
_MOST_LOSSES = 10


def write_report(report: Report, path: Path) -> None:
    """Writes a report as a page.

    Args:
        report: The report; its groups and behaviour may be empty, its certificate None.
        path: The HTML file, which is written whole or not at all.
    """
    with whole_file(path) as temporary:
        temporary.write_text(render(report), encoding="utf-8")


def page(template: str, drawings: Mapping[str, Drawing], **values: Any) -> str:
    """Returns a page as HTML.

    Args:
        template: The file of its template, beside this one.
        drawings: Its figures, by name.
        values: What else the template reads.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "points": points,
        "policy": policy_title,
        "gate": gate_title,
        "kind": kind_title,
        "signed": signed,
        "number": number,
        "counted": counted,
    }
    with style():
        figures = {
            name: svg(drawing.figure, name, drawing.title, drawing.text)
            for name, drawing in drawings.items()
        }
    return environment.get_template(template).render(
        drawings=drawings, figures=figures, palette=PALETTE, **values
    )


def render(report: Report) -> str:
    """Returns the page as HTML; the same report gives the same page."""
    gates = sorted({row.gate for row in report.frozen})
    trainings = " (all trainings together)" if report.num_trainings > 1 else ""
    return page(
        _TEMPLATE,
        draw(report),
        report=report,
        gates=[_gate(report, gate) for gate in gates],
        behaviour=_behaviour(report.behaviour, trainings),
        certificate=_certificate(report.certificate),
        never=next(row for row in report.rows if row.policy == "never"),
        policies=in_words(),
        trainings=trainings,
        column={column.key: column for column in _MAIN},
        main_columns=_MAIN,
        more_columns=_MORE,
        group_columns=_OF_GROUPS,
        price_columns=_OF_PRICES,
        prices=[row for row in report.rows if row.policy == "head"],
    )


def log_to_tensorboard(report: Report, log_dir: Path) -> None:
    """Writes the page's figures, and every policy's frozen numbers, for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(log_dir)) as writer:
        with style():
            for name, drawing in draw(report).items():
                writer.add_figure(f"report/{name}", drawing.figure)
        for row in report.frozen:
            for column in _SCALARS:
                value = getattr(row, column, None)
                leads_itself = row.policy == "head" and column.startswith("head_")
                if value is not None and not leads_itself:
                    writer.add_scalar(f"frozen_{row.gate}/{column}/{row.policy}", value)


def _tokens(value: float) -> str:
    """Returns a number of tokens, as it is printed."""
    return f"{value:,.0f}"


@dataclass(frozen=True)
class Column:
    """A column of a table of rows."""

    key: str
    """The name of the rows' field that it shows."""
    title: str
    what: str
    """What the column shows, which the page says once."""
    form: Callable[[float], str]
    """Returns a value as it is printed."""

    def cell(self, row: FrozenRow | GroupRow | SweepRow) -> tuple[str, str]:
        """Returns a row's value and its interval as they are printed, empty where there is none."""
        value, interval = getattr(row, self.key), getattr(row, f"{self.key}_interval", None)
        if value is None or (row.policy == "head" and self.key.startswith("head_")):
            return "", ""
        # Above a policy's highest EM the lead at equal EM is less than it would be, see frozen.py.
        beyond = (
            self.key == "head_lead_at_equal_em"
            and isinstance(row, FrozenRow)
            and row.saving_at_head_em is None
        )
        return ("> " if beyond else "") + self.form(value), between(interval, self.form)


_MAIN = (
    Column("em", "EM, %", "Share of the answers that are right, by exact match.", exact_match),
    Column("em_delta", "EM change, points", "EM less that of never halting.", points),
    Column(
        "saving", "Saving, %", "Share of never halting's tokens not spent, net of probes.", percent
    ),
    Column(
        "saving_at_head_em",
        "Saving at the head\N{RIGHT SINGLE QUOTATION MARK}s EM, %",
        "What the policy saves at the head's EM, on its own frontier on these traces; empty where "
        "it never has that EM.",
        percent,
    ),
    Column(
        "head_lead_at_equal_em",
        "Head saves more at equal EM, points",
        "The head's saving less the policy's at the head's EM. With >: less its saving at its "
        "highest EM, which favours it, since it never has the head's. In every resample the "
        "policy's frontier takes the best of many points: what chance adds to it counts against "
        "the head.",
        lead,
    ),
    Column(
        "hindsight_share",
        "Of hindsight, %",
        "The saving as a share of that of halting at the first correct answer.",
        percent,
    ),
)
_MORE = (
    Column("parameter", "Number", "The frozen number of the policy; none: it never halts.", number),
    Column("tokens", "Tokens", "Generated a trace, probes included.", _tokens),
    Column("halt_rate", "Halted, %", "Share of the traces that are halted.", percent),
    Column("right_to_wrong", "Lost, %", "Share of the traces turned from right to wrong.", percent),
    Column("wrong_to_right", "Won, %", "Share of the traces turned from wrong to right.", percent),
    Column("gave_up", "Gave up, %", "Share of the traces halted at a wrong answer.", percent),
    Column(
        "hopeless_saving",
        "Of hopeless, %",
        "The part of the saving that comes from traces that are never right.",
        percent,
    ),
    Column(
        "head_em_lead",
        "Head\N{RIGHT SINGLE QUOTATION MARK}s EM lead, points",
        "The head's EM less the policy's, each at its own point.",
        points,
    ),
    Column(
        "head_saving_lead",
        "Head saves more, points",
        "The head's saving less the policy's, each at its own point.",
        lead,
    ),
    Column(
        "area",
        "Mean EM on allowances, points above the floor",
        f"EM above a floor, {-100 * AREA_FLOOR:g} points below never halting's, in the mean over "
        "all allowances of tokens, from none to never halting's, each spent by the best of the "
        "policy's numbers: the area under its frontier.",
        exact_match,
    ),
)
_OF_PRICES = (
    Column("parameter", "Price", "Right answers that 1,000 tokens have to buy.", number),
    *_MAIN[:3],
    *_MORE[1:3],
)
_OF_GROUPS = (
    Column(
        "em_never", "EM never halted, %", "EM of never halting on the same traces.", exact_match
    ),
    *_MAIN[:3],
)


@dataclass(frozen=True)
class GateSection:
    """What the page says of one gate."""

    verdict: GateVerdict
    rows: list[FrozenRow]
    """The available policies: the head, baselines by saving at the head's EM, rules."""
    missing: list[str]
    """The names of the policies that are not available."""
    groups: list[GroupRow]
    """The groups' rows of the head and the strongest baseline."""

    @property
    def title(self) -> str:
        """What the points were chosen for, and what became of that here."""
        chosen, change = gate_title(self.verdict.gate), self.verdict.head.em_delta
        here = f"here it {gained(change)}" if abs(change) >= 5e-5 else "here nothing was lost"
        return f"Chosen to lose {chosen}; {here}"


def _gate(report: Report, gate: float) -> GateSection:
    """Gathers what the page says of one gate."""
    rows = [row for row in report.frozen if row.gate == gate]
    known = {row.policy: row for row in rows if isinstance(row, FrozenRow)}
    baselines = [row for name, row in known.items() if name not in ("head", *RULE_NAMES)]
    baselines.sort(key=lambda row: -(row.saving_at_head_em or 0.0))
    verdict = judge(
        report.frozen, gate, report.strongest.get(gate), report.groups, report.traces.num_questions
    )
    if not report.evidence:
        verdict = replace(verdict, badge=("void", "not evidence"))
    return GateSection(
        verdict=verdict,
        rows=[known["head"], *baselines, *(known[name] for name in RULE_NAMES if name in known)],
        missing=[row.policy for row in rows if isinstance(row, MissingPoint)],
        groups=compared_groups(report, gate),
    )


@dataclass(frozen=True)
class PriceSection:
    """What the page says of the head inside a thought, at one price."""

    gates: list[float]
    """All gates that chose this price."""
    found: Behaviour
    reading: str
    """What the reliability figure says, told at one bin."""
    largest: float
    """The largest contribution of a driver, in magnitude."""


def _behaviour(found: Sequence[Behaviour], trainings: str) -> list[PriceSection]:
    """Gathers what the page says of each price, with the gates that share it.

    Args:
        found: What the head does inside thoughts, gate by gate.
        trainings: Words that go after numbers of decisions.
    """
    first: dict[float, Behaviour] = {}
    for behaviour in found:
        first.setdefault(behaviour.price, behaviour)
    return [
        PriceSection(
            gates=[other.gate for other in found if other.price == price],
            found=behaviour,
            reading=_reading(behaviour.reliability.seen, trainings),
            largest=max(
                (abs(driver.contribution) for case in behaviour.cases for driver in case.drivers),
                default=0.0,
            ),
        )
        for price, behaviour in first.items()
    ]


def _reading(seen: Sequence[ReliabilityBin], trainings: str) -> str:
    """Says what the bin at 80 %, or the nearest with a decision, shows; and what all of them do."""
    if not seen:
        return "The head came to no decision."
    found = min(seen, key=lambda found: abs(found.low - 0.8))
    said = f"{100 * found.low:.0f} to {100 * found.high:.0f} %"
    return (
        f"Among the {counted(found.num, 'decision')}{trainings} where the head put the "
        f"probability of halting at {said} ({percent(found.mean_prob)} % in the mean), "
        f"halting was the better choice in {percent(found.better)} %. {_gains(seen)}"
    )


def _gains(seen: Sequence[ReliabilityBin]) -> str:
    """Says what halting gains where the head put its probability below one half, and elsewhere."""
    said = {
        "below one half": [found for found in seen if found.high <= 0.5],
        "at one half or more": [found for found in seen if found.low >= 0.5],
    }
    sentences = [
        f"Where it put it {where}, halting "
        f"{gained(np.average([b.gain for b in bins], weights=[b.num for b in bins]))} "
        "a decision in the mean."
        for where, bins in said.items()
        if bins
    ]
    return " ".join(sentences)


_RISKS = {
    "net-em-loss": "costs at most {} points of exact match, net of what halting wins",
    "right-to-wrong": "turns at most {} of a hundred answers from right to wrong",
}


def _certificate(certificate: Certificate | None) -> list[str]:
    """Returns a certificate in sentences; none if there is no certificate."""
    if certificate is None:
        return []
    bound = _RISKS[certificate.risk].format(f"{100 * certificate.max_em_drop:g}")
    asked = (
        f"with {100 * certificate.confidence:g} % confidence, over the draw of "
        f"{counted(certificate.num_questions, 'question')} that the head had not learned from"
    )
    counted_as = target(certificate.num_unlabelled, certificate.num_traces)
    unlabelled = [counted_as] if counted_as else []
    if certificate.price is None:
        smallest = certificate.smallest_em_drop
        could = "no bound" if smallest is None else f"a bound of {exact_match(smallest)} points"
        return [
            f"Nothing could be certified for {certificate.lm}: never halt. The head's own price "
            f"is 0, at which it never does. Asked was a price at which halting {bound}, {asked}.",
            f"On those questions {could} would have allowed some saving.",
            *unlabelled,
        ]
    return [
        f"Certified for {certificate.lm}, {asked}: on questions like those, in the mean, "
        f"halting at a price of {number(certificate.price)} {bound}.",
        f"There it saved {percent(certificate.saving)} % of the tokens and "
        f"{gained(-certificate.observed_loss)}. It is a certificate of that price, not of the "
        "points in the tables above.",
        *unlabelled,
    ]
