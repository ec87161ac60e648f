"""Reading the answer that an LM gives after its thought: the same in training and in serving."""

from haltwise.policy.answers.formulas import normal_latex
from haltwise.policy.answers.readers import (
    READERS,
    canonical,
    normal_text,
    read_answer,
    read_choice,
    read_latex,
    read_number,
    read_strict,
    read_text,
)

__all__ = [
    "READERS",
    "canonical",
    "normal_latex",
    "normal_text",
    "read_answer",
    "read_choice",
    "read_latex",
    "read_number",
    "read_strict",
    "read_text",
]
