"""What counts as right in traces: what their labels say, or else what agrees with the full answer.

A trace is labelled, and then says of every answer whether it is right; or nobody knows, and then it
says nothing of any. In the shapes, N is the number of traces and P that of their points together.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from haltwise import InputError
from traces.schema import SCHEMA, VERDICTS

#: Says whether two answers agree, both as the recording's answer rule reads them.
Agree = Callable[[str, str], bool]
_KINDS = ("text", "digests")


def are_digests(recorder: dict[str, Any], source: str) -> bool:
    """Returns whether the answers of a recording are digests.

    Raises:
        InputError: If what tells of the recorder names another kind.
    """
    kind = recorder.get("answers", _KINDS[0])
    if kind not in _KINDS:
        raise InputError(
            f"{source}: haltwise.recorder has answers {kind!r:.40}, expected {' or '.join(_KINDS)}"
        )
    return bool(kind == _KINDS[1])


def labelled_rows(columns: dict[str, pa.Array], source: str) -> NDArray[np.bool_]:
    """Returns which traces (N,) are labelled.

    Args:
        columns: Those of the verdicts, by name.
        source: The name of the file, for messages.

    Raises:
        InputError: If a trace has some verdicts and lacks others.
    """
    known = {name: columns[name].is_valid().to_numpy(zero_copy_only=False) for name in VERDICTS}
    labelled: NDArray[np.bool_] = known[VERDICTS[0]]
    for name in VERDICTS[1:]:
        if (known[name] != labelled).any():
            row = int(np.argmax(known[name] != labelled))
            missing = next(column for column in VERDICTS if not known[column][row])
            raise InputError(
                f"{source}: column {missing!r}, row {row}: found null, expected "
                f"{SCHEMA.field(missing).type}, or null in each of {', '.join(VERDICTS)}"
            )
    return labelled


def filled(correct: pa.Array, labelled: NDArray[np.bool_], lengths: NDArray[Any]) -> pa.Array:
    """Returns the lists (N,) of what is right, with as many false entries as points for a null.

    Args:
        correct: The lists, null where the trace is not labelled.
        labelled: (N,) which traces are labelled.
        lengths: (N,) the numbers of points.
    """
    if labelled.all():
        return correct
    own = correct.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    lengths = np.where(labelled, own, lengths)
    known = pa.array(np.repeat(labelled, lengths))
    values = pc.replace_with_mask(pa.array(np.zeros(len(known), bool)), known, correct.flatten())
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def agreement(
    answer: NDArray[np.object_], full: NDArray[np.object_], agree: Agree = operator.eq
) -> NDArray[np.bool_]:
    """Returns which answers (P,) agree with full ones (P,); one that could not be read never does.

    Args:
        answer: The forced answers.
        full: The full answer of the trace that each belongs to.
        agree: Says it of two that are not the same.
    """
    known: dict[tuple[str, str], bool] = {}
    for pair in zip(answer.tolist(), full.tolist(), strict=True):
        if pair not in known:
            one, other = pair
            known[pair] = bool(one and other) and (one == other or agree(one, other))
    pairs = zip(answer.tolist(), full.tolist(), strict=True)
    return np.array([known[pair] for pair in pairs], dtype=bool)
