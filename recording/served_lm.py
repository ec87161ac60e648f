"""An LM behind somebody else's server: asked with patience, and checked to be the same one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from tqdm import tqdm

from haltwise import InputError
from haltwise.proxy.completion_request import numbers_asked
from haltwise.proxy.config import UpstreamConfig
from haltwise.proxy.dialect import (
    NO_SUCH_PATH,
    ServedPrompt,
    ServerDialect,
    dialect_of,
    listed_models,
)
from haltwise.proxy.generation import ServedGeneration, read_generation, refusal
from haltwise.proxy.upstream import Upstream
from haltwise.proxy.wire import Json, ServedToken, UpstreamError
from haltwise.session.signal_collector import NUM_TOP
from lms.chat import Message, thinking_switch
from recording.config import EngineConfig

T = TypeVar("T")

#: Where a server goes on from prompts as they stand.
COMPLETIONS = "/v1/completions"
_CHATS = "/v1/chat/completions"

# Seconds before a question is asked again: the first time, and at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0
# What happens to a question while its server is gone, and the statuses of one that is busy.
_GONE = ("unreachable", "connect timeout", "timeout", "cut")
_SERVER_ERROR = 500
_BUSY = (408, 425, 429, _SERVER_ERROR, 502, 503, 504, 529)
# Names of models in a message.
_MOST_NAMED = 10


class ServedLM:
    """An LM behind a server.

    Args:
        config: Where the server is, and what it calls the LM.

    Raises:
        InputError: If the server does not answer, or has no such LM.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Asks the server for all that has to be known of it."""
        self.name, self._url = config.lm, str(config.base_url)
        self._patience = config.patience
        connections = UpstreamConfig(self._url, config.api_key_env, config.batch_size)
        self._upstream = Upstream(connections)
        self._runner = asyncio.Runner()
        self._has_answered = self._is_gone = False
        try:
            self._dialect = self.ask(lambda: self._find(config.server_kind))
            dialect = self._dialect
            self.facts: Json = self.ask(lambda: dialect.facts([]))
            """What the server tells of itself."""
            self.context = self.ask(lambda: dialect.context([]))
            """The number of tokens of prompt and answer together; None if nobody tells."""
            self.num_slots = self.ask(lambda: dialect.num_slots([]))
            """The number of requests that the server runs at once; None if it does not tell."""
            self.template = ServedTemplate(self, self.ask(lambda: dialect.template([])))
            """What makes one text of the messages of a chat."""
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends all connections."""
        self._runner.run(self._upstream.close())
        self._runner.close()

    # Tasks

    def ask(self, question: Callable[[], Awaitable[T]]) -> T:
        """Returns the answer to a question, as `patiently` gets it; tasks go on meanwhile."""
        return self.run(self.patiently(question))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Returns what some work gives; tasks go on meanwhile."""
        return self._runner.run(work)

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Starts a task; it goes on while `wait` or `ask` waits."""
        return self._runner.get_loop().create_task(work)

    def wait(self, tasks: Iterable[asyncio.Task[T]]) -> set[asyncio.Task[T]]:
        """Waits until one of some tasks has ended, and returns all that have."""
        return self._runner.run(_first_ended(tasks))

    def cancel(self, tasks: Iterable[asyncio.Task[T]]) -> None:
        """Ends tasks."""
        self._runner.run(_cancelled(list(tasks)))

    # Questions

    async def patiently(self, question: Callable[[], Awaitable[T]]) -> T:
        """Returns the answer to a question, which is asked again while the server is gone or busy.

        Raises:
            InputError: If the server refuses it, is gone or busy for too long, or has come back as
                another one.
        """
        loop, pause = asyncio.get_running_loop(), _FIRST_PAUSE
        since: float | None = None
        while True:
            try:
                if since is not None and self._has_answered:
                    await self.check_same()
                answer = await question()
            except UpstreamError as error:
                since = since or loop.time()
                if not self._goes_by(error) or loop.time() - since >= self._patience:
                    raise InputError(f"{self._url}: {error}") from None
                self._tell_once(error)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                self._has_answered, self._is_gone = True, False
                return answer

    def _goes_by(self, error: UpstreamError) -> bool:
        """Whether it may help to wait: who has never been there is not waited for."""
        is_busy = error.answered in _BUSY or (error.kind == "said" and error.status in _BUSY)
        return is_busy or (error.kind in _GONE and self._has_answered)

    def _tell_once(self, error: UpstreamError) -> None:
        if not self._is_gone:
            tqdm.write(f"{self._url}: {error}; asked again for up to {self._patience:,.0f} seconds")
        self._is_gone = True

    async def check_same(self) -> None:
        """Refuses a server that is not the one that it was.

        Raises:
            InputError: If it tells something else of itself.
            UpstreamError: If it does not answer.
        """
        found = await self._dialect.facts([])
        differ = [name for name in self.facts if found.get(name) != self.facts[name]]
        if differ:
            was, now = ({name: facts.get(name) for name in differ} for facts in (self.facts, found))
            raise InputError(f"{self._url} has come back as another server: {now}, before {was}")

    async def _find(self, kind: str) -> ServerDialect:
        """Finds out of what kind the server is, and whether it has the LM.

        Raises:
            InputError: If it has no LM of that name.
            UpstreamError: If it does not answer.
        """
        try:
            models = await listed_models(self._upstream, [])
        except UpstreamError as error:
            if error.answered not in NO_SUCH_PATH:
                raise
            models = []
        names = [str(model.get("id")) for model in models]
        names += [str(a) for model in models for a in model.get("aliases") or ()]
        if names and self.name not in names:
            shown = ", ".join(dict.fromkeys(names[:_MOST_NAMED]))
            raise InputError(f"{self._url} has no model {self.name!r}: expected --lm {shown}")
        return dialect_of(kind, models)(self._upstream)

    # What the LM says

    async def prompt(self, messages: list[Message], thinking: bool) -> ServedPrompt:
        """Returns what the server's template makes of messages, for the LM's turn.

        Raises:
            InputError: If the template refuses them.
        """
        asks = self._asked_of_template(messages, True, thinking)
        return await self._by_template(lambda: self._dialect.prompt(asks, []))

    async def tokenized(self, text: str) -> ServedPrompt:
        """Returns a text with its tokens, if the server tells them."""
        return await self.patiently(lambda: self._dialect.tokenized(text, self.name, []))

    async def spelt(self, ids: list[int]) -> str | None:
        """Returns the text that tokens spell; None if the server does not tell."""
        return await self.patiently(lambda: self._dialect.spelt(ids, self.name, []))

    async def rendered(self, messages: list[Message], is_open: bool, thinking: bool) -> str:
        """Returns the text of messages; see `lms.chat.ChatTemplate.render`."""
        asks = self._asked_of_template(messages, is_open, thinking)
        return await self._by_template(lambda: self._dialect.rendered(asks, []))

    async def _by_template(self, question: Callable[[], Awaitable[T]]) -> T:
        """As `patiently`; servers answer with 500 if it is the template that refuses messages."""

        async def asked() -> T:
            try:
                return await question()
            except UpstreamError as error:
                if error.answered != _SERVER_ERROR:
                    raise
                raise InputError(f"{self._url}: {error}") from None

        return await self.patiently(asked)

    def _asked_of_template(self, messages: list[Message], is_open: bool, thinking: bool) -> Json:
        return {
            "model": self.name,
            "messages": messages,
            "add_generation_prompt": is_open,
            "chat_template_kwargs": thinking_switch(thinking),
        }

    async def goes_on(
        self,
        prompt: ServedPrompt,
        said: ServedGeneration,
        tail: ServedPrompt,
        max_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        slot: int | None = None,
        num_top: int = NUM_TOP,
        is_complete: Callable[[list[ServedToken]], bool] = lambda _: False,
    ) -> ServedGeneration:
        """Returns what the LM says behind a prompt, what it has said, and a tail.

        Args:
            prompt: The prompt.
            said: What it has said, or a part of it from the start.
            tail: What stands behind that.
            max_tokens: The most tokens.
            temperature: That of sampling; 0 is greedy.
            seed: That of sampling.
            slot: Where to run, see `num_slots`.
            num_top: How many of the likeliest tokens are to be told in the place of each.
            is_complete: Tells whether nothing is wanted behind some tokens.

        Raises:
            InputError: If the server refuses, or ends what the LM says before it has to.
        """
        goes_on = self._dialect.continued(prompt, said.tokens, not said.num_hidden, tail)
        body: Json = {
            "model": self.name,
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **goes_on,
            **numbers_asked("messages" in goes_on, num_top),
            **self._dialect.sampled(temperature, seed),
            **self._dialect.told_fields(slot),
        }
        return await self.patiently(lambda: self._generated(body, is_complete))

    async def _generated(
        self, body: Json, is_complete: Callable[[list[ServedToken]], bool]
    ) -> ServedGeneration:
        path = _CHATS if "messages" in body else COMPLETIONS
        leg = await self._upstream.stream(path, body, [])
        try:
            if not leg.is_readable:
                raise await refusal(path, leg)
            return await read_generation(leg, body["max_tokens"], is_complete)
        finally:
            await leg.close()


class ServedTemplate:
    """The `lms.chat.ChatTemplate` of an LM behind a server.

    Args:
        lm: The LM.
        text: The template itself, or what it makes of a question; empty if there is none.
    """

    bos = ""
    """The server puts it first itself."""

    def __init__(self, lm: ServedLM, text: str) -> None:
        """Asks nothing yet."""
        self.text, self._lm = text, lm

    def render(self, messages: list[Message], is_open: bool, thinking: bool) -> str:
        """Returns the text of messages; see `lms.chat.ChatTemplate.render`.

        Raises:
            InputError: If the template refuses them.
        """
        return self._lm.run(self._lm.rendered(messages, is_open, thinking))

    def shown(self, text: str) -> str:
        """Returns what the tokens of a text spell, as far as the server tells.

        Some servers tell prompts as ids alone, and some tokenizers know few words.
        """
        ids = self._lm.run(self._lm.tokenized(text)).ids
        spelt = None if ids is None else self._lm.run(self._lm.spelt(ids))
        return text if spelt is None else spelt

    def own_token(self, text: str) -> int | None:
        """Returns the token that is a whole text, if there is one."""
        ids = self._lm.run(self._lm.tokenized(text)).ids
        return ids[0] if ids and len(ids) == 1 else None


async def _first_ended(tasks: Iterable[asyncio.Task[T]]) -> set[asyncio.Task[T]]:
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    return done


async def _cancelled(tasks: list[asyncio.Task[T]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
