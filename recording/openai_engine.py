"""Recording from a server that runs already: llama-server, vLLM, SGLang, or one like OpenAI's.

A thought is streamed, with the log probabilities of its tokens and of the likeliest in their
places; signals follow from them by the code that reads them beside a head. Then an answer is
forced at every decision point by a request that goes on from prompt, thought and close text. The
last point comes first: what is behind a point is then in the server's prefix cache no more, and
what is before it still is.
"""

from __future__ import annotations

import math
from asyncio import Task
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from tqdm import tqdm

from haltwise import InputError, Signals
from haltwise.policy.signals import signals_from
from haltwise.proxy.dialect import ServedPrompt
from haltwise.proxy.generation import ServedGeneration
from haltwise.proxy.wire import ServedToken
from haltwise.session.stream import FEWEST_TOP, StreamedSignals
from haltwise.session.thought import PointRules, Probe, Thought
from lms.ask import check_closes, check_room
from lms.chat import chat_of
from lms.tried import misspelt
from recording.config import EngineConfig, TaskFormat
from recording.served_lm import ServedLM
from recording.trace_row import (
    SeededQuestion,
    TraceRow,
    UnfinishedTrace,
    judged_trial,
    recorder_metadata,
    sampling_seed,
)

#: A question with its sampling seed, and the prompt in which it is asked.
_AskedQuestion = tuple[SeededQuestion, ServedPrompt]

# Of these the numbers of the likeliest tokens are a part.
_OF_TOP = ("entropy", "max_entropy", "margin")
# What any LM goes on from, and for how many tokens, to see what its server shows.
ANY_PROMPT, _NUM_LOOKED_AT = "1 2 3 4", 4
# Nats by which numbers of one token may differ from request to request.
_SAME_NUMBER = 0.1
_NOTHING = ServedPrompt("", [])
# Likeliest tokens whose numbers are compared.
_NUM_COMPARED = 5
# What else may be to blame where a trial fails.
_ALONE = "if others ask the server at the same time, they may have taken its slots or its cache"
# Seeds that every server takes.
_SEEDS = 2**31 - 1


class OpenAIEngine:
    """The `recording.engine.RecordingEngine` that asks a server.

    Args:
        config: Where the server is, and how its LM is asked.
        task_format: How the task's answers are asked for and read.

    Raises:
        InputError: If the server does not answer, has no such LM, or does not show what has to be
            recorded.
    """

    def __init__(self, config: EngineConfig, task_format: TaskFormat) -> None:
        """Asks the server what it is and what it shows."""
        self._lm = lm = ServedLM(config)
        try:
            self._chat = chat_of(lm.template, config)
            self._halting = config.halting(self._chat, task_format)
            self._rules = PointRules(self._halting)
            self._close = lm.run(lm.tokenized(self._halting.close_text))
            context = lm.context or math.inf
            self._max_tokens = config.budget(context)
            self._num_forced = len(self._close.ids or ()) + self._halting.max_answer_tokens
            check_room(context, self._max_tokens, self._num_forced)
            self._temperature = config.temperature or 0.0
            self._num_slots = min(config.batch_size, lm.num_slots or config.batch_size)
            self._signals, self._notes = self._look()
        except BaseException:
            lm.close()
            raise
        close_ids = self._close.ids
        self.recorder = recorder_metadata(
            "openai",
            {"lm": lm.name, "server": lm.facts, "messages": list(self._chat.before)},
            self._halting,
            None if close_ids is None else len(close_ids),
            self._max_tokens,
            self._temperature,
            self._signals,
            task_format.instruction,
        )
        facts = ", ".join(f"{name} {value}" for name, value in lm.facts.items() if value)
        self.description = f"{self._chat.describe()}\nserver:     {facts}"

    def record(self, work: Iterable[SeededQuestion]) -> Iterator[TraceRow]:
        """Answers as many questions at once as the server takes, and yields each trace as it ends.

        A question that is too long for the LM is left out, with a message.

        Raises:
            InputError: If a question cannot be asked, or the server is gone for too long.
        """
        return self._record(self._asked(work), self._max_tokens)

    def self_test(self, work: Sequence[SeededQuestion], max_tokens: int | None) -> str:
        """Tries a few questions, and returns a report for a person.

        Raises:
            InputError: If halting this LM cannot work.
        """
        check_closes(self._halting)
        asked = list(self._asked(work))
        if not asked:
            raise InputError(
                f"none of {len(work)} questions fits into the server's context of "
                f"{self._lm.context} tokens: expected shorter ones, or lower --max-tokens"
            )
        budget = min(self._max_tokens, max_tokens or self._max_tokens)
        prompts = {question.question_id: prompt.text for (question, _), prompt in asked}
        try:
            rows = list(self._record(iter(asked), budget))
            told = judged_trial(rows, prompts, self.description, self._halting, self._warnings())
        except InputError as error:
            raise InputError(f"{error}; {_ALONE}") from None
        at_once = f"{self._num_slots} questions at once"
        if self._lm.num_slots is not None:
            # llama-server of 2026-10 then gives others answers of a few tokens, or of the slot's.
            at_once += (
                ", each in a slot of its own: let nobody else ask the server while it is recorded "
                "from, or others get wrong answers"
            )
        return "\n".join([told, at_once, *(f"not shown: {note}" for note in self._notes)])

    def _warnings(self) -> list[str]:
        """Returns a warning if the LM sees another close text, as far as the server tells."""
        ids = self._close.ids
        back = None if ids is None else self._lm.ask(lambda: self._lm.spelt(ids))
        return [] if back is None else misspelt(self._halting.close_text, back)

    def close(self) -> None:
        """Ends the connections."""
        self._lm.close()

    # What the server shows

    def _look(self) -> tuple[tuple[str, ...], list[str]]:
        """Returns the signals that the server's answers allow, and what a person has to know.

        Raises:
            InputError: If it tells no log probabilities of tokens: then nothing counts them either.
        """
        tokens, cooler = (self._lm.run(self._looked_at(t)) for t in (1.0, self._temperature or 1.0))
        if not tokens or any(math.isnan(token.logprob) for token in tokens):
            raise InputError(
                f"the server shows no log probabilities of tokens, by which {self._lm.name!r} is "
                "recorded: expected llama-server, vLLM, SGLang, or another server that streams "
                "logprobs of /v1/completions"
            )
        signals, notes = signals_from("token_logprobs", "text"), []
        fewest = min(len(token.top) for token in tokens)
        if fewest < FEWEST_TOP:
            signals = tuple(name for name in signals if name not in _OF_TOP)
            notes.append(
                f"{', '.join(_OF_TOP)}: {fewest} of the likeliest tokens are told, expected "
                f"{FEWEST_TOP} or more"
            )
        if _differ(tokens[0], cooler[0]):
            notes.append(
                "the LM's own log probabilities: they hang on the temperature, and a head has to "
                f"run at {self._temperature} too"
            )
        if self._close.ids is None or tokens[0].id is None:
            notes.append("ids of tokens: forced answers go on from texts, which may be cut anew")
        if self._lm.context is None:
            notes.append("the length of the context: see that --max-tokens fits into it")
        notes.append("end_think_logprob, hidden")
        return signals, notes

    async def _looked_at(self, temperature: float) -> list[ServedToken]:
        prompt = await self._lm.tokenized(ANY_PROMPT)
        said = await self._lm.goes_on(
            prompt, ServedGeneration(), _NOTHING, _NUM_LOOKED_AT, temperature=temperature
        )
        return [token for token in said.tokens if token.text or len(said.tokens) == 1]

    # Recording

    def _asked(self, work: Iterable[SeededQuestion]) -> Iterator[_AskedQuestion]:
        """Yields questions with their prompts; those that are too long are left out."""
        needed = self._max_tokens + self._num_forced
        for job in work:
            prompt = self._prompt(job[0].text)
            most = math.inf if self._lm.context is None else self._lm.context - needed
            if prompt.ids is None or len(prompt.ids) <= most:
                yield job, prompt
            else:
                tqdm.write(
                    f"{job[0].question_id} has {len(prompt.ids):,} tokens, expected at most "
                    f"{most:,}: left out"
                )

    def _prompt(self, text: str) -> ServedPrompt:
        """Returns the LM's whole input for what a user asks."""
        chat = self._chat
        if not chat.template.text:
            return ServedPrompt(chat.prompt(text))
        return self._lm.run(self._lm.prompt(chat.messages(text), bool(chat.think_start)))

    def _record(self, asked: Iterator[_AskedQuestion], max_tokens: int) -> Iterator[TraceRow]:
        free = list(range(self._num_slots))
        running: dict[Task[TraceRow], int] = {}
        try:
            while True:
                for slot, one in zip(list(free), islice(asked, len(free)), strict=False):
                    free.remove(slot)
                    running[self._lm.start(self._answer(*one, slot, max_tokens))] = slot
                if not running:
                    return
                for task in self._lm.wait(running):
                    free.append(running.pop(task))
                    yield task.result()
        finally:
            self._lm.cancel(running)

    async def _answer(
        self, job: SeededQuestion, prompt: ServedPrompt, slot: int, max_tokens: int
    ) -> TraceRow:
        """Lets the LM think about a question to the end, and forces its answers on the way."""
        said = await self._lm.goes_on(
            prompt,
            ServedGeneration(),
            _NOTHING,
            max_tokens,
            temperature=self._temperature,
            seed=sampling_seed(prompt.text, job[1]) & _SEEDS,
            slot=self._pinned(slot),
        )
        thought = Thought(self._rules, prompt.text)
        seen = self._seen(thought, said)
        thought.end(said.ended_by_lm)
        recording = UnfinishedTrace(*job, signals={name: [] for name in self._signals})
        probes = [await self._force(prompt, said, signals, slot) for signals in reversed(seen)]
        for signals, probe in zip(seen, reversed(probes), strict=True):
            recording.see(probe, signals, 0)
        await self._lm.patiently(self._lm.check_same)
        return recording.row(self._lm.name, self._rules, thought)

    def _pinned(self, slot: int) -> int | None:
        """Returns the server's slot in which a question stays, if it has slots."""
        return None if self._lm.num_slots is None else slot

    def _seen(self, thought: Thought, said: ServedGeneration) -> list[Signals]:
        """Gives a thought its tokens, and returns the signals at each point before the end.

        Raises:
            InputError: If the server tells a thought apart of an LM that is said to have none.
        """
        if said.num_apart and not self._rules.think_end:
            raise InputError(
                f"the server tells {self._lm.name!r}'s thoughts apart: expected --think-start and "
                "--think-end, by which its thoughts are to be closed"
            )
        thought.begun |= said.num_apart > 0
        streamed, seen = StreamedSignals(self._rules, self._signals), []
        for num, token in enumerate(said.tokens, start=1):
            if said.num_apart and num > said.num_apart and token.text != self._rules.think_end:
                thought.closed = True  # by a marker that the server does not show
            thought.add(token.text)
            if token.is_shown:
                streamed.add(token.logprob, token.top)
            if thought.at_point and num < len(said.tokens):
                seen.append(streamed.collect(thought))
        return seen

    async def _force(
        self, prompt: ServedPrompt, said: ServedGeneration, signals: Signals, slot: int
    ) -> Probe:
        """Returns the answer that the LM gives greedily when its thought is closed at a point."""
        position = int(signals.position[0])
        if prompt.messages and said.num_apart:  # the server shows no marker of its own
            opening = {"role": "assistant", "content": f"{self._rules.think_start}\n"}
            prompt = replace(prompt, messages=[*prompt.messages, opening])
        answer = await self._lm.goes_on(
            prompt,
            ServedGeneration(said.tokens[:position], num_hidden=said.num_hidden),
            self._close,
            self._halting.max_answer_tokens,
            slot=self._pinned(slot),
            num_top=1,
            is_complete=lambda tokens: self._rules.is_complete([token.text for token in tokens]),
        )
        return self._rules.read(answer.forced_answer)


def _differ(token: ServedToken, other: ServedToken) -> bool:
    """Tells whether a server has other numbers for one place, asked twice."""
    pairs = zip(
        sorted(token.top)[-_NUM_COMPARED:], sorted(other.top)[-_NUM_COMPARED:], strict=False
    )
    return any(abs(one - two) > _SAME_NUMBER for one, two in pairs)
