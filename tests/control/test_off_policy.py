"""What other prices would have spent, from all requests that were served."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from haltwise import InputError
from haltwise.control.bookkeeper import Bookkeeper
from haltwise.control.books import Books
from haltwise.control.course import halts_of, tokens_at
from haltwise.control.governor import Promise
from haltwise.control.groups import Groups
from haltwise.control.library import Library, Shelved
from haltwise.control.off_policy import Replayed, spending, spending_of, table_of
from haltwise.control.record import Record, RequestRow
from haltwise.control.store import store_of

PRICES = np.array([1.0, 2.0, 4.0])


def library() -> Library:
    groups = Groups.begin(Promise(), 3, certified=1)
    return Library("h", {"h": Shelved.begin(Books(groups, {}, 100.0), tuple(PRICES.tolist()))})


def test_where_prices_halt_is_kept_and_read_again() -> None:
    told = halts_of(PRICES, [9.0, 9.0, 5.0])
    assert json.loads(told) == [[0, 9], [4, 5]]
    assert tokens_at(told, np.append(0.5, PRICES)).tolist() == [9, 9, 9, 5]


def test_spending_by_hand() -> None:
    """Three requests due 2: two are served 30 tokens there; the audit, drawn with 1/3, has 90.

    At 1: (30 + 30 + (30 + 3 (90 - 30))) / 3 = 90; at 2 and 4 what all have, 30 and 20.
    """
    served = Replayed(2.0, False, 1 / 3, np.array([30.0, 30.0, 20.0]))
    audit = Replayed(2.0, True, 1 / 3, np.array([90.0, 30.0, 20.0]))
    found = spending(PRICES, [served, audit, served])
    assert found.tokens.tolist() == pytest.approx([90, 30, 20])
    assert found.by_audits.tolist() == pytest.approx([90, 30, 20])
    assert found.exact.tolist() == [0, 1, 1]
    assert (found.num_requests, found.num_audits) == (3, 1)
    assert np.isinf(found.width).all()
    above_all = Replayed(9.0, True, 0.5, np.array([90.0, 30.0, 20.0]))
    assert spending(PRICES, [above_all]).tokens.tolist() == [180, 60, 40]
    nothing_halted = Replayed(0.0, False, 0.5, np.array([90.0, 30.0, 20.0]))
    assert spending(PRICES, [nothing_halted]).tokens.tolist() == [90, 30, 20]


@pytest.mark.whole
def test_it_is_right_in_the_mean_and_sharper_than_audits_alone() -> None:
    """Hard questions are audited less and served less: a plain mean of either is wrong."""
    rng, told, missed = np.random.default_rng(0), [], 0
    truth = 0.5 * np.array([100.0, 70.0, 40.0]) + 0.5 * np.array([400.0, 390.0, 200.0])
    for _ in range(100):
        requests = []
        for at, place, drawn in rng.random((600, 3)):
            hard = at < 0.5
            hard = at < 0.5
            tokens = np.array([400.0, 390.0, 200.0] if hard else [100.0, 70.0, 40.0])
            tokens *= 0.5 + rng.random()
            due = 2.0 if place < 0.5 else 1.0 if hard else 4.0
            audited, rate = bool(drawn < (0.05 if hard else 0.2)), 0.05 if hard else 0.2
            seen = tokens if audited else np.where(due > PRICES, tokens[due == PRICES], tokens)
            requests.append(Replayed(due, audited, rate, seen))
        found = spending(PRICES, requests)
        told.append(found.tokens)
        missed += int((np.abs(found.tokens - truth) > found.width).any())
        assert (found.width < found.width_by_audits).all()
    error = np.std(told, axis=0) / np.sqrt(len(told))
    assert (np.abs(np.mean(told, axis=0) - truth) < 4 * error).all()
    assert missed <= 5


@pytest.mark.whole
def test_the_command_tells_it_from_a_state(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    record = Record(store_of(state))
    for n in range(200):
        audited, halts = n % 4 == 0, halts_of(PRICES, [90.0, 30.0, 20.0])
        if not audited:
            halts = halts_of(PRICES, [30.0, 30.0, 20.0])
        row = RequestRow(f"{n}", 1.0, head="h", price_due=2.0, halts=halts)
        record.put(RequestRow(**vars(row) | {"audited": audited, "audit_probability": 0.25}))
    record.put(RequestRow("other", 1.0, head="other", price_due=2.0, halts=halts))
    record.put(RequestRow("unwatched", 1.0, head="h"))
    record.close()
    Bookkeeper(store_of(state), library(), {}).close()
    found = spending_of(state, library())
    assert found.tokens.tolist() == pytest.approx([90, 30, 20])
    command = [sys.executable, "-m", "haltwise", "experiment", "--state", state, "--prices"]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.stdout.startswith("200 requests, 50 of them audits")
    assert said.stdout.splitlines()[3].split()[:2] == ["2", "100.0"]
    for more in (["--share", "0.5"], ["--head", "h"], ["--budget", "3"]):
        refused = subprocess.run([*command, *more], capture_output=True, text=True)
        assert refused.returncode == 2 and "--prices" in refused.stderr


def test_nothing_is_told_of_few_requests() -> None:
    few = [Replayed(2.0, True, 1.0, np.array([90.0, 30.0, 20.0]))] * 99
    told = "99 requests, 99 of them audits: what other prices would have spent is told from 100 "
    assert table_of(spending(PRICES, few)) == f"{told}requests on"
    assert len(table_of(spending(PRICES, few + few[:1])).splitlines()) == 2 + len(PRICES)


def test_a_state_without_replays_is_refused(tmp_path: Path) -> None:
    Record(store_of(tmp_path / "state")).close()
    with pytest.raises(InputError, match="expected some of haltwise serve --replay-all"):
        spending_of(tmp_path / "state", library())
