"""Pairs for tests: the worked example beside a large LM, and a made-up population."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from traces import Pairs, Traces, pair_up

MakeTraces = Callable[..., Traces]


def worked_pair(make_traces: MakeTraces) -> Pairs:
    """The worked example, and a large LM that is right after 300 tokens."""
    small = make_traces([{}])
    return pair_up(small, make_traces([{"model": "big", "num_tokens": 300, "position": [5, 6, 7]}]))


def made_up(
    make_traces: MakeTraces,
    num: int,
    large_right: Callable[[bool], bool],
    seed: int = 0,
    large_tokens: int = 200,
) -> Pairs:
    """Questions of two tasks: the small LM is right on easy ones, and its confidence tells.

    Every thought has four points, 50 tokens apart, and ends at 250. A sure answer is the right one
    on easy questions from the second point on; hard ones have unsure, wrong answers.

    Args:
        make_traces: Makes traces of rows.
        num: The number of questions.
        large_right: Tells, of whether a question is easy, whether the large LM is right.
        seed: The seed of the draw.
        large_tokens: The number of tokens of the large LM's answers.
    """
    rng = np.random.default_rng(seed)
    small, large = [], []
    for n in range(num):
        easy = bool(rng.random() < 0.6)
        right = [False, easy, easy, easy]
        sure = np.where(right, 0.98, 0.4) + rng.uniform(-0.02, 0.02, 4)
        split = ("train", "train", "dev", "test", "test")[n % 5]
        of: dict[str, Any] = {"task": "easy" if rng.random() < 0.5 else "mixed", "split": split}
        small.append(
            of
            | {
                "num_tokens": 250,
                "position": [50, 100, 150, 200],
                "probe_tokens": [2] * 4,
                "answer": ["3", "7", "7", "7"] if easy else ["1", "2", "3", "4"],
                "correct": right,
                "final_correct": easy,
                "confidence": sure.tolist(),
                "answer_logprobs": [[float(np.log(each))] for each in sure],
            }
        )
        point: dict[str, Any] = {"position": [], "probe_tokens": [], "answer": [], "correct": []}
        point |= {"confidence": [], "answer_logprobs": []}
        known = {"num_tokens": large_tokens, "final_correct": large_right(easy)}
        large.append(of | {"model": "big"} | point | known)
    return pair_up(make_traces(small), make_traces(large))
