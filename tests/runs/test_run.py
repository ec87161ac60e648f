from dataclasses import replace
from pathlib import Path

import pytest

from agents.fit import fold_folder
from agents.kept_back import load_judges, save_kept_back
from haltwise import HaltHead, InputError


def at_price(head: HaltHead, price: float) -> HaltHead:
    """A head that can be told from others by its default price."""
    return HaltHead(replace(head.config, default_price=price), head.weights)


def test_every_question_is_judged_by_the_head_of_its_fold(
    run_head: HaltHead, tmp_path: Path
) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    folds = {0: {"a": 0, "b": 1}, 5: {"a": 1, "b": 1}}
    prices = {(0, 0): 2.0, (0, 1): 3.0, (5, 1): 4.0}
    for (seed, k), price in prices.items():
        for checkpoint, shift in (("0", 10.0), ("1", 0.0)):
            head = at_price(run_head, price + shift)
            head.save(fold_folder(cache, seed, k) / checkpoint)
    run_head.save(run)
    for _ in range(2):  # an interrupted job does it again
        save_kept_back(run, cache, folds, 1)
    first, second = load_judges(run, folds)
    told = [
        judge.judge(question).config.default_price
        for judge in (first, second)
        for question in ("a", "b", "c")
    ]
    assert told == [2.0, 3.0, 1.0, 4.0, 4.0, 1.0]


def test_a_run_without_folds_has_its_head_alone(run_head: HaltHead, tmp_path: Path) -> None:
    run_head.save(tmp_path)
    (judge,) = load_judges(tmp_path, {})
    assert judge.judge("a") is judge.head
    with pytest.raises(InputError, match=r"no head\.json in .*kept_back/0-3"):
        load_judges(tmp_path, {0: {"a": 3}})
