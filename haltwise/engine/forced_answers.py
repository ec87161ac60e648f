"""How forced answers are generated: greedily, all rows of a batch together."""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from haltwise.engine.signal_reducer import copy_to_host
from haltwise.engine.token_rules import TokenRules
from haltwise.policy.signals import Float, Index
from haltwise.session.thought import ForcedAnswer

NextTokens = Callable[[Index, Index | None, int], tuple[Index, Float]]
"""Generates the likeliest tokens of some rows of a batch.

It is given the rows (G,) whose answers go on, their newest tokens (G,), or None before the first
ones, and how many tokens an answer may still have. It returns the next tokens (S, G) of these rows,
at most so many of each, and their log probabilities (S, G), which are no numbers where the logits
were none.
"""


def greedy_answers(
    num_rows: int, next_tokens: NextTokens, rules: TokenRules, eos_ids: Sequence[int]
) -> list[ForcedAnswer]:
    """Generates one answer for each row; a row drops out as soon as its answer has ended.

    Args:
        num_rows: How many answers to generate.
        next_tokens: Generates the tokens, one or several at a time.
        rules: They know the text that ends an answer, and after how many tokens it is cut.
        eos_ids: Each of these tokens ends an answer.
    """
    answers = [ForcedAnswer([], [], 0) for _ in range(num_rows)]
    moving, newest, left = np.arange(num_rows), None, rules.max_answer_tokens
    while left and len(moving):
        tokens, logprobs = next_tokens(moving, newest, left)
        columns = zip(moving.tolist(), tokens.T.tolist(), logprobs.T.tolist(), strict=True)
        going = [
            not extend_answer(answers[row], ids, numbers, eos_ids, rules)
            for row, ids, numbers in columns
        ]
        moving, newest, left = moving[going], tokens[-1, going], left - len(tokens)
    return answers


def one_by_one(first_logits: Tensor, feed: Callable[[Index, Index], Tensor]) -> NextTokens:
    """Makes what generates one token at a time for `greedy_answers`.

    Args:
        first_logits: (B, V) the logits of each answer's first token.
        feed: Given the rows (G,) that go on and their newest tokens (G,), it returns their next
            logits (G, V).
    """

    def next_tokens(moving: Index, newest: Index | None, left: int) -> tuple[Index, Float]:
        logits = first_logits if newest is None else feed(moving, newest)
        best = logits.log_softmax(dim=-1).max(dim=-1)
        tokens, logprobs = copy_to_host(best.indices[None], best.values[None])
        return tokens.astype(np.int64), logprobs

    return next_tokens


def extend_answer(
    answer: ForcedAnswer,
    tokens: Sequence[int],
    logprobs: Sequence[float],
    eos_ids: Sequence[int],
    rules: TokenRules,
) -> bool:
    """Adds tokens to an answer up to its end; returns whether it has ended."""
    for token, logprob in zip(tokens, logprobs, strict=True):
        answer.num_tokens += 1
        if token in eos_ids and np.isfinite(logprob):
            return True
        answer.tokens.append(token)
        answer.logprobs.append(logprob)
        if rules.is_complete(answer.tokens):
            return True
    return False
