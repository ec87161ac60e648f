"""What live environments are tested with: a tiny LM, and questions that it cannot answer."""

from __future__ import annotations

from typing import Any

from haltwise import FEATURE_GROUPS, MEAN_LOGPROB, Halting, Observing, feature_names
from haltwise.policy.halting import Probing
from lms.language_model import LanguageModel
from lms.questions import Question
from tests.projections import some_projection
from tests.tiny_lm import tiny_lm, tiny_tokenizer

QUESTIONS = [Question(f"q{i}", "toy", "easy", f"{i} so {i + 1}", str(i), "train") for i in range(6)]
MAX_POINTS = 7
PROJECTION = some_projection(32)


def observing(groups: tuple[str, ...] = tuple(FEATURE_GROUPS)) -> Observing:
    size = len(feature_names(groups))
    projection = PROJECTION if "hidden" in groups else None
    return Observing(groups, (0.0,) * size, (1.0,) * size, (0.1, 10.0), projection)


def halting(
    probing: Probing = "always",
    rule: str = "every 4 tokens",
    max_answer_tokens: int = 2,
) -> Halting:
    limited = f"{rule}, at most {MAX_POINTS}"
    return Halting(probing, limited, "</think>", MEAN_LOGPROB, max_answer_tokens)


def tiny() -> LanguageModel:
    return LanguageModel("tiny", tiny_lm(seed=1), tiny_tokenizer())


def arguments(**changes: Any) -> dict[str, Any]:
    """Of a live environment, with some changed."""
    return {
        "lm": tiny(),
        "questions": QUESTIONS,
        "halting": halting(),
        "observing": observing(),
        "max_tokens": 40,
        "temperature": 0.9,
    } | changes
