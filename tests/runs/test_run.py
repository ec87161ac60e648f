"""A run folder comes back as it was written, and tells in a line what is wrong with it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from haltwise import HaltHead, InputError
from policies.head import judging_heads
from runs import Learned, Run


def at_price(head: HaltHead, price: float) -> HaltHead:
    """A head that can be told from others by its default price."""
    return HaltHead(replace(head.config, default_price=price), head.weights)


def test_every_question_is_judged_by_the_head_of_its_fold(
    run_head: HaltHead, tmp_path: Path
) -> None:
    run, learned = (
        Run(tmp_path / "run"),
        Learned(frozenset("ab"), {0: {"a": 0, "b": 1}, 5: {"a": 1, "b": 1}}),
    )
    assert learned.trainings == [(0, 0), (0, 1), (5, 1)]
    folders = {at: tmp_path / f"cache{n}" for n, at in enumerate(learned.trainings)}
    for price, folder in zip((2.0, 3.0, 4.0), folders.values(), strict=True):
        at_price(run_head, price).save(folder)
    run.save_head(run_head)
    for _ in range(2):  # an interrupted job does it again
        run.copy_kept_back(folders)
    first, second = judging_heads(run.head(), run.kept_back(learned), learned.folds)
    told = [
        judge.judge(question).config.default_price
        for judge in (first, second)
        for question in ("a", "b", "c")
    ]
    assert told == [2.0, 3.0, 1.0, 4.0, 4.0, 1.0]


def test_a_run_without_folds_has_its_head_alone(run_head: HaltHead, tmp_path: Path) -> None:
    run, learned = Run(tmp_path), Learned(frozenset("a"))
    run.save_head(run_head)
    (judge,) = judging_heads(run.head(), run.kept_back(learned), learned.folds)
    assert judge.judge("a") is judge.head
    with pytest.raises(InputError, match=r"no head\.json in .*kept_back/0-3"):
        run.kept_back(Learned(frozenset("a"), {0: {"a": 3}}))


def test_what_a_run_was_begun_with_comes_back(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with pytest.raises(InputError, match=r"config\.json names no traces: expected a run"):
        run.beginning()
    run.begin({"traces": "t.parquet", "config": {"seed": 3}, "commit": None})
    assert (run.beginning().traces, run.beginning().settings) == (Path("t.parquet"), {"seed": 3})
    for content in ("[", "{}", "3", '{"traces": null}', '{"traces": "t", "config": 3}'):
        (run.folder / "config.json").write_text(content)
        with pytest.raises(InputError, match=r"config\.json names no traces"):
            run.beginning()


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    run.save_operating_points({0.0: {"head": 1.0}})
    before = (tmp_path / "operating_points.json").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        run.save_operating_points({0.0: {"head": 2.0}})
    assert (tmp_path / "operating_points.json").read_bytes() == before


def test_the_files_that_a_run_cannot_do_without_are_known(tmp_path: Path) -> None:
    parts = ("config.json", "head.json", "head.safetensors", "questions.json")
    assert all(Run(tmp_path).is_part(tmp_path / name) for name in parts)
    assert not Run(tmp_path).is_part(tmp_path / "test.json")
    assert not Run(tmp_path / "run").is_part(tmp_path / "head.json")


def test_operating_points_come_back(tmp_path: Path) -> None:
    gates: dict[float, dict[str, float | None]] = {
        0.0: {"head": 0.25, "budget": None},
        0.01: {"head": None},
    }
    Run(tmp_path).save_operating_points(gates)
    assert Run(tmp_path).operating_points() == gates


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"gates": []}',
        '{"gates": {"zero": {"head": 1}}}',
        '{"gates": {"0.0": {"head": "cheap"}}}',
        '{"gates": {"0.0": 1}}',
        '{"gates": {}}',
        '{"gates": {"0.0": {"confidence": 0.5}}}',
        '{"gates": {"nan": {"head": 1}}}',
        '{"gates": {"-5": {"head": 1}}}',
        '{"gates": {"0.0": {"head": 0}}}',
    ],
)
def test_damaged_operating_points_are_told(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match=r"no operating_points\.json"):
        Run(tmp_path).operating_points()
    (tmp_path / "operating_points.json").write_text(content)
    with pytest.raises(InputError, match=r"operating_points\.json: .*expected"):
        Run(tmp_path).operating_points()


def test_what_was_learned_from_comes_back(tmp_path: Path) -> None:
    learned = Learned(frozenset({"b", "a"}), {0: {"a": 1, "b": 0}, 3: {"b": 0}})
    Run(tmp_path).save_learned(learned)
    assert Run(tmp_path).learned() == learned
    assert learned.among(np.array(["a", "c", "b", "a"])).tolist() == [True, False, True, True]
    Run(tmp_path).save_learned(Learned(frozenset({"a"})))
    assert Run(tmp_path).learned() == Learned(frozenset({"a"}), {})


@pytest.mark.parametrize(
    "content",
    [
        "[",
        "{}",
        '{"questions": [], "folds": {}}',
        '{"questions": "abc", "folds": {}}',
        '{"questions": ["a"], "folds": {"0": [1, 2]}}',
        '{"questions": 3}',
        "3",
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match=r"no questions\.json in .*written by train\.py"):
        Run(tmp_path).learned()
    (tmp_path / "questions.json").write_text(content)
    with pytest.raises(InputError, match=r"questions\.json: not readable"):
        Run(tmp_path).learned()


def test_folds_are_kept_beside_their_questions_once(tmp_path: Path) -> None:
    Run(tmp_path).save_learned(Learned(frozenset({"b", "a"}), {0: {"a": 1, "b": 0}}))
    content = json.loads((tmp_path / "questions.json").read_text())
    assert content == {"questions": ["a", "b"], "folds": {"0": [1, 0]}, "texts": []}
