"""What a trace file must hold beyond its column types."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from haltwise import InputError
from traces.schema import KNOWN_SPLITS, NAMES, SIGNALS

# A log probability is rounded, and may be this much above 0.
_ROUNDING = 1e-3
# No context window is longer, so that no thought or answer is.
_MOST_TOKENS = 100_000_000
# No answer is longer either: it is what follows the thought.
_MOST_ANSWER_TOKENS = 1_000_000
# Characters of a name: names are held in columns that are as wide as the longest one.
_LONGEST_NAME = 1000
# A digest of 16 bytes.
_DIGEST = re.compile("[0-9a-f]{32}")
# The smallest and the largest value that each number of a point can have.
_RANGES = {
    "probe_tokens": (0, _MOST_ANSWER_TOKENS),
    "confidence": (0.0, 1.0),
    "answer_logprobs": (-np.inf, _ROUNDING),
    "entropy": (-_ROUNDING, np.inf),
    "max_entropy": (-_ROUNDING, np.inf),
    "logprob": (-np.inf, _ROUNDING),
    "min_logprob": (-np.inf, _ROUNDING),
    "margin": (-_ROUNDING, 1 + _ROUNDING),
    "end_think_logprob": (-np.inf, _ROUNDING),
    "num_reflections": (0.0, np.inf),
}


def check_values(columns: dict[str, NDArray[Any]], lengths: NDArray[np.int64], source: str) -> None:
    """Refuses a file of which a value cannot be.

    Args:
        columns: Arrays by column name: (N,) for one value a trace, flat (P,) for one value a
            point, (P, D) for one vector a point.
        lengths: (N,) the number of points of each trace.
        source: The name of the file, for messages.

    Raises:
        InputError: If a value is wrong; it names file, column and row, what was found and what was
            expected.
    """
    rows = np.arange(len(lengths))
    row_of_point = np.repeat(rows, lengths)
    gold, num_tokens = columns["gold"], columns["num_tokens"]
    position = columns["position"]
    before = np.where(np.diff(row_of_point, prepend=-1) > 0, -1, np.roll(position, 1))
    for name, row, bad, expected in (
        *(
            (name, rows, _is_long(columns[name]), f"at most {_LONGEST_NAME} characters")
            for name in NAMES
        ),
        *((name, rows, columns[name] == "", "a name") for name in ("trace_id", "question_id")),
        ("split", rows, ~np.isin(columns["split"], KNOWN_SPLITS), "train, dev, test or empty"),
        ("gold", rows, gold == "", "a reference answer"),
        ("num_tokens", rows, num_tokens < 1, "at least 1"),
        ("num_tokens", rows, num_tokens > _MOST_TOKENS, f"at most {_MOST_TOKENS}"),
        ("position", row_of_point, position <= before, "strictly increasing from 0 or more"),
        ("position", row_of_point, position > num_tokens[row_of_point], "at most num_tokens"),
        *(
            (name, row_of_point, _has_inf(columns[name]), "finite or NaN")
            for name in SIGNALS
            if name in columns
        ),
        *(
            (name, row_of_point, (columns[name] < low) | (columns[name] > high), _range(low, high))
            for name, (low, high) in _RANGES.items()
            if name in columns
        ),
    ):
        if bad.any():
            worst = int(np.argmax(bad))
            raise InputError(
                f"{source}: column {name!r}, row {row[worst]}: "
                f"found {columns[name][worst]!s:.40}, expected {expected}"
            )


def _is_long(names: NDArray[Any]) -> NDArray[np.bool_]:
    """Says (N,) which names are too long."""
    return np.array([len(name) > _LONGEST_NAME for name in names.tolist()], dtype=bool)


def _range(low: float, high: float) -> str:
    """Says what numbers are between two ends; the allowance for rounding is not told."""
    lowest, highest = (0.0 + round(end, 2) for end in (low, high))
    if np.isinf(highest):
        return f"at least {lowest:g}, or NaN"
    return f"at most {highest:g}, or NaN" if np.isinf(lowest) else f"in [{lowest:g}, {highest:g}]"


def _has_inf(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Says (P,) which points have an infinite value in a column (P,) or (P, D)."""
    infinite: NDArray[np.bool_] = np.isinf(values).any(axis=tuple(range(1, values.ndim)))
    return infinite


def check_digests(name: str, answers: Iterable[str], source: str) -> None:
    """Refuses a column of answers that are to be digests, or empty, and are not.

    Raises:
        InputError: If one is neither.
    """
    for answer in answers:
        if answer and not _DIGEST.fullmatch(answer):
            raise InputError(
                f"{source}: column {name!r}: found {answer!r:.40}, expected digests of 32 "
                "hexadecimal digits, as haltwise.recorder says"
            )


def check_unique(trace_id: NDArray[np.str_], source: NDArray[np.str_]) -> None:
    """Refuses files in which a trace is there twice.

    Args:
        trace_id: (N,) the trace ids of all files together.
        source: (N,) the name of the file that each trace is from.

    Raises:
        InputError: If a trace is there twice; it names the trace and the files of its first two
            occurrences.
    """
    _, first, count = np.unique(trace_id, return_index=True, return_counts=True)
    if count.max(initial=0) > 1:
        name = trace_id[first[count > 1].min()]
        files = source[trace_id == name]
        raise InputError(
            f"{files[1]}: trace_id {str(name)!r} is in {files[0]} too, expected once"
            if files[0] != files[1]
            else f"{files[0]}: trace_id {str(name)!r} is there twice, expected once"
        )
