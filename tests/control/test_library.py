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
from haltwise.control.betting import STAKES
from haltwise.control.books import Books, Entry
from haltwise.control.canary import SHARES, STEP_AUDITS, Arms, Canary, Harm
from haltwise.control.estimates import Audit
from haltwise.control.governed import Mode
from haltwise.control.governor import Promise
from haltwise.control.groups import EVERYTHING, Drawn, Groups, Opened, Told
from haltwise.control.installation import is_kept_back, key_file_of, name_of, question_id_of
from haltwise.control.library import Library, Note, Shelved, experiment, promotion, rollback
from haltwise.control.status import read_library
from haltwise.control.status import roll_back as rolled_back
from haltwise.control.trial import MARGIN, Trial
from tests.control.test_governed import asked, control, told, until
from tests.control.test_governed import run as run_request
from tests.heads import sure_head

PROMISE = Promise(target=0.1, audit=0.5, rest=0.25)


def shelved(step: int = 1) -> Shelved:
    groups = Groups.begin(PROMISE, num_prices=2, certified=step)
    return Shelved.begin(Books(groups, {}, most_tokens=100.0), (1.0, 2.0))


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
        notes += [Note(tries=Canary.begin("b"), arms=harmed(1, "failures"))] if n == 10 else []
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
    assert trial.num == 3 and trial.lost.tolist() == [[2, 1, 1]] * 2  # beside never halting too
    at_first = np.array([3 * 0.6, 3 * 0.6 - 3 * 0.2, 3 * 0.6 - 3 * 0.9])
    np.testing.assert_allclose(trial.saved, [at_first, at_first + 0.9], atol=1e-9)
    served = [1 - 0, 0 - 1, 0 - 0]  # of the challenger, less the champion
    as_good = sum(np.log1p(STAKES / 1.01 * (more - MARGIN)) for more in served)
    np.testing.assert_allclose(trial.as_good, as_good)
    told_twice = fold([*pairs, answered("r", 0, 1)])
    assert told_twice.shelf["b"].trial.num == 3


@pytest.mark.parametrize(("learned", "num"), [({"a"}, 0), ({"b"}, 0), ({"c"}, 1), (set(), 1)])
def test_what_either_head_may_have_learned_from_is_no_pair(learned: set[str], num: int) -> None:
    note = replace(answered("r", 0, 1), learned=frozenset(learned))
    library = fold([drawn("r"), Note.from_json(json.loads(json.dumps(note.to_json())))])
    assert library.shelf["b"].trial.num == num
    assert library.shelf["b"].books.sum_of(EVERYTHING).num_audits == 1  # its certificate counts it


def sure(library: Library, logs: float = 9.0) -> Library:
    """The library with evidence that b is as good and cheaper; below 0 with none, at a cost."""
    capital = np.full((2, 3, 2), logs)
    trial = replace(Trial.begin(2, 2), worse=capital, dearer=capital)
    return replace(library, shelf={**library.shelf, "b": replace(library.shelf["b"], trial=trial)})


def test_who_is_promoted_has_evidence() -> None:
    library = begun()
    for wrong in ("a", "c", ""):
        with pytest.raises(InputError, match="expected one of b"):
            promotion(library, wrong, True)
    with pytest.raises(InputError, match="head b is not known yet after 0 audits"):
        promotion(library, "b", False)
    assert promotion(library, "b", True).promotes == "b"
    tried = promotion(sure(library), "b", False)
    assert tried.tries == Canary.begin("b")
    with pytest.raises(InputError, match=r"b serves 0.01 of all requests, expected a roll"):
        promotion(sure(library.after(tried)), "b", False)
    alone = Library("a", {"a": shelved()})
    with pytest.raises(InputError, match="there are no others"):
        promotion(alone, "b", False)
    with pytest.raises(InputError, match="no promotion is left"):
        rollback(alone)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(InputError, match="expected between 0 and 1"):
            experiment(library, "b", share)


def audits(num: int, first: int = 0) -> list[Note]:
    """Audits at which both lose nothing, and b saves 20 points more."""
    return [
        note
        for n in range(first, first + num)
        for note in (drawn(f"r{n}"), answered(f"r{n}", 0, 0, 80, 60))
    ]


def test_a_canary_climbs_by_audits_and_evidence_and_never_skips() -> None:
    library, shares = sure(begun()).after(Note(tries=Canary.begin("b"))), []
    for n in range(3 * STEP_AUDITS):
        library = fold(audits(1, n), library)
        shares.append(1.0 if library.canary is None else library.canary.share)
    each = [share for share in SHARES for _ in range(STEP_AUDITS)]
    assert shares == [*each[1:], 1.0]
    assert (library.champion, library.previous) == ("b", "a")


@pytest.mark.parametrize("logs", [0.0, 2.9])
def test_a_canary_waits_for_evidence(logs: float) -> None:
    """What was known once and is not now is not enough for the next step."""
    library = begun().after(Note(tries=Canary.begin("b")))
    library = fold(audits(STEP_AUDITS - 1), library)
    library = fold(audits(1, 1000), sure(library, logs - 0.1))
    assert library.canary is not None and library.canary.share == SHARES[0]
    assert library.canary.audits == STEP_AUDITS
    library = fold(audits(1, 2000), sure(library, 9.0))
    assert library.canary is not None and library.canary.share == SHARES[1]


def test_an_experiment_is_held_at_its_share() -> None:
    library = sure(begun())
    library = fold([experiment(library, "b", 0.5), *audits(2 * STEP_AUDITS)], library)
    assert library.canary is not None and library.canary.share == 0.5
    assert library.after(Note(tries=Canary.begin("b"))).canary == library.canary


def harmed(num: int, kind: str) -> Arms:
    """Requests that were harmed under the challenger, and none under the champion."""
    harm = reduce(Harm.__add__, [Harm.of(1.0, True, 0.01)] * num)
    harms: dict[str, Any] = {kind: harm}
    return replace(Arms("b", 99 * num, num), **harms)


@pytest.mark.parametrize("kind", ["failures", "complaints"])
def test_a_canary_stops_where_what_it_serves_is_harmed(kind: str) -> None:
    begins = sure(begun()).after(Note(tries=Canary.begin("b")))
    held = begins.after(Note(arms=harmed(1, kind)))
    assert held.canary is not None and held.canary.arms == harmed(1, kind)
    stopped = held.after(Note(arms=harmed(1, kind)))
    assert stopped.canary is None and stopped.champion == "a"
    words = {"failures": "its requests fail more often", "complaints": "more people complain"}
    assert stopped.shelf["b"].stopped == words[kind]
    assert begins.after(Note(arms=replace(harmed(6, kind), head="c"))).canary == begins.canary


def test_as_much_harm_under_both_heads_stops_nothing() -> None:
    rng, stopped = np.random.default_rng(0), 0
    for _ in range(200):
        drawn_, harm = rng.random(2_000) < 0.25, rng.random(2_000) < 0.05
        sums = [Harm.of(1.0, bool(one), 0.25) for one in drawn_[harm]]
        totals, reached = Harm(), False
        for one in sums:
            totals += one
            reached |= totals.is_more
        stopped += reached
    assert stopped <= 2 + 3 * 2**0.5  # 1 % of 200, and three standard deviations


def test_a_canary_stops_where_it_loses_more_or_its_breaker_opens() -> None:
    library = sure(begun()).after(Note(tries=Canary.begin("b")))
    trial = replace(library.shelf["b"].trial, as_good=np.full(2, 3.0))
    shelf = {**library.shelf, "b": replace(library.shelf["b"], trial=trial)}
    lost = fold(audits(1), replace(library, shelf=shelf))
    assert lost.canary is None and lost.shelf["b"].stopped == "it loses more"
    opened = library.after(Note({"b": Entry(Opened(EVERYTHING))}))
    assert opened.canary is None and opened.shelf["b"].stopped == "its breaker has opened"
    again = opened.after(Note(tries=Canary.begin("c"))).after(Note(tries=Canary.begin("a")))
    assert again.canary is None


def test_a_rollback_takes_back_the_newest_step() -> None:
    library = sure(begun()).after(Note(tries=Canary.begin("b")))
    assert rollback(library) == ("b", "a")
    back = library.after(Note(rolls_back=True))
    assert back.canary is None and back.shelf["b"].stopped == "by hand"
    promoted = library.after(Note(promotes="b"))
    assert promoted.canary is None and rollback(promoted) == ("b", "a")
    old = promoted.after(Note(rolls_back=True))
    assert (old.champion, old.shelf["b"].stopped) == ("a", "by hand")
    with pytest.raises(InputError, match="no promotion is left that could be taken back"):
        rollback(old)
    assert text(old.after(Note(rolls_back=True))) == text(old)
    alone = Library("a", {"a": shelved()})
    assert text(alone.after(Note(rolls_back=True))) == text(alone)


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
    steering.break_off(audit, "no answer")
    return list(audit.replays.values())


@pytest.mark.whole
def test_a_head_is_promoted_by_whoever_has_the_state_and_rolled_back(tmp_path: Path) -> None:
    with control(tmp_path, challengers=[bolder()]) as steering:
        first, second = steering.champion, bolder().digest
        until(lambda: second in steering.keeper.library.shelf)
        running = asked(id="running", head=first)
        steering.terms(running)
        with pytest.raises(InputError, match="is not known yet after 0 audits"):
            steering.roster.promote(second[:12])
        steering.roster.promote(second[:12], anyway=True)
        until(lambda: steering.champion == second)
        assert steering.head.digest == second and steering.history.moves[0].what == "head promoted"
        # What has begun goes on with the head that it has begun with.
        told(steering, running)
        until(lambda: steering.keeper.library.shelf[first].books.sums[EVERYTHING].num_audits == 1)
        assert (
            rolled_back(tmp_path / "state") == f"{second} is taken back, {first} serves from now on"
        )
        until(lambda: steering.champion == first)
        roles = {one["head"]: one["role"] for one in steering.status()["heads"]}
        assert roles == {first: "champion", second: "challenger"}
    command = [sys.executable, "-m", "haltwise", "promote", "--state", str(tmp_path / "state")]
    anyway = [*command, "--head", second[:8], "--anyway"]
    done = subprocess.run(anyway, capture_output=True, text=True)
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
            other.roster.promote(bolder().digest, anyway=True)
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
        until(lambda: len(steering.keeper.library.shelf) == 2)
        with pytest.raises(InputError, match="expected"):
            steering.roster.promote(**said)
        assert steering.status()["refused"] == 1
