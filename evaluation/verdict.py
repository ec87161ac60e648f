"""Says in words what a head came to: what it saves, what it loses, how it stands, and where.

The same words are in the page and in the one sentence with which a command ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isclose

from evaluation.frozen import strongest
from evaluation.rows import (
    FrozenRow,
    GroupRow,
    Interval,
    MissingPoint,
    MissingSweep,
    RecordingRow,
    SweepRow,
)
from evaluation.wording import (
    between,
    counted,
    exact_match,
    gate_title,
    is_known,
    kind_title,
    lead,
    number,
    percent,
    points,
    policy_title,
)
from traces.soundness import LEAST_EM

# Groups that are named one by one; of more, the number is told.
_MOST_LOSSES = 10
_UNJUDGED = "Nothing is known of the head by that: do not serve it before it is judged."
# By how the head stands, see `GateVerdict.badge`, what to do.
_ADVICE = {
    "ahead": "The head is ahead: serve it at its own price.",
    "unknown": (
        "What the head is worth cannot be told: do not serve it, and record more questions first."
    ),
    "mixed": (
        "The head loses exact match, as the verdict says: do not serve it at its own price before "
        "one is certified."
    ),
    "never": (
        "By itself the head halts nothing, so that serving it saves nothing: record more "
        "questions, or certify a price."
    ),
}
# So few questions decide nothing by themselves, whatever their intervals.
_FEW_QUESTIONS = 100
# What may help a head that is behind at the price of a verdict.
_CERTIFIED = "see what calibrate.py certifies on questions that are new to it."
_HIGHER_PRICE = f"A higher price may save more: {_CERTIFIED}"
_LOWER_PRICE = f"A lower price may lose less: {_CERTIFIED}"
# Changes of EM that differ by no more than this are equal.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class GateVerdict:
    """What is said of the head at one gate."""

    gate: float
    head: FrozenRow
    strongest: str | None
    """The baseline that the head is compared with, see `evaluation.frozen.strongest`."""
    badge: tuple[str, str]
    """How the head stands: a key for the style, and a few words."""
    sentences: list[str]
    """What the head comes to, and how it compares with the strongest baseline."""
    losses: str
    """A sentence about the groups in which the head loses exact match."""


@dataclass(frozen=True)
class Verdict:
    """The sentence with which a command ends, and what follows from it."""

    words: str
    advice: str
    """Whether to serve the head at its own price, in a sentence."""


def judge(
    frozen: Sequence[FrozenRow | MissingPoint],
    gate: float,
    compared_with: str | None,
    groups: Sequence[GroupRow],
    num_questions: int,
) -> GateVerdict:
    """Judges the head at one gate.

    Args:
        frozen: Every policy at its operating points, "head" among them.
        gate: The gate.
        compared_with: The strongest baseline, see `evaluation.frozen.strongest`.
        groups: The rows of groups; those of the head at this gate count.
        num_questions: The number of questions that the rows are of.
    """
    known = {row.policy: row for row in frozen if isinstance(row, FrozenRow) and row.gate == gate}
    head = known["head"]
    badge, compared = _standing(head, None if compared_with is None else known.get(compared_with))
    lost = _lost([row for row in groups if row.policy == "head" and row.gate == gate])
    if lost:
        worst = f"{kind_title(lost[0].by)} {lost[0].group}"
        more = f" and {counted(len(lost) - 1, 'other group')}" if len(lost) > 1 else ""
        badge = ("mixed", f"{badge[1]}, but loses in {worst}{more}")
    sentences = [_head_words(head, gate, num_questions), *compared]
    return GateVerdict(gate, head, compared_with, badge, sentences, _losses(lost))


def conclusion(
    frozen: Sequence[FrozenRow | MissingPoint],
    groups: Sequence[GroupRow],
    num_questions: int,
    *,
    evidence: bool,
) -> Verdict:
    """Returns what the head is worth, in the one sentence with which a command ends.

    It is about the strictest gate, whose price is the head's own.

    Args:
        frozen: Every policy at its operating points, "head" and "never" among them.
        groups: The rows of groups.
        num_questions: The number of questions that the rows are of.
        evidence: Whether no head decided on a question that it learned from.
    """
    never = next(row for row in frozen if isinstance(row, FrozenRow) and row.policy == "never")
    if not evidence:
        words = "Verdict: none, since the head learned from these questions."
        return Verdict(words, _UNJUDGED)
    if never.em < LEAST_EM:
        words = (
            f"Verdict: none, since the LM, never halted, is right on {percent(never.em)} % of "
            "these traces: where nothing can be lost, a saving says nothing, so look at the "
            "answers and at how they are scored."
        )
        return Verdict(words, _UNJUDGED)
    known = {(row.gate, row.policy): row for row in frozen if isinstance(row, FrozenRow)}
    gates = sorted(gate for gate, policy in known if policy == "head")
    rivals = {gate: known.get((gate, strongest(frozen, gate) or "")) for gate in gates}
    if not known[gates[0], "head"].halts:
        return Verdict(f"Verdict: {_of_never(gates, known, rivals[gates[0]])}.", _ADVICE["never"])
    head, rival = known[gates[0], "head"], rivals[gates[0]]
    name = None if rival is None else rival.policy
    verdict = judge(frozen, gates[0], name, groups, num_questions)
    words = (
        f"Verdict: {verdict.badge[1]}: at a price of {number(head.parameter or 0.0)}, chosen to "
        f"lose {gate_title(head.gate)}, the head {_came_to(head)}, on "
        f"{counted(num_questions, 'question')}{_against(rival)}."
    )
    rules = [row for (gate, _), row in known.items() if gate == gates[0] and _how_served(row)]
    return Verdict(words, _advice(verdict.badge[0], head, rival, rules, num_questions))


def _advice(
    kind: str,
    head: FrozenRow,
    rival: FrozenRow | None,
    rules: Sequence[FrozenRow],
    num_questions: int,
) -> str:
    """Says what to serve, by how the head stands and what EM it may lose.

    Args:
        kind: How it stands, see `GateVerdict.badge`.
        head: The head at its own price.
        rival: The strongest baseline, if there is one.
        rules: The simple rules that can be served, as they were chosen.
        num_questions: The number of questions that the rows are of.
    """
    change = head.em_delta_interval if is_known(head.em_delta_interval) else None
    loses = change is not None and change[1] < 0
    better_price = _LOWER_PRICE if loses else _HIGHER_PRICE
    if kind == "behind" and num_questions < _FEW_QUESTIONS:
        return (
            f"These are few questions to go by: judge it on {_FEW_QUESTIONS} or more before you "
            f"serve it or give it up. {better_price}"
        )
    better = _better_to_serve(head, rules) if kind == "behind" else None
    if better is not None:
        return (
            f"A simple rule does better, {policy_title(better.policy)}, which can be served "
            f"({_how_served(better)}): do not serve the head at this price. {better_price} Or "
            "record more questions and train again."
        )
    if kind in ("ahead", "tie", "behind") and loses:
        return _ADVICE["mixed"]
    if rival is None or kind not in ("tie", "behind"):
        said = _ADVICE[kind]
    elif kind == "tie" and _how_served(rival) is not None:
        return (
            "A simple rule does as well, as far as these questions tell: take that one "
            f"({_how_served(rival)}), or record more questions, which may tell them apart."
        )
    elif kind == "behind" and not _is_better(rival, head):
        return _of_better_head(rival)
    else:
        said = _best_to_serve(kind, rival, rules)
    if kind in ("ahead", "tie", "behind") and change is not None and change[0] < 0:
        said += (
            f" These questions do not exclude a loss of {exact_match(-change[0])} points: if that "
            "is too much, certify a price first."
        )
    return said


def _is_better(rule: FrozenRow, head: FrozenRow) -> bool:
    """Returns whether a rule saves more and is right as often, each as it was chosen."""
    return rule.saving > head.saving and rule.em >= head.em


def _better_to_serve(head: FrozenRow, rules: Sequence[FrozenRow]) -> FrozenRow | None:
    """Returns the one of some rules that the head is furthest behind; None if surely behind none.

    It also has to be better as it was chosen: its setting has to be known before it is served.
    """
    ends = {row.policy: row.head_lead_at_equal_em_interval for row in rules}
    surely = [row for row in rules if is_known(end := ends[row.policy]) and end[1] < 0]
    found = [row for row in surely if _is_better(row, head)]
    return min(found, key=lambda row: row.head_lead_at_equal_em or 0.0, default=None)


def _of_better_head(rival: FrozenRow) -> str:
    """Says what to do about a head that a rule beats only with a setting that nobody had chosen."""
    return (
        "The verdict compares savings at the head's exact match, where the rule may take whichever "
        "setting is best on these very questions. The setting that was chosen for "
        f"{policy_title(rival.policy)} {_came_to(rival)}: that is not better than the head's own "
        f"price. {_HIGHER_PRICE}"
    )


def _best_to_serve(kind: str, rival: FrozenRow, rules: Sequence[FrozenRow]) -> str:
    """Says that the head is the best that can be served, though a rule of replays is as good."""
    how_good = "does as well, as far as these questions tell" if kind == "tie" else "does better"
    compared = "; ".join(
        f"at equal exact match it saves {_more(row.head_lead_at_equal_em)} "
        f"{between(row.head_lead_at_equal_em_interval, lead)}".rstrip()
        + f" than {policy_title(row.policy)}"
        for row in rules
        if row.head_lead_at_equal_em is not None
    )
    return (
        f"A simple rule, {policy_title(rival.policy)}, {how_good}, but in replays alone: it cannot "
        f"be served. No rule that can be served is surely better than the head"
        f"{f' ({compared})' if compared else ''}: of what can be served, serve the head at its own "
        "price. More questions, or signals that it lacks, may close the gap."
    )


def _how_served(rule: FrozenRow) -> str | None:
    """Says how a simple rule is served; None if it runs in replays alone."""
    if rule.policy == "budget":
        return f"haltwise serve --max-thinking-tokens {rule.parameter or 0:.0f}"
    return "docs/YOUR_LM.md, section 3, tells how" if rule.policy == "evidence" else None


def other_price(own: float, has_segments: bool, rows: Sequence[SweepRow | MissingSweep]) -> str:
    """Says what a head serves whose own price is not the one any more that a verdict is about.

    Args:
        own: The head's own price.
        has_segments: Whether segments have prices of their own.
        rows: Every policy over its grid; none if what the head comes to is no evidence.
    """
    by_segment = "; a request that names its segment gets that of the segment" * has_segments
    if not own:
        return f"By now the head's own price is 0, at which it halts nothing{by_segment}."
    said = f"By now the head's own price is another one, {number(own)}"
    known = (one for one in rows if isinstance(one, SweepRow) and one.policy == "head")
    row = next((one for one in known if isclose(one.parameter or 0.0, own)), None)
    return f"{said}{f', which here {_came_to(row)}' if row else ''}{by_segment}."


def side_by_side(rows: Sequence[RecordingRow]) -> str:
    """Returns the sentences with which a comparison of recordings ends, one for each but the first.

    Args:
        rows: At least two recordings, the one that the others are compared with first.
    """
    first, *others = rows
    return "\n".join(
        [
            f"Verdict, beside {first.traces} halted by {first.head}, on "
            f"{counted(first.num_questions, 'question')}:",
            *map(_beside_the_first, others),
        ]
    )


def _beside_the_first(row: RecordingRow) -> str:
    """Says how a recording stands beside the first one."""
    if not row.evidence:
        return f"{row.traces}: none, since {row.head} learned from these questions."
    alone = _lead_in_words(row.em_lead, row.em_lead_interval, points)
    halted = _lead_in_words(row.halted_em_lead, row.halted_em_lead_interval, points)
    saved = _lead_in_words(row.saving_lead, row.saving_lead_interval, lead)
    return (
        f"{row.traces}: alone its EM {alone}. Halted by {row.head} its EM {halted}, and its saving "
        f"{saved}."
    )


def _lead_in_words(found: float, interval: Interval | None, form: Callable[[float], str]) -> str:
    """Says how a difference stands: whether its interval lies above 0, below, or around it."""
    told = f"({' '.join([form(found), between(interval, form)]).strip()} points)"
    if not is_known(interval):
        return f"is the same {told}" if abs(found) <= _ROUNDING else f"differs {told}"
    if interval[0] > 0:
        return f"is ahead {told}"
    return f"is behind {told}" if interval[1] < 0 else f"is a tie {told}"


def _of_never(
    gates: Sequence[float],
    known: Mapping[tuple[float, str], FrozenRow],
    rival: FrozenRow | None,
) -> str:
    """Says what there is instead where the head's own price is never to halt."""
    strictest, lost = known[gates[0], "head"], gate_title(gates[0])
    said = (
        f"never halts: no price was found that was sure to lose {lost}, so that "
        "the head's own price is 0 and no thought is halted unless a request names a price"
        if strictest.parameter is None
        else f"halts nothing: at a price of {number(strictest.parameter)}, chosen to lose {lost}, "
        f"none of these thoughts is halted{_looks_in_vain(strictest)}"
    )
    for gate in gates[1:]:
        head = known[gate, "head"]
        if head.halts:
            price = number(head.parameter or 0.0)
            return (
                f"{said}; a price of {price}, chosen to lose {gate_title(gate)}, {_came_to(head)}"
            )
    if rival is None:
        return said
    return f"{said}; the best of the simple rules, {policy_title(rival.policy)}, {_came_to(rival)}"


def _looks_in_vain(head: FrozenRow) -> str:
    """Says in a clause what the looks of a head cost that halts nothing."""
    return f", and looks cost {percent(-head.saving)} % of the tokens" if head.saving < 0 else ""


def _came_to(row: SweepRow) -> str:
    """Says in a clause what a policy saves and how EM changes, with intervals."""
    saved, change = row.saving_interval, row.em_delta_interval
    meaning = ""
    if is_known(change):
        meaning = ", a loss" if change[1] < 0 else ", a gain" if change[0] > 0 else ""
    tokens = f"% of the tokens {between(saved, percent)}".rstrip()
    return (
        f"saves {percent(row.saving)} {tokens} with a change of exact match of "
        f"{points(row.em_delta)} points {between(change, points)}".rstrip()
        + meaning
    )


def _against(rival: FrozenRow | None) -> str:
    """Says in a clause how much more the head saves than the strongest baseline at equal EM."""
    if rival is None or rival.head_lead_at_equal_em is None:
        return ""
    ahead, interval = rival.head_lead_at_equal_em, rival.head_lead_at_equal_em_interval
    return (
        f"; at equal exact match it saves {_more(ahead)} {between(interval, lead)}".rstrip()
        + f" than the strongest baseline, {policy_title(rival.policy)}"
    )


def _head_words(head: FrozenRow, gate: float, num_questions: int) -> str:
    """Says what the head saves and how EM changes, with intervals."""
    if head.parameter is None:
        return (
            f"No price was found that was sure to lose {gate_title(gate)}, so the head never halts "
            "here: it saves nothing and loses nothing."
        )
    if not head.halts:
        return (
            f"At a price of {number(head.parameter)} the head halts none of these thoughts: it "
            f"saves nothing and loses nothing{_looks_in_vain(head)}."
        )
    saving = f"{percent(head.saving)} % of the tokens{_range(head, 'saving', percent)}"
    change = f"{points(head.em_delta)} points{_range(head, 'em_delta', points)}"
    meaning = _change_words(head, gate, num_questions)
    return (
        f"The head saves {saving}, the cost of its own probes taken off. Exact match changes by "
        f"{change}{meaning}."
    )


def _range(row: FrozenRow, key: str, form: Callable[[float], str]) -> str:
    """Returns the interval of a row's value in words; empty where there is none."""
    found: Interval | None = getattr(row, f"{key}_interval")
    return f" (95 % interval {form(found[0])} to {form(found[1])})" if is_known(found) else ""


def _change_words(head: FrozenRow, gate: float, num_questions: int) -> str:
    """Says what the head's EM change and its interval mean."""
    interval, asked = head.em_delta_interval, counted(num_questions, "question")
    if not is_known(interval):
        if interval is None or abs(head.em_delta) > _ROUNDING:
            return ", of unknown precision"
        # Clopper and Pearson, 1934: if losses are more frequent than this bound, N questions
        # without one have a chance of less than 5 %.
        bound = 1 - 0.05 ** (1 / num_questions)
        return (
            f": no question's EM changed; {asked} exclude, at 95 %, only losses above "
            f"{exact_match(bound)} points"
        )
    low, high = interval
    if high < -gate:
        return f": a loss, though it was chosen to lose {gate_title(gate)}"
    if high < 0:
        return ": a loss, not shown to be larger than what it was chosen to lose"
    if low > 0:
        return ": a gain"
    loss = f", nor from a loss of {exact_match(-low)} points" if low < 0 else ""
    return f", which {asked} cannot tell from no change{loss}"


def _standing(head: FrozenRow, other: FrozenRow | None) -> tuple[tuple[str, str], list[str]]:
    """Says how the head stands against the strongest baseline.

    Returns:
        A key for the style with a few words; and sentences.
    """
    if not head.halts:
        found = [] if other is None else [_own_point("The best of the simple rules", other)]
        return ("never", "never halts" if head.parameter is None else "halts nothing"), found
    if other is None:
        return ("unknown", "no baseline"), ["No baseline is available to compare it with."]
    told = _own_point("The strongest baseline", other)
    ahead, interval = other.head_lead_at_equal_em, other.head_lead_at_equal_em_interval
    if ahead is None:
        return ("unknown", "not compared"), [told, "They were not compared at equal EM."]
    difference = _difference(other, ahead)
    if interval is None:
        return ("unknown", "no interval"), [told, f"{difference}, of unknown precision."]
    if not is_known(interval):
        alike = "Every resample says the same, which is no evidence: it cannot be told."
        return ("unknown", "cannot be told"), [told, f"{difference}. {alike}"]
    difference += f" (95 % interval {lead(interval[0])} to {lead(interval[1])})"
    if interval[0] > 0:
        return ("ahead", "ahead"), [told, f"{difference}: it is ahead."]
    if interval[1] < 0:
        return ("behind", "behind"), [told, f"{difference}: it loses."]
    return ("tie", "tie"), [told, f"{difference}. The interval contains 0: a tie."]


def _own_point(introduced: str, other: FrozenRow) -> str:
    """Says what a baseline comes to at its own operating point."""
    return (
        f"{introduced}, {policy_title(other.policy)}, chosen by the same questions, saves "
        f"{percent(other.saving)} %"
        f"{_range(other, 'saving', percent)}, with an EM change of {points(other.em_delta)} "
        f"points{_range(other, 'em_delta', points)}."
    )


def _difference(other: FrozenRow, ahead: float) -> str:
    """Says how much more the head saves than a baseline at equal EM."""
    name = policy_title(other.policy)
    if other.saving_at_head_em is None:
        where = (
            f"{name[:1].upper()}{name[1:]} never reaches the head's EM. Against what it saves at "
            "its highest EM"
        )
    else:
        where = (
            f"At equal EM on its frontier (there {name} saves {percent(other.saving_at_head_em)} %)"
        )
    return f"{where} the head saves {_more(ahead)}"


def _more(ahead: float) -> str:
    """Returns a lead in saving in points, as more or less."""
    return f"{percent(abs(ahead))} points {'less' if ahead < 0 else 'more'}"


def _lost(groups: Sequence[GroupRow]) -> list[GroupRow]:
    """Returns the groups whose interval of the EM change lies below 0, the worst first."""
    lost = [
        row for row in groups if is_known(row.em_delta_interval) and row.em_delta_interval[1] < 0
    ]
    return sorted(lost, key=lambda row: row.em_delta)


def _losses(lost: Sequence[GroupRow]) -> str:
    """Names the groups whose interval of the head's EM change lies below 0."""
    chance = "Of twenty groups, one interval misses by chance."
    if not lost:
        return f"In no group does the interval of the head's EM change lie below 0. {chance}"
    named = "; ".join(
        f"{kind_title(row.by)} {row.group} {points(row.em_delta)} "
        f"{between(row.em_delta_interval, points)}"
        for row in lost[:_MOST_LOSSES]
    )
    more = f" and {len(lost) - _MOST_LOSSES} more" if len(lost) > _MOST_LOSSES else ""
    return (
        f"Groups where the interval of the head's EM change lies below 0: {named}{more}. {chance}"
    )
