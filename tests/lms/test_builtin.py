"""Well-known data sets, and the questions that reasoning-gym makes up."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from haltwise import InputError
from lms.questions import SPLITS, Question, question_digest, split_of
from lms.sources import DataConfig, QuestionTask, open_task
from lms.sources.builtin import BUILT_INS
from lms.sources.gym_task import PREFIX, REFUSED, ReasoningGymTask, segment_of

SAMPLES = Path(__file__).parent / "samples"


def rows_of(name: str) -> list[dict[str, Any]]:
    lines = (SAMPLES / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def questions_of(task: QuestionTask) -> list[Question]:
    """All questions of a small task, by text."""
    found = []
    for split in SPLITS:
        if f"{split} 0" not in task.describe():
            found += list(task.questions(split, 100, 0))
    return sorted(found, key=lambda question: question.text)


def sample(name: str) -> list[Question]:
    path = SAMPLES / f"{name}.jsonl"
    return questions_of(open_task(DataConfig(task=name, data_file=path, instruction="")))


def test_every_built_in_has_a_sample() -> None:
    assert {path.stem for path in SAMPLES.glob("*.jsonl")} == set(BUILT_INS)


@pytest.mark.parametrize("name", BUILT_INS)
def test_every_row_of_a_sample_is_asked(name: str) -> None:
    found = sample(name)
    assert len(found) == len(rows_of(name)) - (name == "squad")
    assert {question.scorer for question in found} == {BUILT_INS[name].scorer}
    assert {question.task for question in found} == {name}


def test_gold_of_gsm8k_is_the_number_after_the_mark() -> None:
    assert sorted(question.gold for question in sample("gsm8k")) == ["-5", "0.75", "1250", "68"]


def test_a_segment_of_math500_is_a_subject_and_a_level() -> None:
    found = {question.gold: question.segment for question in sample("math500")}
    assert found["(x-3)(x+3)"] == "Algebra 2"
    assert found["\\text{Ada}"] == "Counting & Probability 3"
    ada = next(q for q in sample("math500") if "Ada" in q.gold)
    assert ada.is_right("ada")


def test_labels_of_arc_become_letters() -> None:
    found = {question.text.partition("?")[0]: question for question in sample("arc_challenge")}
    thermometer = found["What does a thermometer measure"]
    assert thermometer.text.endswith("?\n\nA. mass\nB. temperature\nC. length\nD. time")
    assert thermometer.gold == "B"
    assert found["Which part of a plant takes up most of its water"].gold == "A"


def test_mmlu_pro_has_up_to_ten_choices() -> None:
    found = {question.segment: question for question in sample("mmlu_pro")}
    assert found["math"].text.endswith("I. 25\nJ. 30")
    assert {segment: question.gold for segment, question in found.items()} == {
        "math": "E", "physics": "F", "law": "B", "chemistry": "D",
    }  # fmt: skip


def test_squad_asks_about_a_text_and_skips_what_has_no_answer() -> None:
    found = {question.text.partition("\n\n")[2]: question for question in sample("squad")}
    built = found["Who built the ferry?"]
    assert built.text.startswith("The ferry to Lund island leaves at noon. ")
    assert built.gold == "the Hallin yard\nHallin yard"
    assert built.is_right("hallin yard")
    assert found["When does the ferry leave?"].gold == "noon\nat noon"
    assert "Who is the captain?" not in found
    task = open_task(DataConfig(task="squad", data_file=SAMPLES / "squad.jsonl"))
    assert "rows, 1 skipped without an answer; scorer text; instruction 'Reason" in task.describe()


@pytest.mark.parametrize(
    ("name", "others", "splits"),
    [("squad", "validation", {"train", "dev", "test"}), ("mmlu_pro", "test", {"test"})],
)
def test_splits_of_the_hub_are_used_as_is_usual(
    tmp_path: Path, name: str, others: str, splits: set[str]
) -> None:
    rows = rows_of(name)[:3]
    asked = [row | {"question": f"{row['question']} {n}?"} for n in range(20) for row in rows]
    first = "train" if name == "squad" else "validation"
    for stem, part in ((first, asked[:50]), (others, asked[50:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / f"{stem}-00000-of-00001.jsonl").write_text(lines)
    found = questions_of(open_task(DataConfig(task=name, data_file=tmp_path)))
    if name == "mmlu_pro":  # one split alone divides nothing
        assert len(found) == 10
    else:
        assert {question.split for question in found} == splits
        assert sum(question.split == "test" for question in found) == 10


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gsm8k", {"answer": "12"}, "answer is '12', expected a number after ####"),
        ("gsm8k", {"answer": "#### none"}, "gold answer 'none' cannot be compared"),
        ("math500", {"level": None}, "level is None"),
        ("arc_challenge", {"answerKey": "E"}, "the answer is 'E', expected a letter up to D"),
        ("arc_challenge", {"choices": ["a", "b"]}, "expected an object with text and label"),
        ("arc_challenge", {"choices": {"text": ["a"], "label": ["A", "B"]}}, "1 choices with 2"),
        ("mmlu_pro", {"options": []}, r"options is \[\], expected a list of texts"),
        ("mmlu_pro", {"options": ["one"], "answer": "A"}, "found 1 choices, expected 2 to 26"),
        ("squad", {"answers": ["noon"]}, "expected an object with a list named text"),
        ("squad", {"answers": {"text": ["the"]}}, "gold answer 'the' cannot be compared"),
    ],
)
def test_a_row_of_another_form_is_named(
    tmp_path: Path, name: str, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(rows_of(name)[0] | change))
    task = open_task(DataConfig(task=name, data_file=path))
    with pytest.raises(InputError, match=f"rows.jsonl, line 1: .*{message}"):
        task.describe()


def gym(name: str) -> QuestionTask:
    pytest.importorskip("reasoning_gym")
    return open_task(DataConfig(task=PREFIX + name, instruction=""))


def test_drawn_questions_are_distinct_and_their_hash_decides_the_split() -> None:
    task = gym("chain_sum")
    texts: list[set[str]] = []
    for split in SPLITS:
        found = [q for seed in (0, 1) for q in task.questions(split, 150, seed)]
        for half in (found[:150], found[150:]):
            assert len({question.question_id for question in half}) == 150
        texts.append({question.text for question in found})
        for question in found[:20]:
            assert question.split == split == split_of(question_digest(question.text))
            expression = question.text.partition(": ")[2].removesuffix(" =")
            terms = expression.replace("- ", "-").replace("+ ", "").split()
            assert question.gold == str(sum(map(int, terms)))
            assert question.segment == f"num_terms {len(terms)}"
    assert not texts[0] & texts[1] and not texts[1] & texts[2] and not texts[0] & texts[2]
    assert list(task.questions("dev", 7, 1)) == list(task.questions("dev", 7, 1))


def test_two_seeds_draw_other_questions() -> None:
    task = gym("leg_counting")
    one, two = ({q.text for q in task.questions("train", 300, seed)} for seed in (0, 1))
    assert not one & two


def test_a_question_does_not_forbid_to_reason() -> None:
    for name in ("products", "gcd", "family_relationships"):
        for question in gym(name).questions("train", 30, 0):
            assert "only" not in question.text
            assert question.text.startswith(("Solve", "Find")) or name == "family_relationships"


def test_few_questions_are_told() -> None:
    few = gym("calendar_arithmetic")
    assert isinstance(few, ReasoningGymTask)
    with pytest.MonkeyPatch.context() as patch:
        item: dict[str, Any] = {"question": "Is it?", "answer": "yes", "metadata": {}}
        patch.setattr("reasoning_gym.create_dataset", lambda *args, **settings: [item] * 256)
        with pytest.raises(InputError, match=r"has about 1 questions, [01] of split .* least 5$"):
            list(few.questions("train", 5, 0))


@pytest.mark.parametrize(
    ("answer", "message"), [(None, "with None, expected a text"), (" ", "gold answer '' is empty")]
)
def test_an_item_without_a_gold_answer_is_refused(answer: str | None, message: str) -> None:
    task = gym("aiw")
    with pytest.MonkeyPatch.context() as patch:
        item: dict[str, Any] = {"question": "Is it?", "answer": answer, "metadata": {}}
        patch.setattr("reasoning_gym.create_dataset", lambda *args, **settings: [item])
        with pytest.raises(InputError, match=message):
            list(task.questions("train", 5, 0))


@pytest.mark.parametrize(
    ("metadata", "segment"),
    [
        ({}, ""),
        ({"difficulty": 1.5}, "1.5"),
        ({"difficulty": {"num_terms": (2, 6)}, "num_terms": 4}, "num_terms 4"),
        ({"difficulty": {"n": (1, 2**31)}, "n": 4}, ""),
        ({"difficulty": {"kinds": ["a", "b"], "size": (2, 3)}, "size": 3}, "size 3"),
    ],
)
def test_a_segment_is_the_difficulty_if_that_makes_groups(
    metadata: dict[str, Any], segment: str
) -> None:
    assert segment_of(metadata) == segment


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("syllogism", "reasoning_gym:syllogism has two answers"),
        ("boxnet", "has no reference answer"),
        ("gdc", "no generator 'gdc', expected one of .*gcd"),
    ],
)
def test_a_generator_of_no_use_is_an_error(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        gym(name)


def test_refused_generators_exist() -> None:
    factory = pytest.importorskip("reasoning_gym.factory")
    assert set(REFUSED) <= set(factory.DATASETS)


def test_without_reasoning_gym_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(InputError, match=r"reasoning-gym is not installed.*-e '\.\[gym\]'"):
        ReasoningGymTask("gcd", "short", "")
