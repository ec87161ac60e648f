"""The one paragraph with which a command ends."""

from __future__ import annotations

from typing import Any

from evaluation.rows import FrozenRow, MissingPoint
from evaluation.verdict import conclusion, judge
from tests.evaluation.reports import frozen, group, known, made_frozen, made_group

Rows = list[FrozenRow | MissingPoint]


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
    told = conclusion(rows(0.0, 0.25), [], 400, evidence=True)
    assert told == (
        "Verdict: ahead. At a price of 0.25, chosen to lose nothing, the head saves 40.0 % of the "
        "tokens (95 % interval 37.0 to 43.0), the cost of its own probes taken off. Exact match "
        "changes by \N{MINUS SIGN}0.10 points (95 % interval \N{MINUS SIGN}2.10 to +1.90), which "
        "400 questions cannot tell from no change, nor from a loss of 2.10 points. The strongest "
        "baseline, confidence threshold, saves 35.0 % (95 % interval 32.0 to 38.0), with an EM "
        "change of \N{MINUS SIGN}0.20 points (95 % interval \N{MINUS SIGN}2.20 to +1.80). At equal "
        "EM (there confidence threshold saves 45.0 %) the head saves 5.0 points more (95 % "
        "interval +3.0 to +7.0): it is ahead."
    )


def test_a_price_of_a_wider_gate_is_offered_and_not_taken() -> None:
    told = conclusion(rows(0.0, None) + rows(0.01, 0.5), [], 400, evidence=True)
    assert told.startswith(
        "Verdict: The head's own price is 0: it halts no thought, unless a request names a price. "
        "At a price of 0.5, chosen to lose at most 1 point, the head saves 40.0 %"
    )


def test_a_head_without_a_price_says_what_a_rule_does() -> None:
    told = conclusion(rows(0.0, None), [], 400, evidence=True)
    assert told == (
        "Verdict: the head never halts. No price was found that was sure to lose nothing, so the "
        "head never halts here: it saves nothing and loses nothing. The best of the simple "
        "rules, confidence threshold, saves 35.0 % (95 % interval 32.0 to 38.0), with an EM "
        "change of \N{MINUS SIGN}0.20 points (95 % interval \N{MINUS SIGN}2.20 to +1.80)."
    )


def test_where_nothing_can_be_lost_nothing_is_concluded() -> None:
    hopeless = rows(0.0, 0.25)[:2]
    never = made_frozen(frozen(0.0, known("never", None, 0.0, 0.0) | {"em": 0.07}))
    assert conclusion([*hopeless, never], [], 400, evidence=True).startswith(
        "Verdict: none. Never halted, the LM is right on 7.0 % of these traces."
    )
    told = conclusion(rows(0.0, 0.25), [], 400, evidence=False)
    assert told == "Verdict: none, since the head learned from these questions."


def test_a_group_that_loses_stands_in_the_verdict() -> None:
    groups = [made_group(group("task", name, 0.0, "head")) for name in ("easy", "hard")]
    verdict = judge(rows(0.0, 0.25), 0.0, "confidence", groups, 400)
    assert verdict.badge == ("mixed", "ahead, but loses in task hard")
    assert "Verdict: ahead, but loses in task hard. At" in conclusion(
        rows(0.0, 0.25), groups, 400, evidence=True
    )
