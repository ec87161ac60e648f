"""Heads that are audited beside the champion have books of their own, and may take its place."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from haltwise import HaltHead, InputError
from haltwise.control.betting import log_mean_exp
from haltwise.control.books import Books, Entry
from haltwise.control.estimates import Audit
from haltwise.control.governed import Mode
from haltwise.control.governor import Promise
from haltwise.control.groups import EVERYTHING, Drawn, Groups, Told
from haltwise.control.installation import is_kept_back, key_file_of, name_of, question_id_of
from haltwise.control.library import ENOUGH, MARGIN, Library, Note, Shelved, Trial, promotable
from haltwise.control.status import promote, read_library
from tests.control.test_governed import asked, control, told, until
from tests.control.test_governed import run as run_request
from tests.heads import sure_head

PROMISE = Promise(target=0.1, audit=0.5, rest=0.25)


def shelved(step: int = 1) -> Shelved:
    groups = Groups.begin(PROMISE, num_prices=2, certified=step)
    return Shelved(Books(groups, {}, most_tokens=100.0), (1.0, 2.0))


def begun() -> Library:
    return Library("a", {"a": shelved()}).after(Note(joins={"b": shelved()}))


def drawn(request: str, a: int = 1, b: int = 1) -> Note:
    """An audit at which either head would be served a step."""
    return Note(
        {n: Entry(Drawn(request, step, {EVERYTHING: 0.5})) for n, step in (("a", a), ("b", b))}
    )


def answered(request: str, a: float, b: float, cost_a: float = 80, cost_b: float = 80) -> Note:
    """What either head would have lost and cost at its first price, of 100 tokens."""

    def entry(loss: float, cost: float) -> Entry:
        audit = Audit(np.array([not loss, not loss]), np.array([cost, 10.0]), 100.0)
        return Entry(Told(request, (loss, loss), (False, False)), audit)

    return Note({"a": entry(a, cost_a), "b": entry(b, cost_b)})


def fold(notes: Sequence[Note], library: Library | None = None) -> Library:
    return reduce(Library.after, notes, library or begun())


def text(library: Library) -> str:
    return json.dumps(library.to_json())


def test_a_library_is_the_fold_of_its_notes_wherever_it_is_cut() -> None:
    rng, notes = np.random.default_rng(0), list[Note]()
    for n in range(60):
        notes.append(drawn(f"r{n}", int(rng.integers(0, 3)), int(rng.integers(0, 3))))
        notes.append(answered(f"r{n}", *(rng.random(2) < 0.2).astype(float).tolist()))
        notes += [Note(promotes="b")] if n == 30 else []
    whole, library = fold(notes), begun()
    for note in notes:
        library = Library.from_json(json.loads(text(library)))
        library = library.after(Note.from_json(json.loads(json.dumps(note.to_json()))))
    assert text(library) == text(whole)
    assert (whole.champion, whole.previous) == ("b", "a")
    assert whole.shelf["a"].trial.num == 29 and whole.shelf["b"].trial.num == 0


def test_another_head_serves_from_its_promotion_on_and_back() -> None:
    library = fold([drawn("r"), answered("r", 0, 0)])
    promoted = fold([Note(promotes="b")], library)
    assert promoted.books is promoted.shelf["b"].books
    assert text(promoted) != text(library)
    for nothing in ("", "b", "unknown"):
        assert fold([Note(promotes=nothing)], promoted).to_json() == promoted.to_json()
    back = fold([Note(promotes="a")], promoted)
    assert (back.champion, back.previous) == ("a", "b") and back.books is library.books
    assert fold([Note(joins={"b": shelved(2)})], back).to_json() == back.to_json()


def test_a_pair_is_what_both_lost_and_saved_at_their_own_prices() -> None:
    pairs = [
        drawn("r"), answered("r", 0, 1, 80, 40),
        drawn("s", 1, 0), answered("s", 1, 1, 80, 40),  # the challenger would not halt
        drawn("t", 1, 2), answered("t", 0, 0, 80, 40),  # 10 tokens at its second price
        drawn("u"), drawn("v"), Note({"b": answered("v", 0, 1).entries["b"]}),
    ]  # fmt: skip
    trial = fold(pairs).shelf["b"].trial
    assert trial.num == 3 and trial.lost == pytest.approx(1 - 1 + 0)
    assert trial.saved == pytest.approx((0.6 - 0.2) + (0 - 0.2) + (0.9 - 0.2))
    told_twice = fold([*pairs, answered("r", 0, 1)])
    assert told_twice.shelf["b"].trial.num == 3


@pytest.mark.parametrize(("learned", "num"), [({"a"}, 0), ({"b"}, 0), ({"c"}, 1), (set(), 1)])
def test_what_either_head_may_have_learned_from_is_no_pair(learned: set[str], num: int) -> None:
    note = replace(answered("r", 0, 1), learned=frozenset(learned))
    library = fold([drawn("r"), Note.from_json(json.loads(json.dumps(note.to_json())))])
    assert library.shelf["b"].trial.num == num
    assert library.shelf["b"].books.sum_of(EVERYTHING).num_audits == 1  # its certificate counts it
    older = {name: told for name, told in Note().to_json().items() if name != "learned"}
    assert Note.from_json(older).learned == frozenset()


def capital(seed: int, num: int, lost: tuple[float, float], saved: float) -> Any:
    """Highest capital, as evidence, of many trials whose pairs differ so often either way."""
    rng = np.random.default_rng(seed)
    trial, highest = Trial(), np.zeros((3, 300))
    for _ in range(num):
        draws = rng.random(300)
        loses = (draws < lost[0]).astype(float) - (draws > 1 - lost[1])
        saves = rng.normal(saved, 0.2, 300)
        steps = [Trial().after(one, other) for one, other in zip(loses, saves, strict=True)]
        logs = [np.array([getattr(s, n) for s in steps]) for n in ("worse", "dearer", "as_good")]
        trial = replace(trial, worse=trial.worse + logs[0], dearer=trial.dearer + logs[1])
        trial = replace(trial, as_good=trial.as_good + logs[2])
        now = [log_mean_exp(one) for one in (trial.worse, trial.dearer, trial.as_good)]
        highest = np.maximum(highest, np.array(now))
    return highest >= np.log(ENOUGH)


@pytest.mark.slow
def test_evidence_is_wrong_no_more_often_than_stated() -> None:
    """At the edge of each claim; 5 % of 300 are 15, and 26 are three standard deviations more."""
    at_margin, nothing_saved, as_good = capital(0, 1_000, (0.03 + MARGIN, 0.03), 0.0).sum(axis=1)
    assert at_margin <= 26 and nothing_saved <= 26 and as_good <= 26


@pytest.mark.slow
def test_evidence_comes_where_a_head_is_better_or_worse() -> None:
    better = capital(1, 2_000, (0.01, 0.01), 0.05)
    assert better[0].mean() > 0.65 and better[1].mean() > 0.95 and better[2].mean() == 0
    worse = capital(2, 2_000, (0.05, 0.01), 0.05)
    assert worse[2].mean() > 0.8 and worse[0].mean() < 0.01


def test_who_is_promoted_has_evidence_or_served_before() -> None:
    library = begun()
    for wrong in ("a", "c", "", "previous"):
        with pytest.raises(InputError, match="expected one of b"):
            promotable(library, wrong, True)
    with pytest.raises(InputError, match="head b is not known yet after 0 audits"):
        promotable(library, "b", False)
    assert promotable(library, "b", True) == "b"
    sure = Trial(9, worse=np.full(2, 9.0), dearer=np.full(2, 9.0))
    shelf = {**library.shelf, "b": replace(library.shelf["b"], trial=sure)}
    assert promotable(replace(library, shelf=shelf), "b", False) == "b"
    assert promotable(library.after(Note(promotes="b")), "previous", False) == "a"
    alone = Library("a", {"a": shelved()})
    with pytest.raises(InputError, match="there are no others"):
        promotable(alone, "b", False)


# With a control


def bolder() -> HaltHead:
    """Halts where `sure_head` would at ten times the price."""
    head = sure_head()
    return HaltHead(head.config, head.weights | {"b0": head.weights["b0"] + 1})


def test_a_challenger_learns_what_it_would_as_a_champion(tmp_path: Path) -> None:
    """The same audits, told by the same answers, make the same books."""
    found = []
    for place, heads in enumerate(([sure_head(), bolder()], [bolder()])):
        folder = tmp_path / str(place)
        folder.mkdir()
        with control(folder, head=heads[0], challengers=heads[1:]) as steering:
            until(lambda: len(steering.keeper.library.shelf) == len(heads))  # noqa: B023
            for n in range(3):
                request = asked(id=f"r{n}")
                run_request(steering, request)
                told(steering, request, 8, 12)

            def books() -> Books:
                library: Library = steering.keeper.library
                return library.shelf[bolder().digest].books

            until(lambda: books().sum_of(EVERYTHING).num_audits == 3)
            found.append(books().to_json())
            if place == 0:
                positions = [one.positions for one in seen(steering)]
                assert positions[0].tolist() != positions[1].tolist()
    assert found[0] == found[1]


def test_a_question_that_comes_again_is_no_pair_of_who_learned_from_it(tmp_path: Path) -> None:
    """Half of the questions are learned from, wherever and whenever they come."""
    questions = [f"{n} ?" for n in range(8)]
    with control(tmp_path) as steering:
        key = steering.key
    kept_back = [is_kept_back(key, question_id_of(key, question)) for question in questions]
    assert 0 < sum(kept_back) < 8
    for place, name in enumerate(("", name_of(key), name_of(b"another" * 4))):
        folder = tmp_path / str(place)
        folder.mkdir()
        key_file_of(folder / "state").write_bytes(key)
        learned = HaltHead(replace(bolder().config, installation=name), bolder().weights)
        with control(folder, challengers=[learned]) as steering:
            until(lambda: learned.digest in steering.keeper.library.shelf)  # noqa: B023
            for n, question in enumerate(questions * 2):
                request = asked(id=f"r{n}")
                run_request(steering, request)
                steering.taken(request).question = question
                told(steering, request, 8, 12)
            until(lambda: steering.keeper.books.sum_of(EVERYTHING).num_audits == 16)
            num = steering.keeper.library.shelf[learned.digest].trial.num
            assert num == (2 * sum(kept_back) if name == name_of(key) else 16)


def seen(steering: Any) -> list[Any]:
    """Replays of one more audit, by head."""
    request = asked(id="more")
    run_request(steering, request)
    audit = steering.taken(request)
    steering.break_off(audit)
    return list(audit.replays.values())


def test_a_head_is_promoted_by_whoever_has_the_state_and_rolled_back(tmp_path: Path) -> None:
    with control(tmp_path, challengers=[bolder()]) as steering:
        first, second = steering.champion, bolder().digest
        until(lambda: second in steering.keeper.library.shelf)
        running = asked(id="running", head=first)
        steering.terms(running)
        with pytest.raises(InputError, match="is not known yet after 0 audits"):
            steering.promote(second[:12])
        steering.promote(second[:12], anyway=True)
        until(lambda: steering.champion == second)
        assert steering.head.digest == second and steering.history.moves[0].what == "head promoted"
        # What has begun goes on with the head that it has begun with.
        told(steering, running)
        until(lambda: steering.keeper.library.shelf[first].books.sums[EVERYTHING].num_audits == 1)
        assert promote(tmp_path / "state", "previous", False) == first
        until(lambda: steering.champion == first)
        roles = {one["head"]: one["role"] for one in steering.status()["heads"]}
        assert roles == {first: "champion", second: "previous"}
    command = [sys.executable, "-m", "haltwise", "promote", "--state", str(tmp_path / "state")]
    done = subprocess.run([*command, "--head", second[:8]], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"{second} serves from now on\n"
    assert read_library(tmp_path / "state").champion == second
    for head in ("none", second[:8]):
        done = subprocess.run([*command, "--head", head], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: head is ")
    with control(tmp_path, head=bolder(), challengers=[sure_head()]) as steering:
        assert steering.champion == second  # whoever is named first
    with pytest.raises(InputError, match="about another head"), control(tmp_path):
        pass


@pytest.mark.parametrize("mode", ["observe", "apply"])
def test_a_process_that_lacks_the_champion_halts_nothing_by_it(mode: Mode, tmp_path: Path) -> None:
    with control(tmp_path, challengers=[bolder()]) as other:
        until(lambda: len(other.keeper.library.shelf) == 2)
        with control(tmp_path, mode, audit=1.0) as steering:
            other.promote(bolder().digest, anyway=True)
            until(lambda: steering.champion == bolder().digest)
            request = asked(id="r")
            assert run_request(steering, request).price == (1.0 if mode == "observe" else 0.0)
            assert steering.taken(request) is None and steering.failures.num
            assert "expected it as --head or --challenger" in steering.status()["trouble"]


@pytest.mark.parametrize(
    "said",
    [{}, {"head": 7}, {"head": "x", "anyway": 1}, {"head": "x", "more": 1}, {"head": "unknown"}],
)
def test_promotions_that_make_no_sense_are_refused_and_counted(
    said: dict[str, Any], tmp_path: Path
) -> None:
    with control(tmp_path, challengers=[bolder()]) as steering:
        with pytest.raises(InputError, match="expected"):
            steering.promote(**said)
        assert steering.status()["refused"] == 1
