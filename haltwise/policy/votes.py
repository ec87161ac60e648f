"""Several thoughts of one question behind one answer: the one that most of them give.

Thoughts run in turn, so that no further one begins once nothing can change the answer any more. An
answer that could not be read is empty, and no vote.
"""

from __future__ import annotations

from collections.abc import Sequence


def elected(answers: Sequence[str]) -> int:
    """Returns which of some thoughts has the answer that most give, the earliest one with it.

    Of several answers that are given equally often it is that of the earliest thought.

    Args:
        answers: Those of the thoughts, one at least.
    """
    ranks = [(bool(answer), answers.count(answer)) for answer in answers]
    return ranks.index(max(ranks))


def is_settled(answers: Sequence[str], num_thoughts: int) -> bool:
    """Returns whether no thought that is still to come can outvote the answer.

    Args:
        answers: Those of the thoughts so far.
        num_thoughts: How many thoughts there can be in all.
    """
    counts = sorted((answers.count(answer) for answer in set(answers) if answer), reverse=True)
    best, second = (*counts, 0, 0)[:2]
    return best - second > num_thoughts - len(answers) or len(answers) >= num_thoughts
