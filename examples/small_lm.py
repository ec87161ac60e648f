"""Questions at the level of a very small chat LM, and examples that show it how to think.

    python -m examples.small_lm --out FOLDER

Writes questions.jsonl for `--task` and examples.jsonl for `--examples`. A third of the questions
asks for a capital, which is known at once or never. A third asks for a sum of two to four numbers,
which is to be worked out. A third asks for the town of somebody who lives where somebody else does,
which is to be looked up twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from command import run
from haltwise import InputError

# The most questions: there are 4,672 sums, which are no more than half of them.
_MOST = 9000

CAPITALS = (
    "France Paris, Italy Rome, Spain Madrid, Germany Berlin, Austria Vienna, Norway Oslo, "
    "Greece Athens, Ireland Dublin, Portugal Lisbon, Japan Tokyo, China Beijing, Russia Moscow, "
    "Kenya Nairobi, Canada Ottawa, Australia Canberra, Turkey Ankara, Poland Warsaw, Peru Lima, "
    "Cuba Havana, Iran Tehran, Iraq Baghdad, Nepal Kathmandu, Ghana Accra, Chile Santiago, "
    "Sweden Stockholm, Denmark Copenhagen, Finland Helsinki, Hungary Budapest, Belgium Brussels, "
    "Romania Bucharest, Bulgaria Sofia, Serbia Belgrade, Croatia Zagreb, Ukraine Kyiv, "
    "Thailand Bangkok, Vietnam Hanoi, Jordan Amman, Lebanon Beirut, Syria Damascus, Qatar Doha, "
    "Morocco Rabat, Algeria Algiers, Tunisia Tunis, Libya Tripoli, Senegal Dakar, Angola Luanda, "
    "Uganda Kampala, Rwanda Kigali, Zambia Lusaka, Somalia Mogadishu, Mali Bamako, "
    "Colombia Bogota, Venezuela Caracas, Ecuador Quito, Uruguay Montevideo, Jamaica Kingston, "
    "Taiwan Taipei, Mongolia Ulaanbaatar, Latvia Riga, Estonia Tallinn, Lithuania Vilnius, "
    "Iceland Reykjavik"
)
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ivy", "Jack")
TOWNS = (
    "Paris",
    "London",
    "Rome",
    "Madrid",
    "Berlin",
    "Vienna",
    "Oslo",
    "Athens",
    "Dublin",
    "Lisbon",
)
# The examples stand in the order of the questions: a capital, a sum, a town.
EXAMPLES = (
    (
        "What is the capital of Egypt?",
        "Egypt is a country in Africa. Its capital is Cairo. Cairo lies on the Nile.\n"
        "Answer: Cairo",
    ),
    ("What is 3 + 4 + 2?", "3 + 4 = 7. 7 + 2 = 9. The sum is 9.\nAnswer: 9"),
    (
        "Tom lives in Cairo. Lena lives in Milan. Nora lives in the same town as Lena. "
        "Where does Nora live?",
        "Nora lives in the same town as Lena. Lena lives in Milan. So Nora lives in Milan.\n"
        "Answer: Milan",
    ),
    (
        "What is the capital of India?",
        "India is a country in Asia. Its capital is New Delhi. New Delhi lies on the Yamuna.\n"
        "Answer: New Delhi",
    ),
    ("What is 8 + 5?", "8 + 5 = 13. The sum is 13.\nAnswer: 13"),
    (
        "Otto lives in the same town as Tom. Tom lives in Sofia. Lena lives in Bern. "
        "Where does Otto live?",
        "Otto lives in the same town as Tom. Tom lives in Sofia. So Otto lives in Sofia.\n"
        "Answer: Sofia",
    ),
)


@dataclass(frozen=True)
class SmallQuestionsConfig:
    """Write questions that a very small LM can answer, and worked examples."""

    out: Path
    """The folder for both files."""
    num: int = 600
    """The number of questions, up to 9000; no more than a third of them ask for capitals."""
    seed: int = 0
    """The seed of the sums and towns."""


def questions(num: int, seed: int) -> Iterator[dict[str, str]]:
    """Yields different questions, as rows of question, answer and segment."""
    rng = np.random.default_rng(seed)
    capitals = [pair.rsplit(" ", 1) for pair in CAPITALS.split(", ")]
    seen: set[str] = set()
    for country, capital in capitals[: num // 3]:
        seen.add(country)
        yield _row(f"What is the capital of {country}?", capital, "capital")
    while len(seen) < num:
        text, answer, segment = _sum(rng) if len(seen) % 2 else _town(rng)
        if text not in seen:
            seen.add(text)
            yield _row(text, answer, segment)


def _row(question: str, answer: str, segment: str) -> dict[str, str]:
    return {"question": question, "answer": answer, "segment": segment}


def _sum(rng: np.random.Generator) -> tuple[str, str, str]:
    numbers = rng.integers(2, 10, size=rng.integers(2, 5)).tolist()
    return f"What is {' + '.join(map(str, numbers))}?", str(sum(numbers)), "sum"


def _town(rng: np.random.Generator) -> tuple[str, str, str]:
    guest, *hosts = rng.permutation(NAMES)[: rng.integers(3, 6)].tolist()
    towns = rng.permutation(TOWNS)[: len(hosts)].tolist()
    facts = [f"{host} lives in {town}." for host, town in zip(hosts, towns, strict=True)]
    facts.append(f"{guest} lives in the same town as {hosts[0]}.")
    order = rng.permutation(len(facts))
    text = " ".join([*(facts[i] for i in order), f"Where does {guest} live?"])
    return text, towns[0], "town"


def main(config: SmallQuestionsConfig) -> None:
    """Writes both files.

    Raises:
        InputError: If there are to be no questions, or more than there are.
    """
    if not 1 <= config.num <= _MOST:
        raise InputError(f"num is {config.num}, expected 1 to {_MOST}")
    config.out.mkdir(parents=True, exist_ok=True)
    turns = [{"user": user, "assistant": assistant} for user, assistant in EXAMPLES]
    for name, rows in (("questions", questions(config.num, config.seed)), ("examples", turns)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (config.out / f"{name}.jsonl").write_text(lines)


if __name__ == "__main__":
    run(main, SmallQuestionsConfig)
