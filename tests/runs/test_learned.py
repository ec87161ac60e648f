import json
from pathlib import Path

import numpy as np
import pytest

from evaluation.learned import Learned, load_learned, save_learned
from haltwise import InputError


def test_what_was_learned_from_comes_back(tmp_path: Path) -> None:
    learned = Learned(frozenset({"b", "a"}), {0: {"a": 1, "b": 0}, 3: {"b": 0}})
    save_learned(tmp_path, learned)
    assert load_learned(tmp_path) == learned
    assert learned.among(np.array(["a", "c", "b", "a"])).tolist() == [True, False, True, True]
    save_learned(tmp_path, Learned(frozenset({"a"})))
    assert load_learned(tmp_path) == Learned(frozenset({"a"}), {})


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
        load_learned(tmp_path)
    (tmp_path / "questions.json").write_text(content)
    with pytest.raises(InputError, match=r"questions\.json: not readable"):
        load_learned(tmp_path)


def test_folds_are_kept_beside_their_questions_once(tmp_path: Path) -> None:
    save_learned(tmp_path, Learned(frozenset({"b", "a"}), {0: {"a": 1, "b": 0}}))
    content = json.loads((tmp_path / "questions.json").read_text())
    assert content == {"questions": ["a", "b"], "folds": {"0": [1, 0]}}
