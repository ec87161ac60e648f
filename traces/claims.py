"""What the first line of traces from elsewhere says of them, and their columns do not bear out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from haltwise import MEAN_LOGPROB, DecisionRule, Halting, InputError
from traces.store import read_tables
from traces.stream import TraceFiles
from traces.verdicts import are_digests

# Writers round a confidence to two digits.
_ROUNDING = 0.01
_COLUMNS = ("trace_id", "position", "confidence", "answer_logprobs")
_VERDICTS = ("gold", "final_answer", "final_correct")

#: Says whether an answer, as the answer rule has read it, is right by a reference answer.
IsRight = Callable[[str, str], bool]
#: A trace as a row, by column name.
Row = dict[str, Any]


def broken_claims(files: TraceFiles, scorer: Callable[[str], IsRight]) -> list[str]:
    """Returns a sentence for each claim of the recorder that traces contradict.

    A head learns from the columns, and runs by the claims.

    Args:
        files: The recording.
        scorer: Given an answer rule, tells what is right by a reference answer.
    """
    recorder = files.recorder
    rule = Halting.of_recorder(recorder).decision_rule
    claims: list[tuple[str, Callable[[Row], str]]] = []
    if spacing := DecisionRule(rule).every_repeated:
        claims.append((f"decision rule {rule!r}", lambda row: _off_spacing(row, spacing)))
    if recorder.get("confidence_rule") == MEAN_LOGPROB:
        claims.append((f"confidence rule {MEAN_LOGPROB!r}", _other_confidence))
    if "answer_rule" in recorder and not are_digests(recorder, str(files.shards[0])):
        is_right = scorer(recorder["answer_rule"])
        claims.append(
            (f"answer rule {recorder['answer_rule']!r}", lambda row: _other_verdict(row, is_right))
        )
    return [told for claim, against in claims if (told := _told(files, claim, against))]


def _told(files: TraceFiles, claim: str, against: Callable[[Row], str]) -> str:
    found = [(row["trace_id"], why) for row in _rows(files) if (why := against(row))]
    if not found:
        return ""
    return (
        f"{len(found)} of {len(files.trace)} traces contradict the {claim} of haltwise.recorder, "
        f"the first {found[0][0]!r:.60}: {found[0][1]}"
    )


def _rows(files: TraceFiles) -> Iterator[Row]:
    for shard in files.shards:
        for table in read_tables(shard, (*_COLUMNS, *_VERDICTS)):
            yield from table.to_pylist()


def _off_spacing(row: Row, spacing: int) -> str:
    """Says which decision point of a trace lies beside its rule; "" if none does."""
    return next((f"it has a point at {at}" for at in row["position"] if at % spacing), "")


def _other_confidence(row: Row) -> str:
    """Says which confidence of a trace another rule has computed; "" if none."""
    for confidence, logprobs in zip(row["confidence"], row["answer_logprobs"], strict=True):
        by_rule = math.exp(math.fsum(logprobs) / len(logprobs)) if logprobs else math.nan
        if abs(confidence - by_rule) > _ROUNDING:
            return f"a confidence is {confidence:.4g}, and {by_rule:.4g} by its answer_logprobs"
    return ""


def _other_verdict(row: Row, is_right: IsRight) -> str:
    """Says how the rule judges the full answer of a trace if its verdict differs; else ""."""
    answer, gold, verdict = row["final_answer"], row["gold"], row["final_correct"]
    if gold is None:
        return ""
    try:
        by_rule = bool(answer) and is_right(answer, gold)
    except InputError as error:
        return str(error)
    told = f"final_correct is {verdict}, of {answer!r:.40} for {gold!r:.40}"
    return "" if by_rule == verdict else told
