"""Many prompts by a few slots: a slot whose answer is known goes to the next prompt at once.

A fixed batch runs until its longest row has ended, whatever the others save; here time follows
tokens. What runs the LM is a `BatchDecoder`: transformers', or vLLM's engine.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from haltwise import InputError, Session, Signals, Terms, ThoughtReport, ThoughtRequest
from haltwise.engine.token_rules import TokenRules
from haltwise.policy.signals import Index
from haltwise.policy.votes import elected, is_settled
from haltwise.session.thought import Probe, Thought


@dataclass(frozen=True)
class BatchAnswer:
    """The answer to one prompt of a batch job."""

    index: int
    """The number of the prompt, from 0."""
    ids: list[int]
    """The ids of all tokens that follow the prompt, up to the end token."""
    report: ThoughtReport
    """What happened to its thought."""
    trouble: str = ""
    """Why there is no answer, if that is so: an empty prompt or one that is too long for the LM, or
    logits that were not numbers. The other prompts of the job are not disturbed."""
    thoughts: tuple[ThoughtReport, ...] = ()
    """What happened to each thought of the prompt, in order; `report` is that of the one whose
    answer is given."""


class BatchDecoder(Protocol):
    """Runs an LM on the prompts in some slots, see `haltwise.engine.decoder.Decoder`."""

    rules: TokenRules
    """How thoughts are read and closed."""
    eos_ids: list[int]
    """Each of these tokens ends an answer."""
    max_tokens: int
    """The most tokens of an answer."""
    num_slots: int
    """The number of slots."""
    tokens_beside: int
    """Tokens that a look at an answer takes beside those of the answer."""
    thoughts: dict[int, Thought]
    """What each slot has generated."""
    troubles: dict[int, str]
    """Why slots cannot go on."""

    def start(self, slots: Index, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """Gives slots (B,) to new prompts."""

    def advance(self, slots: Index) -> object:
        """Takes slots (B,) further, until there may be something to decide for one of them."""

    def force(self, slots: Index) -> Sequence[Probe | None]:
        """Returns the forced answers of slots (B,), None for those that are not known yet.

        Those are asked for again, after some slots have been taken further.
        """

    def signals(self, slots: Index, probes: Sequence[Probe] | None = None) -> Signals:
        """Returns what is seen of slots (B,) at their decision points."""

    def close(self, slots: Index) -> None:
        """Closes the thoughts of slots (B,); their answers follow."""

    def reopen(self, slot: int) -> int:
        """Takes back that the thought of a slot was closed; returns how many tokens are dropped."""


def check_job(num_slots: int, max_new_tokens: int, num_thoughts: int, temperature: float) -> None:
    """Refuses numbers with which no batch job can be run.

    Raises:
        InputError: If one makes no sense, or they contradict each other.
    """
    counts = {"num_slots": num_slots, "max_new_tokens": max_new_tokens}
    for name, count in (counts | {"num_thoughts": num_thoughts}).items():
        if count < 1:
            raise InputError(f"{name} is {count}, expected at least 1")
    if num_thoughts > 1 and not temperature:
        raise InputError(
            f"num_thoughts is {num_thoughts} at a temperature of 0, where all thoughts are the "
            "same: expected 1, or a temperature above 0"
        )


@dataclass
class _Asked:
    """A prompt, and its thoughts that are over."""

    index: int
    prompt: str
    done: list[BatchAnswer] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    """What could be read of each; empty where nothing could."""

    def elect(self) -> BatchAnswer:
        """Returns the answer that most thoughts give."""
        reports = tuple(one.report for one in self.done)
        return replace(self.done[elected(self.answers)], thoughts=reports)


class BatchJob:
    """A decoder whose slots are halted by a session, and refilled.

    Args:
        session: Has a row for each of the decoder's slots.
        decoder: Runs the LM.
        terms: Those of all prompts.
        accepts: Tells of the text of an answer whether it can be given; None for one that the
            head's answer rule can read.
        num_thoughts: The most thoughts of a prompt.
        seed: The seed of sampling.
    """

    def __init__(
        self,
        session: Session,
        decoder: BatchDecoder,
        terms: Terms,
        accepts: Callable[[str], bool] | None,
        num_thoughts: int,
        seed: int,
    ) -> None:
        """Starts with every slot empty."""
        self._session, self._decoder, self._terms = session, decoder, terms
        self._accepts = accepts or decoder.rules.is_readable
        self._num_thoughts, self._seed = num_thoughts, seed
        self._looks = session.head.config.halting.probing == "always"
        # Tokens of each slot when it was decided about.
        self._decided: dict[int, int] = {}
        self._in_slot: dict[int, _Asked] = {}
        self._think_again: deque[_Asked] = deque()

    def run(self, prompts: Iterable[str]) -> Iterator[BatchAnswer]:
        """Yields each answer as soon as it is known."""
        fresh, session = (_Asked(*each) for each in enumerate(prompts)), self._session
        try:
            while True:
                self._refill(fresh)
                if not session.running:
                    return
                self._decoder.advance(np.array(list(session.running)))
                troubles = self._decoder.troubles
                answers = self._halt([slot for slot in session.running if slot not in troubles])
                for slot in list(session.running):
                    is_over = slot in answers or session.running[slot].thought.ended
                    if slot not in troubles and self._is_to_resume(slot, answers.get(slot)):
                        self._resume(slot)
                    elif slot in troubles or is_over:
                        asked = self._finish(slot, answers.get(slot))
                        if is_settled(asked.answers, self._num_thoughts):
                            yield asked.elect()
                        else:
                            self._think_again.append(asked)
        finally:  # whoever takes the answers may leave some
            for slot in list(session.running):
                session.finish(slot)

    def _refill(self, fresh: Iterator[_Asked]) -> None:
        """Gives free slots to prompts that think again, and then to the next of the fresh ones."""
        running = self._session.running
        for slot in (slot for slot in range(self._decoder.num_slots) if slot not in running):
            asked = self._think_again.popleft() if self._think_again else next(fresh, None)
            if asked is None:
                break
            self._in_slot[slot] = asked
        started = {slot: asked for slot, asked in self._in_slot.items() if slot not in running}
        prompts = [asked.prompt for asked in started.values()]
        seeds = [self._seed + len(asked.done) for asked in started.values()]
        self._decoder.start(np.array(list(started), dtype=np.int64), prompts, seeds)
        for slot, asked in started.items():
            self._decided[slot] = 0
            request = ThoughtRequest(self._terms, {"prompt": asked.index})
            self._session.join(slot, request, self._decoder.thoughts[slot])

    def _halt(self, slots: list[int]) -> dict[int, Probe]:
        """Lets the session decide about slots, and halts some of them.

        Returns:
            The forced answers of halted slots. With a head that does not look at answers there
            are none, since the LM goes on to answer by itself.
        """
        nums = {slot: self._decoder.thoughts[slot].num_tokens for slot in slots}
        moved = [slot for slot in slots if nums[slot] != self._decided[slot]]
        waiting = self._session.waiting(moved) if self._looks else []
        probes = self._force(waiting)

        def read(points: Index, _: list[Thought]) -> Signals:
            looks = [probes[slot] for slot in points.tolist()] if self._looks else None
            return self._decoder.signals(points, looks)

        unknown = set(waiting) - set(probes)
        known = [slot for slot in moved if slot not in unknown]
        self._decided |= {slot: nums[slot] for slot in known}
        halted = self._session.decide(known, read)
        if not self._looks:
            self._decoder.close(np.array(halted, dtype=np.int64))
            return {}
        return {slot: probes[slot] for slot in halted}

    def _force(self, slots: list[int]) -> dict[int, Probe]:
        """Returns the forced answers of some slots that are known; their tokens are counted."""
        answers = self._decoder.force(np.array(slots, dtype=np.int64))
        probes = {slot: probe for slot, probe in zip(slots, answers, strict=True) if probe}
        for slot, probe in probes.items():
            spent = probe.num_tokens + self._decoder.tokens_beside
            self._session.running[slot].report.num_probe_tokens += spent
        return probes

    def _is_to_resume(self, slot: int, probe: Probe | None) -> bool:
        """Tells whether the head has halted a slot whose answer is known, and cannot be given."""
        running = self._session.running[slot]
        if running.report.decided != "halted" or not (probe or running.thought.ended):
            return False
        return not self._accepts(probe.text if probe else running.thought.answer_text())

    def _resume(self, slot: int) -> None:
        """Lets the thought of a halted slot go on; what it has answered counts as a look."""
        running = self._session.running[slot]
        if running.thought.closed:
            running.report.num_probe_tokens += self._decoder.reopen(slot)
            running.thought = self._decoder.thoughts[slot]
        self._session.resume(slot)

    def _finish(self, slot: int, probe: Probe | None) -> _Asked:
        """Frees a slot whose LM has ended, or whose forced answer is known; returns its prompt."""
        decoder, running = self._decoder, self._session.running[slot]
        asked, trouble = self._in_slot.pop(slot), decoder.troubles.get(slot, "")
        ids, text = list(running.thought.tokens), running.thought.answer_text()
        if probe:
            running.report.answer, text = probe.answer, probe.text
            ids.extend([*decoder.rules.close_ids, *probe.tokens, decoder.eos_ids[0]])
        report = self._session.finish(slot)
        asked.answers.append("" if trouble else decoder.rules.read_answer(text))
        asked.done.append(BatchAnswer(asked.index, ids[: decoder.max_tokens], report, trouble))
        return asked
