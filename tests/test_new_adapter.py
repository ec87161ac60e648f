"""A serving adapter in one file: a batch of streams, decided in one session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from haltwise import Control, HaltHead, Session, Terms, ThoughtReport, ThoughtRequest
from haltwise.policy.features import signals_of
from haltwise.session.signal_collector import SignalCollector
from haltwise.session.stream import StreamedThought
from haltwise.session.thought import PointRules, Thought
from tests.toy_control import RisingPrice
from tests.transformers.hf_cases import blind_head

WORDS = ("so", "wait", "7", "x", "but")
TOP = [-0.1, *[-5.0] * 19]


@dataclass
class ToyServer:
    """Says words of its own, row by row; what it is told to say comes first."""

    num_rows: int

    def __post_init__(self) -> None:
        self.said: list[list[str]] = [[] for _ in range(self.num_rows)]
        self.forced: list[list[str]] = [[] for _ in range(self.num_rows)]

    def step(self) -> list[str]:
        for row, said in enumerate(self.said):
            own = "</think>" if row == 2 and len(said) == 10 else WORDS[(row + len(said)) % 5]
            said.append(self.forced[row].pop(0) if self.forced[row] else own)
        return [said[-1] for said in self.said]


class ToyAdapter:
    """Delivers a toy server's words to a session, and forces what closes a thought."""

    def __init__(
        self, head: HaltHead, server: ToyServer, terms: Terms, control: Control | None
    ) -> None:
        rules, num_rows = PointRules(head.config.halting), server.num_rows
        self.server, self.close = server, head.config.halting.close_text.split()
        self.session = Session(head, num_rows, control)
        self.collector = SignalCollector(rules, signals_of(head.config.observing.groups), num_rows)
        self.thoughts = [Thought(rules, "<think>") for _ in range(num_rows)]
        for row, thought in enumerate(self.thoughts):
            self.session.join(row, ThoughtRequest(terms, {"row": row}), thought)

    def run(self, num_steps: int) -> list[ThoughtReport]:
        everyone = np.arange(len(self.thoughts))
        logprobs, top = np.full(len(everyone), -0.1), np.tile(TOP, (len(everyone), 1))
        for _ in range(num_steps):
            for thought, word in zip(self.thoughts, self.server.step(), strict=True):
                thought.add(word)
            self.collector.add(everyone, logprobs, top)
            self.halt(self.session.waiting(everyone.tolist()))
        for thought in self.thoughts:
            thought.end(by_lm=False)
        return [self.session.finish(row) for row in everyone.tolist()]

    def halt(self, waiting: Sequence[int]) -> None:
        for row in self.session.decide(waiting, self.collector.collect):
            self.thoughts[row].closed = True
            self.server.forced[row] = list(self.close)


@pytest.mark.parametrize(
    ("terms", "control", "expected"),
    [
        (Terms(10.0, min_tokens=9), None, [("halted", 12)] * 2 + [("closed by the LM", 11)]),
        (Terms(0.1), None, [("token budget", 20)] * 2 + [("closed by the LM", 11)]),
        (Terms(0.1), RisingPrice(), [("halted", 12)] * 2 + [("closed by the LM", 11)]),
        (Terms(0.1, max_tokens=6), RisingPrice(), [("capped", 6)] * 3),
    ],
)
def test_an_adapter_in_one_file_halts_as_any_other(
    terms: Terms, control: Control | None, expected: list[tuple[str, int]]
) -> None:
    head = blind_head(groups=("pace", "distribution", "reflection"), close="so </think>")
    server = ToyServer(3)
    reports = ToyAdapter(head, server, terms, control).run(20)
    for row, report in enumerate(reports):
        alone = StreamedThought(
            head, PointRules(head.config.halting), ThoughtRequest(terms), "<think>", control
        )
        at = next((i for i, w in enumerate(server.said[row], 1) if alone.add(w, -0.1, TOP)), None)
        if at is None:
            alone.thought.end(by_lm=False)
        else:
            assert server.said[row][at : at + 2] == ["so", "</think>"]
        assert report == alone.finish()
    assert [(report.reason, report.position) for report in reports] == expected
