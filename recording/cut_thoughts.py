"""Recorded thoughts, cut where a head would have halted them, for an LM to learn from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from haltwise import HaltHead, InputError
from lms.language_model import LanguageModel
from policies.head import HeadPolicy
from policies.policy import first_halts
from traces import Traces
from traces.store import read_tables, shards_of

# What closes the box that a close text opens.
_BOX, _BOX_END = r"\boxed{", "}"


@dataclass(frozen=True)
class CutThought:
    """A prompt, and what the LM is to say: the thought as far as it is needed, and the answer."""

    prompt: tuple[int, ...]
    """Token ids."""
    completion: tuple[int, ...]
    """Token ids of the thought, the close text, the answer and the end token."""
    num_tokens: int
    """Tokens that the LM has spent on the question in truth."""


def cut_thoughts(
    path: Path, traces: Traces, head: HaltHead, price: float, lm: LanguageModel
) -> list[CutThought]:
    """Returns the thoughts whose answers are right, each cut where the head halts it.

    A thought that the head does not halt stays whole, if its own answer is right.

    Args:
        path: The file or folder that the traces are from, which has their texts.
        traces: Those to learn from.
        head: The policy.
        price: In exact match per 1,000 tokens.
        lm: The LM that was recorded, which knows how it was asked.

    Raises:
        InputError: If the file has no texts, or no answer is right.
    """
    policy = HeadPolicy(head)
    first = first_halts(traces, policy.halts(policy.signal(traces), price))
    rows = {name: row for row, name in enumerate(traces.trace_id.tolist())}
    found = []
    for trace_id, question, text in _texts(path):
        row = rows.get(trace_id)
        if row is not None and (end := _end(traces, row, int(first[row]))) is not None:
            found.append(_cut(lm, head.config.halting.close_text, question, text, *end))
    if not found:
        raise InputError(f"{path}: no answer is right where the head halts, expected some to learn")
    return found


def _texts(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yields the id of each trace, its question and all that the LM has said."""
    names = ("trace_id", "question", "text")
    for shard in shards_of(path):
        for table in read_tables(shard, names):
            if missing := set(names) - set(table.column_names):
                told = f"{shard} has no {' and no '.join(sorted(missing))}"
                raise InputError(f"{told}, expected traces as collect.py records them")
            yield from zip(*(table[name].to_pylist() for name in names), strict=True)


def _end(traces: Traces, row: int, first: int) -> tuple[int | None, str, int] | None:
    """Returns where a thought ends, the answer there, and the tokens of the trace.

    The place is None at the thought's own end; nothing is returned where the answer is wrong.
    """
    num_tokens = int(traces.num_tokens[row])
    if first >= 0:
        right, answer = bool(traces.correct[first]), str(traces.answer[first])
        return (int(traces.position[first]), answer, num_tokens) if right else None
    if not (traces.final_correct[row] and traces.finished[row]):
        return None
    return None, str(traces.full_answer[row]), num_tokens


def _cut(
    lm: LanguageModel,
    close_text: str,
    question: str,
    text: str,
    position: int | None,
    answer: str,
    num_tokens: int,
) -> CutThought:
    encode, end = lm.tokenizer.encode, lm.tokenizer.eos_token or ""
    prompt = encode(lm.prompt(question), add_special_tokens=False)
    if position is None:
        said = encode(text.removesuffix(end), add_special_tokens=False)
    else:
        boxed = _BOX_END if close_text.rstrip().endswith(_BOX) else ""
        thought = encode(text, add_special_tokens=False)[:position]
        said = thought + encode(f"{close_text} {answer}{boxed}", add_special_tokens=False)
    return CutThought(tuple(prompt), (*said, lm.tokenizer.eos_token_id), num_tokens)
