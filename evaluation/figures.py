"""Draws the figures of a report from its numbers alone, for the page, TensorBoard and PNG files.

What a colour tells is told by a shape, a dash or a hatch too.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evaluation.behaviour import Behaviour, Reliability, WhereHalted
from evaluation.protocol import RATE_MATCHED
from evaluation.results import Report
from evaluation.rows import (
    FrozenRow,
    GroupRow,
    Interval,
    MissingPoint,
    MissingSweep,
    PricePoint,
    RecordingRow,
    SweepRow,
)
from evaluation.svg import COLOR
from evaluation.training_curve import THIRDS, CurvePoint
from evaluation.wording import gate_title, kind_title, policy_title, signed
from policies.rules import RULE_NAMES

#: At most so many groups of one kind are drawn: those with the most questions.
MOST_GROUPS = 16

_BOUND_MARKERS = {"hindsight": "*", "hindsight_give_up": "p"}
_MARKERS = "osv^DPX<>h"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1)))
_Drawn = SweepRow | GroupRow | RecordingRow | PricePoint
_NUM_OTHERS = sum(name.startswith("other-") for name in COLOR)
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # it comes with matplotlib: the same layout everywhere
    "font.size": 9.0,
    "text.color": COLOR["ink"],
    "text.parse_math": False,  # a segment's name is anybody's text: a dollar sign is one
    "axes.edgecolor": COLOR["muted"],
    "axes.labelcolor": COLOR["ink"],
    "axes.facecolor": COLOR["paper"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": f"cycler('color', ['{COLOR['ink']}'])",
    "grid.color": COLOR["grid"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOR["muted"],
    "ytick.color": COLOR["muted"],
    "xtick.labelcolor": COLOR["ink"],
    "ytick.labelcolor": COLOR["ink"],
    "figure.facecolor": COLOR["paper"],
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "hatch.linewidth": 0.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "haltwise",
}


@dataclass(frozen=True, eq=False)
class Drawing:
    """A figure with the words that go with it."""

    name: str
    """A name of letters, digits, dots and hyphens; no two drawings of a report share it."""
    title: str
    text: str
    """What is drawn, and how to read it."""
    figure: Figure


def style() -> AbstractContextManager[None]:
    """Returns a context with the settings of matplotlib to draw and to save figures under."""
    return matplotlib.rc_context(_STYLE)


def draw(report: Report) -> dict[str, Drawing]:
    """Draws all figures of a report; returns them by name."""
    drawings = [_frontier_drawing(report)]
    for gate in sorted({row.gate for row in report.groups}):
        rows = compared_groups(report, gate)
        drawings += [_group_drawing(rows, gate, column) for column in _GROUP_WORDS]
    for behaviour in report.behaviour:
        drawings += [_where_drawing(behaviour), _reliability_drawing(behaviour)]
    if report.curve:
        drawings.append(_training_drawing(report.curve))
    return {drawing.name: drawing for drawing in drawings}


def compared_groups(report: Report, gate: float) -> list[GroupRow]:
    """Returns the groups' rows of the head and of the strongest baseline at a gate."""
    compared = ("head", report.strongest.get(gate))
    return [r for r in report.groups if r.gate == gate and r.policy in compared]


def _frontier_drawing(report: Report) -> Drawing:
    """Draws EM change against saving, with its words."""
    strongest = list(dict.fromkeys(name for name in report.strongest.values() if name))
    return Drawing(
        "frontier",
        "Exact match against tokens",
        "A line a policy over its one number. Up is a better exact match, right is a larger "
        "saving. Large points are the frozen ones: filled at the strictest gate, hollow at the "
        "others. Bands and bars of the head and the strongest baselines are 95 % intervals.",
        frontier(report.rows, report.frozen, strongest),
    )


def frontier(
    rows: Sequence[SweepRow | MissingSweep],
    frozen: Sequence[FrozenRow | MissingPoint],
    strongest: Sequence[str] = (),
) -> Figure:
    """Draws EM change against saving: a line for each policy, its frozen points, and the rules.

    Args:
        rows: The rows of sweeps, with intervals or without, and of rules without a parameter.
        frozen: The frozen rows, of any number of gates.
        strongest: The baselines to draw as heavily as the head.
    """
    known = [row for row in rows if isinstance(row, SweepRow)]
    swept = [row for row in known if row.policy not in RULE_NAMES]
    points = [row for row in frozen if isinstance(row, FrozenRow) and row.policy not in RULE_NAMES]
    looks = _looks(list(dict.fromkeys(row.policy for row in swept)), strongest)
    with style():
        figure = Figure(figsize=(6.4, 4.9))
        axes = figure.subplots()
        for policy in sorted(looks, key=lambda policy: not looks[policy].heavy):
            look = looks[policy]
            _draw_sweep(axes, [row for row in swept if row.policy == policy], look)
            _draw_points(axes, [row for row in points if row.policy == policy], look)
        _limit(axes, swept, points)
        _draw_rules(axes, [row for row in known if row.policy in RULE_NAMES])
        axes.axhline(0, color=COLOR["ink"], linewidth=0.8)
        axes.set_xlabel("saving, % of the tokens of never halting, probes included")
        axes.set_ylabel("EM change, points of a hundred")
        axes.yaxis.set_major_formatter(tick)
        figure.legend(loc="outside lower center", ncols=3, handlelength=3.2)
    return figure


def recordings(rows: Sequence[RecordingRow]) -> Figure:
    """Draws EM against tokens: each recording alone, and its line over the prices of its head.

    Squares are LMs alone, dots are at a head's own price, both with 95 % intervals, as the bands.

    Args:
        rows: The recordings, with intervals or without.
    """
    with style():
        figure = Figure(figsize=(6.4, 4.9))
        axes = figure.subplots()
        looks = _looks([str(k) for k in range(len(rows))])
        for k, row in enumerate(rows):
            _draw_recording(axes, row, looks[str(k)])
        low = [100 * (row.em_interval or [row.em])[0] for row in rows]
        low += [100 * (row.sweep[0].em_interval or [row.sweep[0].em])[0] for row in rows]
        axes.set_ylim(min(low) - 6, 100)
        axes.set_xlim(left=0)
        axes.set_xlabel("tokens a question, probes included")
        axes.set_ylabel("EM, %")
        figure.legend(loc="outside lower center", ncols=2, handlelength=3.2)
    return figure


def _draw_recording(axes: Axes, row: RecordingRow, look: _Look) -> None:
    """Draws a recording alone, the line of its head with a band, and the head's own price."""
    own, *grid = row.sweep
    points = sorted(grid, key=lambda point: point.tokens)
    tokens, name = [point.tokens for point in points], plain(row.lm)
    axes.plot(
        tokens, [100 * point.em for point in points], color=look.color, linestyle=look.dash,
        linewidth=1.8, label=f"{name} halted by {plain(Path(row.head).name)}", zorder=4,
    )  # fmt: skip
    if all(point.em_interval for point in points):
        low, high = zip(*(_bounds(point, "em") for point in points), strict=True)
        axes.fill_between(tokens, low, high, color=look.color, alpha=0.16, linewidth=0)
    for place, marker, label in ((own, "o", None), (row, "s", f"{name} alone")):
        axes.errorbar(
            place.tokens, 100 * place.em, xerr=_token_errors(place), yerr=_errors([place], "em"),
            color=look.color, marker=marker, markersize=7, linestyle="none", linewidth=1.2,
            capsize=2.5, label=label, zorder=6,
        )  # fmt: skip


def _token_errors(place: RecordingRow | PricePoint) -> list[list[float]]:
    """Returns how far (2, 1) an interval of tokens reaches below and above their number."""
    low, high = place.tokens_interval or [place.tokens] * 2
    return [[max(place.tokens - low, 0.0)], [max(high - place.tokens, 0.0)]]


@dataclass(frozen=True)
class _Look:
    """How a policy is drawn."""

    color: str
    dash: Any
    marker: str
    heavy: bool


def _looks(policies: Sequence[str], strongest: Sequence[str] = ()) -> dict[str, _Look]:
    """Gives each policy a look of its own, and the head and the strongest baselines heavy ones."""
    looks, num_others = {}, 0
    for k, policy in enumerate(policies):
        marker, dash = _MARKERS[k % len(_MARKERS)], _DASHES[k % len(_DASHES)]
        if policy == "head":
            looks[policy] = _Look(COLOR["head"], "-", marker, True)
        elif policy in strongest[:1]:
            looks[policy] = _Look(COLOR["strongest"], _DASHES[1], marker, True)
        else:
            color = COLOR[f"other-{num_others % _NUM_OTHERS}"]
            looks[policy] = _Look(color, dash, marker, policy in strongest)
            num_others += 1
    return looks


def _draw_sweep(axes: Axes, rows: Sequence[SweepRow], look: _Look) -> None:
    """Draws the line of one policy; if it is heavy and its rows have intervals, with a band."""
    rows = sorted(rows, key=lambda row: row.saving)
    saving = [100 * row.saving for row in rows]
    axes.plot(
        saving, [100 * row.em_delta for row in rows], label=policy_title(rows[0].policy),
        color=look.color, linestyle=look.dash, linewidth=2.2 if look.heavy else 1.1,
        marker=look.marker, markersize=3.5, markevery=max(len(rows) // 7, 1),
        zorder=4 if look.heavy else 3,
    )  # fmt: skip
    if look.heavy and all(row.em_delta_interval for row in rows):
        low, high = zip(*(_bounds(row, "em_delta") for row in rows), strict=True)
        axes.fill_between(saving, low, high, color=look.color, alpha=0.16, linewidth=0)


def _draw_points(axes: Axes, rows: Sequence[FrozenRow], look: _Look) -> None:
    """Draws the frozen points of one policy, with intervals if it is heavy.

    The point of the strictest gate is filled.
    """
    for row in rows:
        place = (100 * row.saving, 100 * row.em_delta)
        if look.heavy:
            axes.errorbar(
                *place, xerr=_errors([row], "saving"), yerr=_errors([row], "em_delta"),
                color=look.color, linewidth=1.2, capsize=2.5, zorder=5,
            )  # fmt: skip
        strictest = row.gate == min(row.gate for row in rows)
        axes.scatter(
            *place, s=60 if look.heavy else 34, marker=look.marker, zorder=6, linewidth=1.4,
            edgecolor=look.color, facecolor=look.color if strictest else COLOR["paper"],
        )  # fmt: skip


def _bounds(row: _Drawn, column: str) -> tuple[float, float]:
    """Returns a value's interval in points of a hundred; where it has none, the value twice."""
    interval: Interval | None = getattr(row, f"{column}_interval")
    low, high = interval or [getattr(row, column)] * 2
    return 100 * low, 100 * high


def _errors(rows: Sequence[_Drawn], column: str) -> list[list[float]]:
    """Returns how far (2, N) intervals reach below and above values, in points of a hundred."""
    # No length is below 0: where all resamples agree, rounding may put a value outside of its
    # interval.
    values = [100 * getattr(row, column) for row in rows]
    ends = [_bounds(row, column) for row in rows]
    below = [max(value - low, 0.0) for value, (low, _) in zip(values, ends, strict=True)]
    above = [max(high - value, 0.0) for value, (_, high) in zip(values, ends, strict=True)]
    return [below, above]


def _limit(axes: Axes, swept: Sequence[SweepRow], points: Sequence[FrozenRow]) -> None:
    """Limits the axes to where policies differ: around the frozen points, and what is above them.

    The control that halts as often as the head is left out of account: it loses so much that it
    would hide the rest.
    """
    points = [row for row in points if row.policy != RATE_MATCHED]
    low = 1.3 * min([-2.0, *(_bounds(row, "em_delta")[0] for row in points)])
    high = 1.3 * max([1.0, *(_bounds(row, "em_delta")[1] for row in (*swept, *points))])
    seen = [row for row in swept if 100 * row.em_delta >= low]
    right = max([10.0, *(_bounds(row, "saving")[1] for row in (*seen, *points))])
    axes.set_ylim(low, high)
    axes.set_xlim(-2, 1.03 * right)


def _draw_rules(axes: Axes, rows: Sequence[SweepRow]) -> None:
    """Draws never halting and the bounds of hindsight.

    A bound that lies beyond the limits of the axes is told in words.
    """
    axes.scatter(0, 0, marker="s", s=60, color=COLOR["ink"], zorder=7, label="never halting")
    (_, right), (_, top) = axes.get_xlim(), axes.get_ylim()
    beyond = []
    for row in rows:
        if row.policy not in _BOUND_MARKERS:
            continue
        saving, change = 100 * row.saving, 100 * row.em_delta
        if saving > right or change > top:
            beyond.append(f"{policy_title(row.policy)} {signed(change, 2)} at {saving:.1f} %")
        else:
            axes.scatter(
                saving, change, marker=_BOUND_MARKERS[row.policy], s=90, color=COLOR["ink"],
                zorder=7, label=policy_title(row.policy),
            )  # fmt: skip
    if beyond:
        axes.set_title("beyond the axes: " + "; ".join(beyond), loc="right", fontsize=8)


_GROUP_WORDS = {
    "saving": ("Saving by group", "saving, %"),
    "em_delta": ("EM change by group", "EM change, points"),
}


def _group_drawing(rows: Sequence[GroupRow], gate: float, column: str) -> Drawing:
    """Draws the bars of all groups at a gate, with their words."""
    title, label = _GROUP_WORDS[column]
    how = "Two bars a group, with 95 % intervals: above the head, below the strongest baseline."
    if len({(row.by, row.group) for row in rows}) > len(shown_groups(rows)):
        how += f" Of each kind the {MOST_GROUPS} groups with the most questions."
    text = f"At the points chosen to lose {gate_title(gate)}. {how}"
    return Drawing(f"groups-{column}-{gate}", title, text, groups(rows, column, label))


def shown_groups(rows: Sequence[GroupRow]) -> list[tuple[str, str]]:
    """Returns kind and name of the groups to draw: of each kind those with the most questions."""
    largest = sorted(rows, key=lambda row: -row.num_questions)
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for kind, group in dict.fromkeys((row.by, row.group) for row in largest):
        by_kind.setdefault(kind, []).append((kind, group))
    kept = {group for of_kind in by_kind.values() for group in of_kind[:MOST_GROUPS]}
    return [group for group in dict.fromkeys((r.by, r.group) for r in rows) if group in kept]


def groups(rows: Sequence[GroupRow], column: str, label: str) -> Figure:
    """Draws two bars with intervals for each group: the head, and the baseline beside it.

    Args:
        rows: The groups' rows at one gate, of the head and at most one other policy.
        column: What the bars show, "saving" or "em_delta".
        label: The label of the axis.
    """
    shown = shown_groups(rows)
    kinds = list(dict.fromkeys(kind for kind, _ in shown))
    place = {group: -float(k + kinds.index(group[0])) for k, group in enumerate(shown)}
    with style():
        figure = Figure(figsize=(4.7, 1.0 + 0.36 * (len(shown) + len(kinds))))
        axes = figure.subplots()
        for policy in sorted({row.policy for row in rows}, key=lambda policy: policy != "head"):
            head = policy == "head"
            drawn = [r for r in rows if r.policy == policy and (r.by, r.group) in place]
            axes.barh(
                [place[row.by, row.group] + (0.19 if head else -0.19) for row in drawn],
                [100 * getattr(row, column) for row in drawn],
                height=0.36,
                color=COLOR["head" if head else "paper"],
                edgecolor=COLOR["head" if head else "strongest"],
                hatch=None if head else "/////",
                xerr=_errors(drawn, column),
                error_kw={"ecolor": COLOR["ink"], "elinewidth": 0.9, "capsize": 2},
                label=policy_title(policy),
            )
        axes.axvline(0, color=COLOR["ink"], linewidth=0.8)
        axes.set_yticks(list(place.values()), [plain(name) for _, name in place], fontsize=8)
        for kind in kinds:
            top = max(at for group, at in place.items() if group[0] == kind)
            axes.text(
                0, top + 0.8, f"by {kind_title(kind)}", transform=axes.get_yaxis_transform(),
                fontweight="bold", verticalalignment="center",
            )  # fmt: skip
        axes.set_ylim(min(place.values()) - 0.6, 1.2)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(tick if column == "em_delta" else "{x:g}")
        axes.set_xlabel(label)
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def plain(text: str, most: int = 28) -> str:
    """Returns anybody's text as one line of at most so many printable characters."""
    words = "".join(c if c.isprintable() else " " for c in text).split()
    line = " ".join(words) or "(no name)"
    return line if len(line) <= most else line[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _where_drawing(behaviour: Behaviour) -> Drawing:
    """Draws where in the thought the head halts at a gate, with its words."""
    gate = behaviour.gate
    return Drawing(
        f"where-{gate}",
        "Where in the thought the head halts",
        f"At the point chosen to lose {gate_title(gate)}. A bar for every twentieth of the "
        "thought: share of the traces halted there, at a right answer (plain) and at a wrong one "
        "(hatched). Apart: the share never halted.",
        where(behaviour.where),
    )


def where(found: WhereHalted) -> Figure:
    """Draws the share of the traces halted in every part of the thought, right and wrong."""
    right, wrong = ([100 * share for share in shares] for shares in (found.right, found.wrong))
    edges = [100 * edge for edge in found.edges]
    bars: dict[str, Any] = {
        "align": "edge",
        "width": [b - a for a, b in pairwise(edges)],
        "linewidth": 0.6,
    }
    paper, apart = COLOR["paper"], edges[-1] + 14
    with style():
        figure = Figure(figsize=(4.7, 3.4))
        axes = figure.subplots()
        axes.bar(
            edges[:-1], right, **bars, color=COLOR["right"], edgecolor=paper, label="halted, right"
        )
        axes.bar(
            edges[:-1], wrong, **bars, bottom=right, color=paper, edgecolor=COLOR["wrong"],
            hatch="/////", label="halted, wrong",
        )  # fmt: skip
        axes.bar(
            apart, 100 * found.never, width=8, color=COLOR["grid"],
            edgecolor=COLOR["muted"], label="never halted",
        )  # fmt: skip
        ticks = (0, 20, 40, 60, 80, 100)
        axes.set_xticks([*ticks, apart], [*map(str, ticks), "never"])
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("share of the thought at which it halts, %")
        axes.set_ylabel("traces, %")
        figure.legend(loc="outside lower center", ncols=3, columnspacing=1)
    return figure


def _reliability_drawing(behaviour: Behaviour) -> Drawing:
    """Draws what the halting probability means at a gate, with its words."""
    gate = behaviour.gate
    return Drawing(
        f"reliability-{gate}",
        "What the halting probability means",
        f"At the point chosen to lose {gate_title(gate)}. Circles: share of the decisions at which "
        "halting was the better choice, against what the head said; on the dashed line the two "
        "agree. Diamonds: share at which the forced answer was right. Below: share of all "
        "decisions.",
        reliability(behaviour.reliability),
    )


def reliability(found: Reliability) -> Figure:
    """Draws what halting came to against the probability that the head gave it."""
    seen = found.seen
    said = [100 * each.mean_prob for each in seen]
    num = sum(each.num for each in seen)
    with style():
        figure = Figure(figsize=(4.7, 4.2))
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        upper.plot([0, 100], [0, 100], color=COLOR["muted"], linestyle=(0, (4, 3)), linewidth=1)
        upper.plot(
            said, [100 * each.better for each in seen], color=COLOR["head"], marker="o",
            linewidth=1.6, label="halting was better",
        )  # fmt: skip
        upper.plot(
            said, [100 * each.correct for each in seen], color=COLOR["right"], marker="D",
            markerfacecolor=COLOR["paper"], linewidth=1, linestyle=(0, (1, 1.2)),
            label="answer was right",
        )  # fmt: skip
        lower.bar(
            [50 * (each.low + each.high) for each in seen],
            [100 * each.num / num for each in seen],
            width=[92 * (each.high - each.low) for each in seen],
            color=COLOR["muted"],
        )
        upper.set_ylabel("decisions, %")
        upper.set_ylim(-3, 103)
        lower.set_ylabel("of all, %")
        lower.set_xlabel("halting probability that the head gave, %")
        lower.set_xlim(-2, 102)
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def _training_drawing(curve: Sequence[CurvePoint]) -> Drawing:
    """Draws what heads come to over a training, with the words."""
    return Drawing(
        "training",
        "Exact match, tokens, return and area over the training",
        "On the questions that each training by folds has not seen, in the mean over trainings. "
        "Left the gradient steps of the start from traces, right the decisions of PPO, which goes "
        "on from there. Exact match and tokens are those at the low, the middle and the high third "
        "of the prices; return and area are over all of these. Hollow circles: what the run took.",
        training(curve),
    )


def training(curve: Sequence[CurvePoint]) -> Figure:
    """Draws EM, tokens, return and area of the frontier by step."""
    looks = zip(THIRDS, ("other-2", "other-0", "strongest"), "o^s", _DASHES, strict=False)
    by_price = [(third, COLOR[color], marker, dash) for third, color, marker, dash in looks]
    with style():
        figure = Figure(figsize=(6.4, 7.2))
        grid = figure.subplots(4, 2, sharex="col", sharey="row")
        for k, ppo in enumerate((False, True)):
            here = [point for point in curve if point.ppo == ppo]
            columns = {
                "em": [{of: 100 * value for of, value in at.em.items()} for at in here],
                "tokens": [at.tokens for at in here],
            }
            for axes, found in zip(grid[:2, k], columns.values(), strict=True):
                for third, color, marker, dash in by_price:
                    label = f"{third} prices" if axes is grid[0, 0] else None
                    _over_steps(axes, here, [at[third] for at in found], color, marker, dash, label)
            lines = ([at.balanced_return for at in here], [100 * at.area for at in here])
            for axes, line in zip(grid[2:, k], lines, strict=True):
                _over_steps(axes, here, line, COLOR["head"], "D", "-", None)
            grid[-1, k].set_xlabel("PPO, decisions" if ppo else "start, gradient steps")
            grid[-1, k].xaxis.set_major_formatter("{x:,.0f}")
            grid[-1, k].xaxis.set_major_locator(MaxNLocator(4))
        for axes, label in zip(
            grid[:, 0], ("EM, %", "tokens", "return", "area, points"), strict=True
        ):
            axes.set_ylabel(label)
        figure.legend(loc="outside lower center", ncols=3, handlelength=3.2)
    return figure


def _over_steps(
    axes: Axes,
    curve: Sequence[CurvePoint],
    values: Sequence[float],
    color: str,
    marker: str,
    dash: Any,
    label: str | None,
) -> None:
    """Draws one line over steps, and rings what was taken."""
    axes.plot(
        [at.step for at in curve], values, color=color, marker=marker, linestyle=dash,
        linewidth=1.5, markersize=3.5, label=label,
    )  # fmt: skip
    taken = [(at.step, value) for at, value in zip(curve, values, strict=True) if at.taken]
    axes.scatter(
        [step for step, _ in taken], [value for _, value in taken], s=70, facecolor="none",
        edgecolor=COLOR["ink"], linewidth=1, zorder=5,
    )  # fmt: skip


def tick(value: float, _: object = None) -> str:
    """Returns the label of a tick, with its sign; 0 has none."""
    return f"{value:+.4g}".replace("-", "\N{MINUS SIGN}") if value else "0"
