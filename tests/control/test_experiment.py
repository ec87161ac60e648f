"""A randomised comparison of two heads, from the record alone."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from haltwise import InputError
from haltwise.control.betting import normal_half_width
from haltwise.control.bookkeeper import Bookkeeper
from haltwise.control.books import Books
from haltwise.control.canary import Canary
from haltwise.control.experiment import (
    LARGEST,
    Kind,
    Served,
    compare,
    effect,
    evidence_of_mismatch,
    table_of,
)
from haltwise.control.governor import Promise
from haltwise.control.groups import Groups
from haltwise.control.library import Library, Note, Shelved
from haltwise.control.record import LabelRow, Record, RequestRow
from haltwise.control.store import store_of
from haltwise.control.trial import Pair, Side, Trial


def served(is_challenger: bool, probability: float = 0.5, **values: float) -> Served:
    nothing: dict[Kind, float | None] = dict.fromkeys(LARGEST)
    return Served("u", is_challenger, probability, {**nothing, **values})  # type: ignore[dict-item]


def test_an_effect_by_hand() -> None:
    """Weights 2 and -2; the means before are 0 and 0.4: 2 * 0.4, -2 * (0.6 - 0.4), in the mean."""
    units = [served(True, failures=0.4), served(False, failures=0.6), served(False)]
    found = effect(units, "failures")
    assert (found.units, found.champion, found.challenger) == (2, 0.6, 0.4)
    assert found.estimate == pytest.approx((0.8 - 0.4) / 2)
    assert (found.low, found.high) == (-1, 1)
    assert effect([], "tokens").high == LARGEST["tokens"]


def test_what_is_no_audit_stands_for_those_that_are() -> None:
    """Weights 4, -2 and 0; the means before are 0 and 0.4, and three units count."""
    seen = replace(served(True, failures=0.4), weight=2.0)
    found = effect([seen, served(False, failures=0.6), replace(seen, weight=0.0)], "failures")
    assert (found.units, found.champion) == (2, 0.6) and found.challenger == pytest.approx(0.4)
    assert found.estimate == pytest.approx((4 * 0.4 - 2 * (0.6 - 0.4)) / 3)


def test_mismatch_by_hand() -> None:
    """B(3, 2) / 0.5^3 = 8 / 12, for two of three; a share of its own counts by itself."""
    units = [served(True), served(True), served(False)]
    assert evidence_of_mismatch(units) == pytest.approx(8 / 12)
    more = [*units, served(False, probability=0.25)]
    assert evidence_of_mismatch(more) == pytest.approx(8 / 12 * 0.5 / 0.75)
    assert evidence_of_mismatch([served(True, probability=0.01)] * 3) > 1_000


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_intervals_hold_at_all_times_and_are_of_use(share: float) -> None:
    """200 streams of 1,500 units with an effect of -300 tokens; 5 % of them may miss it once."""
    rng, missed, told = np.random.default_rng(0), 0, 0
    for _ in range(100):
        drawn = rng.random(1_500) < share
        tokens = np.clip(rng.lognormal(7, 0.7, 1_500), 0, 32_768) - 300 * drawn
        units = [
            served(bool(one), share, tokens=float(value))
            for one, value in zip(drawn, tokens, strict=True)
        ]
        found = [effect(units[:num], "tokens") for num in (50, 200, 600, 1_500)]
        missed += any(not one.low <= -300 <= one.high for one in found)
        told += found[-1].high < 0
    assert missed <= 5 + 3 * 5**0.5
    assert told >= (90 if share == 0.5 else 0)


@pytest.mark.whole
def test_the_randomised_comparison_and_the_pairs_of_audits_agree() -> None:
    """Full answers have 1,000 tokens, of which the challenger saves 10 % more in the mean.

    Of 1,500 requests half are served by it, and a tenth are audits that tell of both heads.
    """
    rng, agree, sharper = np.random.default_rng(2), 0, 0
    for _ in range(50):
        old = rng.uniform(0, 0.8, 1_500)
        new = np.clip(old + rng.uniform(-0.1, 0.3, 1_500), 0, 1)
        trial, saved = Trial.begin(1, 1), []
        drawn = rng.random(1_500) < 0.5
        units = [
            served(bool(one), tokens=1_000 * float(1 - (b if one else a)))
            for one, a, b in zip(drawn, old, new, strict=True)
        ]
        for n in range(0, 1_500, 10):
            sides = [Side((0.0,), ("x", "x"), (float(one[n]),), 1) for one in (new, old)]
            trial = trial.after(str(n), Pair(*sides))
            saved.append(new[n] - old[n])
        found, paired = effect(units, "tokens"), -1_000 * trial.status(1, 1)["saves_more"]
        width = 1_000 * float(normal_half_width(150, np.std(saved), 0.05)) / 150
        agree += found.low - width <= paired <= found.high + width
        sharper += width < (found.high - found.low) / 2
    assert agree == 50 and sharper == 50


# With a record


def library(**more: Any) -> Library:
    groups = Groups.begin(Promise(), 1, certified=1)
    one = Shelved.begin(Books(groups, {}, 100.0), (1.0,), (1.0,))
    return Library("old", {"old": one, "new": one}, **more)


def recorded(
    folder: Path,
    saves: float = 500.0,
    share: float = 0.5,
    fails: float = 0.0,
    audits: tuple[float, float] = (0.0, 0.0),
    until: int = 400,
) -> str:
    """A store with 400 sessions of two requests each, half of them of either head.

    Of the two heads' requests these shares are audits, which save nothing, up to some session.
    """
    state, rng = str(folder / "state"), np.random.default_rng(1)
    record = Record(store_of(state))
    for n in range(400):
        is_new = bool(rng.random() < 0.5)
        for m in range(2):
            audited = (probability := audits[is_new] * (n < until)) > rng.random()
            tokens = int(rng.normal(1_500, 100) - saves * (is_new and not audited))
            failed = is_new and rng.random() < fails
            record.put(
                RequestRow(
                    f"{n}-{m}",
                    1.0 + n,
                    session=f"s{n}",
                    head="new" if is_new else "old",
                    head_probability=share if is_new else 1 - share,
                    output_tokens=tokens,
                    seconds=2.0,
                    outcome="cut off" if failed else "stop",
                    audited=audited,
                    audit_probability=probability,
                )
            )
    record.put(RequestRow("audit", 1.0, head="old", head_probability=0.5, audited=True))
    record.put(RequestRow("before", 1.0, head="old"))
    record.put(LabelRow("0-0", 0, "user", 0.0, None, 1.0))
    record.close()
    return state


def ready(found: Library) -> Library:
    capital = np.full((1, 2, 2), 9.0)
    trial = replace(Trial.begin(1, 1), worse=capital, dearer=capital)
    return replace(found, shelf={**found.shelf, "new": replace(found.shelf["new"], trial=trial)})


def test_a_comparison_is_told_from_the_record(tmp_path: Path) -> None:
    state, running = recorded(tmp_path), library(canary=Canary.begin("new", 0.5))
    found = compare(state, running)
    assert (found.champion, found.challenger) == ("old", "new")
    assert sum(found.units) == 400 and found.mismatch < 10 and found.unseen == (1, 0)
    tokens, seconds, failures, complaints = found.effects
    assert tokens.low < -500 < tokens.high < 0 and tokens.units == 400
    assert seconds.champion == pytest.approx(2) == seconds.challenger
    assert failures.champion == failures.challenger == 0
    assert max(complaints.champion, complaints.challenger) > 0
    assert found.verdict.startswith("No winner yet: it costs fewer tokens")
    assert compare(state, ready(running)).verdict.startswith("The challenger wins")
    stopped = replace(running.shelf["new"], stopped="by hand")
    over = replace(running, canary=None, shelf={**running.shelf, "new": stopped})
    assert compare(state, over).challenger == "new"
    promoted = replace(running, canary=None).after(Note(promotes="new"))
    assert compare(state, promoted).challenger == "new"
    assert "serves all requests already" in compare(state, promoted).verdict
    assert "tokens" in table_of(found) and found.verdict in table_of(found)


@pytest.mark.parametrize(
    ("told", "budget", "verdict"),
    [
        ({"saves": -500.0}, None, "The champion wins: the challenger costs more tokens."),
        ({"fails": 0.6}, None, "The champion wins: the challenger has more failures."),
        ({"share": 0.1}, None, "The shares do not fit the draws"),
        ({"saves": 0.0}, None, "No winner yet: it is not known which"),
        ({"saves": 0.0}, 400, "No winner: 400 units have been served, and the budget is 400."),
        ({"saves": 0.0}, 401, "No winner yet"),
    ],
)
def test_verdicts(told: dict[str, Any], budget: int | None, verdict: str, tmp_path: Path) -> None:
    state, running = recorded(tmp_path, **told), library(canary=Canary.begin("new", 0.5))
    assert compare(state, ready(running), budget).verdict.startswith(verdict)


@pytest.mark.parametrize("until", [400, 200])
def test_heads_that_are_audited_at_rates_of_their_own_are_compared(
    tmp_path: Path, until: int
) -> None:
    state = recorded(tmp_path, audits=(0.1, 0.9), until=until)
    found = compare(state, library(canary=Canary.begin("new", 0.5)))
    assert found.mismatch < 10 and sum(found.units) + sum(found.unseen) == 401
    tokens = found.effects[0]
    assert tokens.low < -500 < tokens.high and tokens.challenger == pytest.approx(1_000, abs=30)


def test_of_a_head_whose_requests_are_all_audits_nothing_is_known(tmp_path: Path) -> None:
    """As they are until its price is certified, after 300 sessions in the second record."""
    (tmp_path / "later").mkdir()
    states = (
        recorded(tmp_path, audits=(0.1, 1.0)),
        recorded(tmp_path / "later", audits=(0.1, 1.0), until=300),
    )
    never, later = (compare(one, library(canary=Canary.begin("new", 0.5))) for one in states)
    assert never.units == (0, 0) and never.verdict.startswith("Nothing is known yet: all requests")
    assert never.mismatch < 10 and "unseen (audits)" in table_of(never)
    assert sum(later.units) == pytest.approx(100, abs=2) and later.effects[0].high < 0


@pytest.mark.whole
def test_the_command_tells_a_comparison_and_draws_it(tmp_path: Path) -> None:
    state = recorded(tmp_path)
    groups = Groups.begin(Promise(), 1, certified=1)
    begun = Library("old", {"old": Shelved.begin(Books(groups, {}, 100.0), (1.0,))})
    keeper = Bookkeeper(store_of(state), begun, {})
    keeper.put(Note(joins={"new": begun.shelf["old"]}))
    keeper.close()
    command = [sys.executable, "-m", "haltwise", "experiment", "--state", state]

    def said(*more: str) -> str:
        return subprocess.run([*command, *more], capture_output=True, text=True).stdout

    assert said("--head", "new") == "new serves 50 % from now on\n"
    assert "No winner yet: it costs fewer tokens" in said("--html", str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert "No winner yet" in page and page.count("<svg") == 4 and "$" not in page
    for more, words in (
        (["--budget", "0"], "error: budget is 0"),
        (["--share", "0.1"], "error: --share is of a comparison that begins"),
        (["--head", "new", "--budget", "9"], "error: --head begins a comparison"),
    ):
        refused = subprocess.run([*command, *more], capture_output=True, text=True)
        assert refused.returncode == 2 and refused.stderr.startswith(words)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    Record(store_of(tmp_path / "empty")).close()
    with pytest.raises(InputError, match="no request was served while heads were drawn"):
        compare(tmp_path / "empty", library())
    with pytest.raises(InputError, match="budget is 0, expected at least 1"):
        compare(tmp_path / "empty", library(), 0)
    record = Record(store_of(tmp_path / "one"))
    record.put(RequestRow("a", 1.0, head="new", head_probability=0.5))
    record.close()
    with pytest.raises(InputError, match="only the challenger has served"):
        compare(tmp_path / "one", library(canary=Canary.begin("new", 0.5)))


def test_means_of_nothing_are_none() -> None:
    assert math.isnan(effect([served(True, tokens=1.0)], "tokens").champion)
