"""Many prompts by a few slots: a slot whose answer is known goes to the next prompt at once.

A fixed batch runs until its longest row has ended, whatever the others save; here time follows
tokens.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from haltwise import Control, HaltHead, InputError, Session, Terms, ThoughtReport, ThoughtRequest
from haltwise.engine.decoder import Decoder
from haltwise.engine.token_rules import check_tokenizer
from haltwise.policy.signals import Index, Signals
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


def generate_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: HaltHead,
    prompts: Iterable[str],
    num_slots: int,
    max_new_tokens: int,
    price: float | None = None,
    min_tokens: int = 0,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    control: Control | None = None,
    accepts: Callable[[str], bool] | None = None,
    num_thoughts: int = 1,
) -> Iterator[BatchAnswer]:
    """Answers prompts in refilled slots, with a head that halts their thoughts.

    Of several thoughts of a prompt, each with the next seed, the answer that most of them give is
    the prompt's. They run in turn, and none begins that could not change it any more.

    What a prompt gets depends on itself and the seed alone, not on the other slots. A row that is
    not halted gets the tokens of a plain `generate`, if greedy.

    Args:
        model: The LM: decoder-only, with full attention in every layer.
        tokenizer: The LM's tokenizer.
        head: The policy.
        prompts: The LM's whole inputs; they are taken one by one as slots become free.
        num_slots: How many prompts are answered at once.
        max_new_tokens: The most tokens of an answer, its thought included.
        price: The price in exact match per 1,000 tokens; by default the head's own. At 0 the head
            never halts.
        min_tokens: The head does not halt before this many thinking tokens.
        max_tokens: A thought is closed at this many thinking tokens, whatever the head says.
        temperature: The temperature of sampling; 0 takes the likeliest token.
        seed: The seed of sampling.
        control: It sets terms and prices; by default those that are asked for are constant.
        accepts: Tells of the text of an answer whether it can be given; by default of one that the
            head's answer rule can read. Where the head has halted a thought and it cannot, the
            thought goes on to its end.
        num_thoughts: The most thoughts of a prompt.

    Returns:
        An iterator that gives each answer as soon as it is known.

    Raises:
        InputError: If a setting makes no sense, the LM or the head cannot be run, or the tokenizer
            is not the head's.
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
    check_tokenizer(head, tokenizer)
    terms = Terms(head.price_or_own(price), min_tokens, max_tokens)
    measures = terms.price > 0 or control is not None
    decoder = Decoder(
        model,
        tokenizer,
        head.config.halting,
        num_slots,
        max_new_tokens,
        temperature,
        signals=head.config.observing.signals if measures else (),
        keeps_on=True,
    )
    session = Session(head, num_slots, control)
    accepts = accepts or decoder.rules.is_readable
    job = _BatchJob(session, decoder, terms, accepts, num_thoughts, seed)
    return job.run(prompts)


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


class _BatchJob:
    """A decoder whose slots are halted by a session, and refilled."""

    def __init__(
        self,
        session: Session,
        decoder: Decoder,
        terms: Terms,
        accepts: Callable[[str], bool],
        num_thoughts: int,
        seed: int,
    ) -> None:
        """Takes a session with a row for each of the decoder's slots, and the terms of prompts."""
        self._session, self._decoder, self._terms = session, decoder, terms
        self._accepts, self._num_thoughts, self._seed = accepts, num_thoughts, seed
        self._looks = session.head.config.halting.probing == "always"
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
            request = ThoughtRequest(self._terms, {"prompt": asked.index})
            self._session.join(slot, request, self._decoder.thoughts[slot])

    def _halt(self, slots: list[int]) -> dict[int, Probe]:
        """Lets the session decide about slots, and halts some of them.

        Returns:
            The forced answers of halted slots. With a head that does not look at answers there
            are none, since the LM goes on to answer by itself.
        """
        probes: dict[int, Probe] = {}

        def read(points: Index, _: list[Thought]) -> Signals:
            probes.update(self._force(points.tolist()) if self._looks else {})
            return self._decoder.signals(points, list(probes.values()) if self._looks else None)

        halted = self._session.decide(slots, read)
        if not self._looks:
            self._decoder.close(np.array(halted, dtype=np.int64))
            return {}
        probes |= self._force([slot for slot in halted if slot not in probes])
        return {slot: probes[slot] for slot in halted}

    def _force(self, slots: list[int]) -> dict[int, Probe]:
        """Returns the forced answers of some slots, whose tokens are added to their reports."""
        answers = self._decoder.force(np.array(slots, dtype=np.int64))
        probes = dict(zip(slots, answers, strict=True))
        for slot, probe in probes.items():
            self._session.running[slot].report.num_probe_tokens += probe.num_tokens
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
