"""Challengers take over where they should, as the books would let them."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import promotion
from benchmarks.promotion import PromotionConfig, Rival, Streams, measure, play
from benchmarks.synthetic import synthetic_traces
from haltwise.control import trial
from haltwise.control.books import Books, Entry
from haltwise.control.canary import SHARES, Canary
from haltwise.control.estimates import Audit
from haltwise.control.experiment import Served, effect
from haltwise.control.governor import Promise
from haltwise.control.groups import EVERYTHING, Drawn, Groups, Told
from haltwise.control.library import Library, Note, Shelved

PROMISE = Promise(target=0.05, audit=0.5, rest=0.25)


def generated(seed: int, num: int = 2_000) -> Rival:
    """3 prices that lose 0.5, 1 and 2 points, and save 20, 30 and 40 % of mean answers."""
    rng = np.random.default_rng(seed)
    at, each = rng.random((num, 1)), rng.normal(1, 0.2, (num, 1))
    return Rival((at < [0.005, 0.01, 0.02]).astype(float), np.array([0.2, 0.3, 0.4]) * each)


@pytest.mark.whole
def test_challengers_take_over_where_they_should() -> None:
    """20 streams each: of as good ones at most 5 % and two standard deviations, 3."""
    champion, found = generated(0), {}
    rivals = {
        "as good": champion.elsewhere(),
        "worse": champion.losing_more(0.03).saving_more(0.05),
        "better": champion.saving_more(0.05),
    }
    for seed, (name, rival) in enumerate(rivals.items()):
        found[name] = play(Streams(champion, rival, 2, PROMISE, 20), 2_000, seed)
    assert found["as good"].promoted.sum() <= 3
    assert found["worse"].quarter.sum() == 0
    assert found["better"].promoted.mean() >= 0.8
    assert (found["better"].quarter >= found["better"].promoted).all()


@pytest.mark.whole
def test_the_simulation_is_what_the_books_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same audits in the same order move a challenger at the same ones."""
    for module in (trial, promotion):
        monkeypatch.setattr(module, "MARGIN", 0.05)  # which is known sooner
    champion, challenger = generated(0), generated(0).saving_more(0.1)
    streams = Streams(champion, challenger, 3, PROMISE, 1)
    library = books(3).after(Note(joins={"b": books(0).shelf["a"]}))
    rng, moves = np.random.default_rng(1), set[int]()
    for n in range(700):
        row = int(rng.integers(0, 2_000))
        rivals = {"a": champion, "b": challenger}
        steps = {name: one.step for name, one in library.shelf.items()}
        drawn = {n_: Entry(Drawn(f"r{n}", at, {EVERYTHING: 0.5})) for n_, at in steps.items()}
        told = {name: entry(f"r{n}", rival, row) for name, rival in rivals.items()}
        library = library.after(Note(drawn)).after(Note(told))
        if library.canary is None and library.champion == "a" and library.is_ready("b"):
            library = library.after(Note(tries=Canary.begin("b")))
        streams.audit(np.array([row]))
        if library.champion == "b":
            assert streams.step[0] == len(SHARES) + 1
            break
        served = 0 if library.canary is None else 1 + SHARES.index(library.canary.share)
        assert streams.step[0] == served
        moves.add(served)
    assert moves == {0, 1, 2, 3} and library.champion == "b"


def books(certified: int) -> Library:
    groups = Groups.begin(PROMISE, 3, certified=certified)
    return Library("a", {"a": Shelved.begin(Books(groups, {}, 1000.0), (1.0, 2.0, 3.0))})


def entry(request: str, rival: Rival, row: int) -> Entry:
    losses = rival.losses[row]
    audit = Audit(losses == 0, 100 * (1 - rival.saved[row]), 100.0)
    return Entry(Told(request, tuple(losses.tolist()), (False,) * 3), audit)


def test_all_figures_are_found_on_traces() -> None:
    config = PromotionConfig(draws=4, num_audits=20, num_prices=4)
    found = [result.name for result in measure(synthetic_traces(60), config)]
    assert len(found) == 8 and found[0] == "itself: ever served 25 %"


def test_who_is_drawn_tells_what_replay_tells() -> None:
    """Both heads at their second price on the same 2,000 requests: the intervals agree."""
    champion, challenger = generated(0), generated(0).saving_more(0.15)
    rng = np.random.default_rng(2)
    full = rng.lognormal(7, 0.5, 2_000)
    old, new = (full * (1 - one.saved[:, 1]) for one in (champion, challenger))
    units = [
        Served(f"{n}", bool(drawn), 0.5, {"tokens": float(new[n] if drawn else old[n])})
        for n, drawn in enumerate(rng.random(2_000) < 0.5)
    ]
    found, paired = effect(units, "tokens"), float((new - old).mean())
    assert found.low < paired < found.high < 0
    assert found.high - found.low < 4 * abs(paired)


@pytest.mark.parametrize("share", [0.0, 0.03])
def test_a_worse_rival_loses_so_much_more(share: float) -> None:
    rival = generated(3, num=100_000)
    more = rival.losing_more(share).losses - rival.losses
    np.testing.assert_allclose(more.mean(axis=0), share, atol=0.002)
    assert rival.losing_more(share).losses.max() == 1
