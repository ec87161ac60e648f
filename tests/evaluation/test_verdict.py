"""The one sentence with which a command ends."""

from __future__ import annotations

from typing import Any

import pytest

from evaluation.rows import FrozenRow, MissingPoint
from evaluation.verdict import conclusion, judge, other_price
from tests.evaluation.reports import (
    frozen,
    group,
    known,
    made,
    made_frozen,
    made_group,
    made_row,
    report,
)

Rows = list[FrozenRow | MissingPoint]
MINUS = "\N{MINUS SIGN}"


def rows(gate: float, price: float | None, **head: Any) -> Rows:
    """The head, the confidence threshold that it leads by 5 points, and never halting."""
    saving, lead = (0.4, 0.05) if price else (0.0, None)
    made = [
        frozen(gate, known("head", price, -0.001 if price else 0.0, saving) | head),
        frozen(gate, known("confidence", 0.9, -0.002, 0.35), lead),
        frozen(gate, known("never", None, 0.0, 0.0)),
    ]
    return [made_frozen(row) for row in made]


def test_a_head_that_halts_is_told_with_price_saving_change_and_rival() -> None:
    assert conclusion(rows(0.0, 0.25), [], 400, evidence=True).words == (
        "Verdict: ahead: at a price of 0.25, chosen to lose nothing, the head saves 40.0 % of the "
        f"tokens [37.0, 43.0] with a change of exact match of {MINUS}0.10 points [{MINUS}2.10, "
        "+1.90], on 400 questions; at equal exact match it saves 5.0 points more [+3.0, +7.0] "
        "than the strongest baseline, confidence threshold."
    )


def test_a_price_of_a_wider_gate_is_offered_and_not_taken() -> None:
    assert conclusion(rows(0.0, None) + rows(0.01, 0.5), [], 400, evidence=True).words == (
        "Verdict: never halts: no price was found that was sure to lose nothing, so that the "
        "head's own price is 0 and no thought is halted unless a request names a price; a price of "
        "0.5, chosen to lose at most 1 point, saves 40.0 % of the tokens [37.0, 43.0] with a "
        f"change of exact match of {MINUS}0.10 points [{MINUS}2.10, +1.90]."
    )


def test_a_head_without_a_price_says_what_a_rule_does() -> None:
    told = conclusion(rows(0.0, None), [], 400, evidence=True).words
    assert told.endswith(
        "; the best of the simple rules, confidence threshold, saves 35.0 % of the tokens [32.0, "
        f"38.0] with a change of exact match of {MINUS}0.20 points [{MINUS}2.20, +1.80]."
    )


def test_a_head_that_halts_nothing_at_its_price_is_no_tie() -> None:
    nothing = {"saving": -0.02, "halt_rate": 0.0, "em_delta": 0.0}
    found = conclusion(rows(0.0, 0.004, **nothing), [], 400, evidence=True)
    assert found.words.startswith(
        "Verdict: halts nothing: at a price of 0.004, chosen to lose nothing, none of these "
        "thoughts is halted, and looks cost 2.0 % of the tokens; the best of the simple rules, "
        "confidence threshold, saves 35.0 %"
    )
    assert found.advice.startswith("By itself the head halts nothing")
    shown = judge(rows(0.0, 0.004, **nothing), 0.0, "confidence", [], 400)
    assert shown.badge == ("never", "halts nothing")


def test_a_head_is_compared_with_what_is_surely_ahead_of_it() -> None:
    def baseline(name: str, lead: float, interval: list[float]) -> FrozenRow | MissingPoint:
        row = frozen(0.0, known(name, 0.9, 0.0, 0.6), lead)
        return made_frozen(row | {"head_lead_at_equal_em_interval": interval})

    wide, sure = baseline("logistic", -0.6, [-0.7, 0.0]), baseline("entropy", -0.5, [-0.6, -0.4])
    found = conclusion([*rows(0.0, 0.25), wide, sure], [], 400, evidence=True).words
    assert found.startswith("Verdict: behind") and "the strongest baseline, entropy" in found


def test_a_loss_is_called_one() -> None:
    lost = {"em_delta": -0.03, "em_delta_interval": [-0.05, -0.01]}
    assert (
        "points [\N{MINUS SIGN}5.00, \N{MINUS SIGN}1.00], a loss, on 400"
        in conclusion(rows(0.0, 0.25, **lost), [], 400, evidence=True).words
    )


def test_an_interval_that_is_no_evidence_is_left_out() -> None:
    alike = {"saving_interval": [0.4, 0.4], "em_delta": 0.0, "em_delta_interval": [0.0, 0.0]}
    assert (
        "of the tokens with a change of exact match of +0.00 points, on 400"
        in conclusion(rows(0.0, 0.25, **alike), [], 400, evidence=True).words
    )


def test_where_nothing_can_be_lost_nothing_is_concluded() -> None:
    hopeless = rows(0.0, 0.25)[:2]
    never = made_frozen(frozen(0.0, known("never", None, 0.0, 0.0) | {"em": 0.07}))
    assert conclusion([*hopeless, never], [], 400, evidence=True).words.startswith(
        "Verdict: none, since the LM, never halted, is right on 7.0 % of these traces"
    )
    told = conclusion(rows(0.0, 0.25), [], 400, evidence=False).words
    assert told == "Verdict: none, since the head learned from these questions."


def test_a_group_that_loses_stands_in_the_verdict() -> None:
    groups = [made_group(group("task", name, 0.0, "head")) for name in ("easy", "hard")]
    verdict = judge(rows(0.0, 0.25), 0.0, "confidence", groups, 400)
    assert verdict.badge == ("mixed", "ahead, but loses in task hard")
    assert (
        "Verdict: ahead, but loses in task hard: at"
        in conclusion(rows(0.0, 0.25), groups, 400, evidence=True).words
    )


LOST = {"em_delta": -0.03, "em_delta_interval": [-0.05, -0.01]}
WORSE = {"saving": 0.3, "em": 0.5}
HARD = [made_group(group("task", "hard", 0.0, "head"))]


@pytest.mark.parametrize(
    ("lead", "interval", "head", "groups", "said", "advice"),
    [
        (
            0.05,
            [0.03, 0.07],
            {"em_delta_interval": [0.0, 0.02]},
            [],
            "ahead",
            "serve it at its own",
        ),
        (0.05, [0.03, 0.07], {}, [], "ahead", "do not exclude a loss of 2.10 points"),
        (0.05, [0.03, 0.07], LOST, [], "ahead", "do not serve it"),
        (0.05, [0.03, 0.07], {}, HARD, "ahead, but", "do not serve it"),
        (0.01, [-0.01, 0.03], {}, [], "tie", "does as well, as far as these questions tell, but"),
        (0.01, [-0.01, 0.03], LOST, [], "tie", "do not serve it"),
        (-0.05, [-0.07, -0.03], {}, [], "behind", "not better than the head's own price. A high"),
        (-0.05, [-0.07, -0.03], WORSE, [], "behind", "does better, but in replays alone"),
        (-0.05, [-0.07, -0.03], WORSE | LOST, [], "behind", "do not serve it at its own price"),
        (0.05, [0.05, 0.05], {}, [], "cannot be told", "do not serve it, and record more"),
        (0.05, None, {}, [], "no interval", "do not serve it, and record more"),
        (None, None, {}, [], "no baseline", "do not serve it, and record more"),
    ],
)
def test_what_to_do_follows_from_the_verdict(
    lead: float | None, interval: Any, head: Any, groups: Any, said: str, advice: str
) -> None:
    made = rows(0.0, 0.25, **head)
    rival = {"head_lead_at_equal_em": lead, "head_lead_at_equal_em_interval": interval}
    made[1] = made_frozen(frozen(0.0, known("confidence", 0.9, -0.002, 0.35), 0.05) | rival)
    found = conclusion(made, groups, 400, evidence=True)
    assert found.words.startswith(f"Verdict: {said}") and advice in found.advice
    serve = "serve it at its own price." in found.advice
    assert serve is (said == "ahead" and head is not LOST)
    # A rule that runs in replays alone leaves nothing else to serve.
    best = (said == "tie" and head is not LOST) or (said == "behind" and head is WORSE)
    assert (": of what can be served, serve the head at its own price." in found.advice) is best


@pytest.mark.parametrize(
    ("name", "num", "advice"),
    [
        ("budget", 400, "which can be served (haltwise serve --max-thinking-tokens 96)"),
        ("evidence", 400, "which can be served (docs/YOUR_LM.md, section 3, tells how)"),
        ("evidence", 99, "These are few questions to go by: judge it on 100 or more"),
    ],
)
def test_a_rule_that_is_better_is_named_with_how_it_is_served(
    name: str, num: int, advice: str
) -> None:
    made = rows(0.0, 0.25, **WORSE)
    behind = {"head_lead_at_equal_em": -0.05, "head_lead_at_equal_em_interval": [-0.07, -0.03]}
    made[1] = made_frozen(frozen(0.0, known(name, 96.0, -0.002, 0.35), 0.05) | behind)
    told = conclusion(made, [], num, evidence=True).advice
    assert advice in told and "A higher price may save more" in told
    made[0] = made_frozen(frozen(0.0, known("head", 0.25, -0.1, 0.4) | WORSE | LOST))
    told = conclusion(made, [], num, evidence=True).advice
    assert advice in told and "A lower price may lose less" in told


@pytest.mark.parametrize(
    ("lead", "interval", "saving", "advice"),
    [
        (0.094, [0.07, 0.12], 0.2, "equal exact match it saves 9.4 points more [+7.0, +12.0] than"),
        (-0.02, [-0.05, 0.01], 0.5, ": of what can be served, serve the head at its own price."),
        (-0.02, [-0.05, -0.01], 0.2, ": of what can be served, serve the head at its own price."),
        (-0.02, [-0.05, -0.01], 0.5, "max-thinking-tokens 96): do not serve the head at this"),
    ],
)
def test_a_rule_of_replays_alone_is_no_reason_not_to_serve_a_head(
    lead: float, interval: list[float], saving: float, advice: str
) -> None:
    def rule(name: str, saving: float, lead: float, interval: list[float]) -> Any:
        row = frozen(0.0, known(name, 96.0, 0.0, saving), lead)
        return made_frozen(row | {"head_lead_at_equal_em_interval": interval})

    trees, budget = (
        rule("boosted", 0.6, -0.145, [-0.2, -0.1]),
        rule("budget", saving, lead, interval),
    )
    found = conclusion([*rows(0.0, 0.25, em=0.5), trees, budget], [], 400, evidence=True)
    assert found.words.startswith("Verdict: behind") and advice in found.advice
    assert ("do not serve" in found.advice) is ("do not serve" in advice)


def test_where_there_is_no_verdict_or_nothing_is_halted_no_head_is_to_be_served() -> None:
    assert "do not serve it" in conclusion(rows(0.0, 0.25), [], 400, evidence=False).advice
    never = conclusion(rows(0.0, None), [], 400, evidence=True).advice
    assert never.startswith("By itself the head halts nothing") and "certify a price" in never


def test_less_is_told_as_less() -> None:
    made = rows(0.0, 0.25)
    made[1] = made_frozen(frozen(0.0, known("confidence", 0.9, -0.002, 0.35), -0.211))
    assert (
        f"it saves 21.1 points less [{MINUS}23.1, {MINUS}19.1] than the strongest baseline"
        in conclusion(made, [], 400, evidence=True).words
    )


def test_a_head_that_serves_another_price_by_now_says_what_that_comes_to() -> None:
    found = report() | {"own_price": 0.75, "certificate": None}
    assert made(found).other_price == ""
    # A price of 0.3 saves 30 % at 2 points less, by the fixture's rows.
    told = made(found | {"own_price": 0.3}).other_price
    assert told.startswith(
        "By now the head's own price is another one, 0.3, which here saves 30.0 %"
    )
    assert f"{MINUS}2.00 points" in told
    unknown = "By now the head's own price is another one, 0.35."
    assert made(found | {"own_price": 0.35}).other_price == unknown
    learned = made(found | {"own_price": 0.3, "evidence": False})
    assert learned.other_price == "By now the head's own price is another one, 0.3."
    assert other_price(0.0, True, [made_row(known("head", 0.3, 0.0, 0.3))]) == (
        "By now the head's own price is 0, at which it halts nothing; a request that names its "
        "segment gets that of the segment."
    )
