"""The rows of one `generate` call: their thoughts, who halts them, and what is forced on them.

Shapes: R rows in the call, T tokens in each, V vocabulary, D size of a hidden state.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import LongTensor, Tensor

from haltwise import Control, HaltHead, Session, Signals, ThoughtReport
from haltwise.engine.signal_reducer import SignalReducer
from haltwise.engine.token_rules import TokenRules
from haltwise.policy.signals import Index
from haltwise.session.session import requests_of
from haltwise.session.thought import Probe, Thought


class GeneratedRows:
    """The rows that one `generate` call runs, beside a session that halts them.

    Args:
        head: The policy.
        rules: How thoughts are read and closed.
        input_ids: (R, T) the prompts of the call.
        asked: Price, min_tokens and max_tokens: of each one value, or one for each row.
        control: Sets terms and prices; None for constant ones.
        free_answers: Whether what follows the pending tokens of a closed thought is the call's to
            choose, instead of the likeliest tokens.

    Raises:
        InputError: If what is asked makes no sense, or is not for this number of rows.
    """

    def __init__(
        self,
        head: HaltHead,
        rules: TokenRules,
        input_ids: LongTensor,
        asked: tuple[Any, Any, Any],
        control: Control | None,
        free_answers: bool,
    ) -> None:
        """Begins one thought and one request for each row."""
        num_rows = len(input_ids)
        self.rules = rules
        self.session = Session(head, num_rows, control)
        prompts = [rules.decode(row, skip_special_tokens=False) for row in input_ids.tolist()]
        #: The thought of each row.
        self.thoughts = [Thought(rules, prompt) for prompt in prompts]
        for row, request in enumerate(requests_of(head, num_rows, *asked)):
            self.session.join(row, request, self.thoughts[row])
        signals = head.config.observing.signals
        self.reducer = SignalReducer(rules, signals, num_rows, input_ids.device)
        #: The tokens of each row that are known but not generated.
        self.pending: list[deque[int]] = [deque() for _ in prompts]
        self._free_answers = free_answers
        # The rows whose thoughts were closed here.
        self._closed: list[int] = []

    def measure(self, logits: Tensor, tokens: Tensor) -> None:
        """Measures the newest token (R,) of every row, and the logits (R, V) that led to it."""
        self.reducer.add(np.arange(len(self.thoughts)), logits, tokens)

    def decide(
        self,
        rows: Sequence[int],
        logits: Tensor,
        hidden: Tensor | None,
        probes: Mapping[int, Probe] | None = None,
    ) -> list[int]:
        """Lets the session decide about some rows; returns those that it halts.

        Args:
            rows: The rows; those that do not wait are left as they are.
            logits: (R, V) the logits of what would follow.
            hidden: (R, D) last-layer states of the newest tokens, if they are wanted.
            probes: The forced answers of the rows, if anybody looked.
        """

        def read(points: Index, thoughts: list[Thought]) -> Signals:
            states = None if hidden is None else hidden[points]
            looks = None if probes is None else [probes[row] for row in points.tolist()]
            return self.reducer.read(points, thoughts, logits[points], states, looks)

        return self.session.decide(rows, read)

    def close(self, row: int, answer: Iterable[int] = ()) -> None:
        """Closes the thought of a row: the close text follows, and the tokens of an answer."""
        self.thoughts[row].closed = True
        self.pending[row].extend([*self.rules.close_ids, *answer])
        self._closed.append(row)

    def force_next(self, scores: Tensor) -> Tensor:
        """Returns scores (R, V) that leave rows whose thoughts were closed here one choice.

        It is the first pending token; and behind those, if answers are not free, the likeliest.
        """
        forced = [row for row in self._closed if self.pending[row]]
        answering = [row for row in self._closed if not self.pending[row]]
        if self._free_answers:
            answering = []
        if forced or answering:
            given, scores = scores, scores.clone()  # `generate` may keep what it passed
            scores[forced + answering] = -torch.inf
            scores[forced, [self.pending[row].popleft() for row in forced]] = 0.0
            likeliest = given[answering].argmax(dim=-1)
            scores[answering, likeliest] = given[answering, likeliest]
        return scores

    def finish(self) -> list[ThoughtReport]:
        """Ends the requests of all rows that have not ended; returns what has happened to each."""
        return [self.session.finish(row) for row in sorted(self.session.running)]
