"""How forced answers are decoded: greedily, a token at a time, in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from haltwise.engine.token_rules import TokenRules
from haltwise.policy.signals import Float, Index
from haltwise.session.forced_answer import ForcedAnswer


def greedy_answers(
    logits: Tensor,
    feed: Callable[[Index, Index], Tensor],
    max_tokens: int,
    eos_ids: Sequence[int],
    rules: TokenRules,
) -> list[ForcedAnswer]:
    """Decodes one answer a row, always the likeliest token; rows drop out as they end.

    Logits that are not numbers give log probabilities that are not.

    Args:
        logits: (B, V) of each answer's first token.
        feed: Given which of the B rows go on (G,) and their tokens (G,), returns their next
            logits (G, V).
        max_tokens: An answer is cut after this many.
        eos_ids: Any of these ends an answer.
        rules: They know the text that ends an answer.
    """
    answers = [ForcedAnswer([], [], 0) for _ in logits]
    moving = np.arange(len(answers))
    for num in range(1, max_tokens + 1):
        best = logits.log_softmax(dim=-1).max(dim=-1)
        # One host copy; float32 holds token ids exactly.
        picks = torch.stack([best.indices.float(), best.values]).cpu().numpy()
        tokens, logprobs = picks[0].astype(np.int64), picks[1]
        ended = take_tokens([answers[i] for i in moving], tokens, logprobs, eos_ids, rules)
        moving = moving[~ended]
        if not len(moving) or num == max_tokens:
            break
        logits = feed(moving, tokens[~ended])
    return answers


def take_tokens(
    answers: Sequence[ForcedAnswer],
    tokens: Index,
    logprobs: Float,
    eos_ids: Sequence[int],
    rules: TokenRules,
) -> NDArray[np.bool_]:
    """Adds a token (G,) to each of some answers; returns which of them have ended (G,)."""
    ended = np.isin(tokens, eos_ids) & np.isfinite(logprobs)
    for j, answer in enumerate(answers):
        answer.num_tokens += 1
        if not ended[j]:
            answer.tokens.append(int(tokens[j]))
            answer.logprobs.append(float(logprobs[j]))
            ended[j] = rules.is_complete(answer.tokens)
    return ended
