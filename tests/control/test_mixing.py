"""Heads are weighed by what audits have told of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from haltwise import HaltHead, InputError
from haltwise.control.books import Books, Entry
from haltwise.control.estimates import Audit
from haltwise.control.governor import Promise
from haltwise.control.groups import EVERYTHING, Drawn, Groups, Told
from haltwise.control.library import Library, Note, Shelved
from haltwise.control.mixing import mix, weights_of
from tests.control.test_governed import asked, control, told, until
from tests.control.test_governed import run as run_request
from tests.heads import sure_head


def library(losses: dict[str, float], num: int = 8) -> Library:
    """Heads with one price, 1, whose audits each lose so much and cost 500 of 1,000 tokens."""
    groups = Groups.begin(Promise(target=0.1, audit=0.5, rest=0.25), 1)
    one = Shelved.begin(Books(groups, {}, 1000.0), (1.0,), (1.0,))
    found = Library("a", {name: one for name in losses})
    for n in range(num):
        drawn = Entry(Drawn(f"r{n}", 1, {EVERYTHING: 0.5}), None, {EVERYTHING: 2})
        found = found.after(Note(dict.fromkeys(losses, drawn)))
        entries = {
            name: Entry(
                Told(f"r{n}", (float(n < loss * num),), (False,)),
                Audit(np.array([n >= loss * num]), np.array([500.0]), 1000.0),
            )
            for name, loss in losses.items()
        }
        found = found.after(Note(entries))
    return found


def test_weights_by_hand() -> None:
    """Costs are 0.5 and 0.25 beside the tokens; the rate is sqrt(8 ln 2 / 8)."""
    found = weights_of(library({"a": 0.5, "b": 0.25}), ["a", "b"], 1.0)
    ratio = np.exp(-np.sqrt(np.log(2)) * 8 * 0.25)
    np.testing.assert_allclose(found, np.array([ratio, 1]) / (1 + ratio))
    np.testing.assert_allclose(weights_of(library({"a": 0, "b": 0}), ["a", "b"], 9.0), [0.5, 0.5])


def test_what_cannot_be_weighed_is_refused() -> None:
    for heads, price, words in (
        (["a", "c"], 1.0, "head c is unknown to the state"),
        (["a", "b"], 0.5, "head a: 0.5 is below all of its prices"),
    ):
        with pytest.raises(InputError, match=words):
            weights_of(library({"a": 0, "b": 0}), heads, price)
    with pytest.raises(InputError, match="head a: no audit tells of it"):
        weights_of(library({"a": 0, "b": 0}, num=0), ["a", "b"], 1.0)


def test_a_mixture_of_what_serves_is_a_head_like_any_other(tmp_path: Path) -> None:
    bold = HaltHead(sure_head().config, sure_head().weights | {"b0": sure_head().weights["b0"] + 1})
    folders = [tmp_path / "sure", tmp_path / "bold"]
    for head, folder in zip((sure_head(), bold), folders, strict=True):
        head.save(folder)
    with control(tmp_path, challengers=[bold]) as steering:
        until(lambda: len(steering.keeper.library.shelf) == 2)
        for n in range(3):
            request = asked(id=f"r{n}")
            run_request(steering, request)
            told(steering, request, 8, 12)
        until(lambda: steering.groups.under_way == {} and steering.keeper.books.sums)
    command = [sys.executable, "-m", "haltwise", "mix", "--state", str(tmp_path / "state")]
    command += ["--heads", *map(str, folders), "--out", str(tmp_path / "mixed")]
    done = subprocess.run([*command, "--price", "1"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f"{tmp_path / 'mixed'}: 0.")
    mixed = HaltHead.load(tmp_path / "mixed")
    assert mixed.weights["b0"].size == 2 * bold.weights["b0"].size
    with control(tmp_path, challengers=[bold, mixed]) as steering:
        until(lambda: mixed.digest in steering.keeper.library.shelf)
    state, out = tmp_path / "state", tmp_path / "new"
    for wrong, words in (
        ((state, folders, 1.0, tmp_path / "mixed"), "is there, expected a folder that is not"),
        ((state, folders[:1], 1.0, out), "1 heads are named, expected 2 at least"),
        ((state, folders, 0.0, out), "price is 0.0, expected above 0"),
        ((state, [tmp_path / "none", folders[0]], 1.0, out), "no head.json"),
        ((tmp_path / "none", folders, 1.0, out), "is not there"),
    ):
        with pytest.raises(InputError, match=words):
            mix(*wrong)
