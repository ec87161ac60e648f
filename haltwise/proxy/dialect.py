"""What each kind of server is asked for, and under which names: templates, tokens and facts."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from haltwise.proxy.upstream import Upstream
from haltwise.proxy.wire import Json, RawHeaders, ServedToken, UpstreamError

#: Statuses of a server that has no such path.
NO_SUCH_PATH = (404, 405, 501)
# Statuses of a server that renders no chats.
_NO_TEMPLATE = (400, 422, 500, *NO_SUCH_PATH)
_SAMPLE = {"messages": [{"role": "user", "content": "?"}], "add_generation_prompt": True}
# Samplers beside the temperature, as nearly all servers name them, when they do nothing.
_ALL_TOKENS: Json = {"top_p": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}


@dataclass(frozen=True)
class ServedPrompt:
    """A prompt or a part of one, with its tokens where the server tells them."""

    text: str
    """The text."""
    ids: list[int] | None = None
    """The ids of its tokens; None if they are unknown."""
    messages: list[Json] | None = None
    """The messages that it stands for, where a server takes no texts; None where it does."""


class ServerDialect:
    """How a server is asked of which nobody knows the kind: it takes texts alone.

    Args:
        upstream: The connections to it.
    """

    kind = "unknown"
    owner = ""
    """What its list of models names as the owner."""

    def __init__(self, upstream: Upstream) -> None:
        """Asks nothing yet."""
        self.upstream = upstream

    async def facts(self, headers: RawHeaders) -> Json:
        """What the server tells of itself that its tokens and their probabilities hang on.

        Raises:
            UpstreamError: If it does not answer.
        """
        return {"kind": self.kind}

    async def _told(self, path: str, headers: RawHeaders) -> Json:
        """What the server tells at a path; nothing if it has no such path."""
        try:
            return await self.upstream.call(path, None, headers)
        except UpstreamError as error:
            if error.answered not in NO_SUCH_PATH:
                raise
            return {}

    async def num_slots(self, headers: RawHeaders) -> int | None:
        """How many requests it runs at once; None if it does not tell."""
        return None

    async def context(self, headers: RawHeaders) -> int | None:
        """How many tokens prompt and answer can have together; None if it does not tell."""
        return None

    async def template(self, headers: RawHeaders) -> str:
        """Its chat template, or what that makes of a question; empty if it tells of none."""
        return ""

    async def rendered(self, asks: Json, headers: RawHeaders) -> str:
        """The text that the server's chat template makes of messages.

        Raises:
            UpstreamError: If the server does not tell.
        """
        raise UpstreamError("status", "this kind of server does not tell")

    async def prompt(self, asks: Json, headers: RawHeaders) -> ServedPrompt:
        """The prompt that the server's chat template makes of messages.

        Raises:
            UpstreamError: If the server does not tell.
        """
        return ServedPrompt(await self.rendered(asks, headers))

    async def tokenized(self, text: str, model: str, headers: RawHeaders) -> ServedPrompt:
        """A text that stands amid others, with its tokens if the server tells them.

        Raises:
            UpstreamError: If the server does not answer.
        """
        return ServedPrompt(text)

    async def spelt(self, ids: list[int], model: str | None, headers: RawHeaders) -> str | None:
        """The text that tokens spell; None if the server does not tell.

        Raises:
            UpstreamError: If the server does not answer.
        """
        return None

    def sampled(self, temperature: float, seed: int) -> Json:
        """Fields of a request whose tokens are sampled by temperature alone, at 0 the likeliest."""
        return _ALL_TOKENS | {"temperature": temperature, "seed": seed}

    def told_fields(self, slot: int | None) -> Json:
        """Fields of a completion that make the server tell all that it can of its tokens.

        Args:
            slot: Where it is to run, on a server that has slots.
        """
        return {}

    def ended_by(self, end: str) -> Json:
        """Fields of a request for an answer that make the server end it at a text by itself.

        Most servers are told by their connection, which is closed: they lose nothing by that.

        Args:
            end: The text; empty if there is none.
        """
        return {}

    def continued(
        self, prompt: ServedPrompt, said: Sequence[ServedToken], is_all: bool, tail: ServedPrompt
    ) -> Json:
        """Fields of a request that goes on from a prompt, tokens of its answer, and a tail.

        Args:
            prompt: The prompt.
            said: The tokens.
            is_all: Whether every token between the first and the last was shown.
            tail: What stands behind them.
        """
        return {"prompt": prompt.text + text_of(said) + tail.text}


class VllmDialect(ServerDialect):
    """vLLM: tells the ids of texts and of every token, and takes ids as a prompt."""

    kind = owner = "vllm"

    async def facts(self, headers: RawHeaders) -> Json:
        """The version and the model's origin; it tells of no quantisation.

        Raises:
            UpstreamError: If it does not answer.
        """
        models = await listed_models(self.upstream, headers)
        found: Json = {"kind": self.kind, "model": [str(m.get("root")) for m in models]}
        found["build"] = (await self._told("/version", headers)).get("version")
        return found | {"template": digest_of(await self.template(headers))}

    async def context(self, headers: RawHeaders) -> int | None:
        """As its list of models tells it.

        Raises:
            UpstreamError: If it does not answer.
        """
        lengths = [m.get("max_model_len") for m in await listed_models(self.upstream, headers)]
        return next((n for n in lengths if isinstance(n, int)), None)

    async def template(self, headers: RawHeaders) -> str:
        """What the template makes of a question: the server does not show the template itself."""
        try:
            return await self.rendered(_SAMPLE, headers)
        except UpstreamError as error:
            if error.answered not in _NO_TEMPLATE:
                raise
            return ""

    async def ids_of(self, asks: Json, headers: RawHeaders) -> list[int]:
        """The ids that the server makes of a prompt or of messages.

        Raises:
            UpstreamError: If the server does not tell.
        """
        found = (await self.upstream.call("/tokenize", asks, headers)).get("tokens")
        if not isinstance(found, list) or not all(isinstance(i, int) for i in found):
            raise UpstreamError("malformed", "upstream's /tokenize gave no ids")
        return found

    async def rendered(self, asks: Json, headers: RawHeaders) -> str:
        """The text that the template makes of messages, by way of its ids.

        Raises:
            UpstreamError: If the server does not tell.
        """
        return (await self.prompt(asks, headers)).text

    async def prompt(self, asks: Json, headers: RawHeaders) -> ServedPrompt:
        """The ids that the template makes of messages, and their text.

        Raises:
            UpstreamError: If the server does not tell.
        """
        ids = await self.ids_of(asks, headers)
        return ServedPrompt(await self.spelt(ids, asks.get("model"), headers), ids)

    async def tokenized(self, text: str, model: str, headers: RawHeaders) -> ServedPrompt:
        """A text with its tokens, none of which stands for the begin of a text.

        Raises:
            UpstreamError: If the server does not tell.
        """
        asks = {"model": model, "prompt": text, "add_special_tokens": False}
        return ServedPrompt(text, await self.ids_of(asks, headers))

    async def spelt(self, ids: list[int], model: str | None, headers: RawHeaders) -> str:
        """The text that tokens spell, special ones too.

        Raises:
            UpstreamError: If the server does not answer.
        """
        asks = {"tokens": ids} | ({} if model is None else {"model": model})
        found = await self.upstream.call("/detokenize", asks, headers)
        return str(found.get("prompt") or found.get("text") or "")

    def sampled(self, temperature: float, seed: int) -> Json:
        """Without what the LM's own generation config says beside."""
        own = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        return super().sampled(temperature, seed) | own

    def told_fields(self, slot: int | None) -> Json:
        """Asks for ids, and for the texts of special tokens: markers of a thought may be such."""
        return {"return_token_ids": True, "skip_special_tokens": False}

    def continued(
        self, prompt: ServedPrompt, said: Sequence[ServedToken], is_all: bool, tail: ServedPrompt
    ) -> Json:
        """Goes on from ids if all of them are known, else from text."""
        ids = ids_in(said) if is_all else None
        if prompt.ids is None or ids is None or tail.ids is None:
            return super().continued(prompt, said, is_all, tail)
        return {"prompt": [*prompt.ids, *ids, *tail.ids]}


class SglangDialect(VllmDialect):
    """SGLang: as vLLM, with other names for what it tells of itself."""

    kind = owner = "sglang"

    async def facts(self, headers: RawHeaders) -> Json:
        """The model's path and type of numbers, quantisation and version, as far as it tells them.

        Raises:
            UpstreamError: If it does not answer.
        """
        found = await super().facts(headers)
        told = await self._told("/get_server_info", headers)
        return found | {name: told.get(name) for name in ("quantization", "dtype", "version")}


class LlamaDialect(ServerDialect):
    """llama.cpp's server: takes texts and ids mixed, and tells of its slots and of its file."""

    kind = "llama-server"
    owner = "llamacpp"

    async def facts(self, headers: RawHeaders) -> Json:
        """The file's name and size, its quantisation, the template and the build.

        Raises:
            UpstreamError: If it does not answer.
        """
        props = await self.upstream.call("/props", None, headers)
        models = await listed_models(self.upstream, headers)
        meta = models[0].get("meta") if models else None
        return {
            "kind": self.kind,
            "model": str(props.get("model_path", "")).replace("\\", "/").rpartition("/")[2],
            "size": meta.get("size") if isinstance(meta, dict) else None,
            "quantisation": props.get("model_ftype"),
            "template": digest_of(str(props.get("chat_template", ""))),
            "build": props.get("build_info"),
        }

    async def num_slots(self, headers: RawHeaders) -> int | None:
        """As its properties tell it.

        Raises:
            UpstreamError: If it does not answer.
        """
        found = (await self.upstream.call("/props", None, headers)).get("total_slots")
        return found if isinstance(found, int) and found > 0 else None

    async def context(self, headers: RawHeaders) -> int | None:
        """That of a slot.

        Raises:
            UpstreamError: If it does not answer.
        """
        settings = (await self.upstream.call("/props", None, headers)).get(
            "default_generation_settings"
        )
        found = settings.get("n_ctx") if isinstance(settings, dict) else None
        return found if isinstance(found, int) and found > 0 else None

    async def template(self, headers: RawHeaders) -> str:
        """The template itself.

        Raises:
            UpstreamError: If it does not answer.
        """
        return str((await self.upstream.call("/props", None, headers)).get("chat_template") or "")

    async def rendered(self, asks: Json, headers: RawHeaders) -> str:
        """The text that the template makes of messages; the server has an endpoint for it.

        Raises:
            UpstreamError: If the server does not answer.
        """
        return str((await self.upstream.call("/apply-template", asks, headers)).get("prompt") or "")

    async def prompt(self, asks: Json, headers: RawHeaders) -> ServedPrompt:
        """That text, and its tokens as in a chat: with the one that begins a text, if any does.

        Raises:
            UpstreamError: If the server does not answer.
        """
        text = await self.rendered(asks, headers)
        return ServedPrompt(text, await self._ids_of(text, True, headers))

    async def tokenized(self, text: str, model: str, headers: RawHeaders) -> ServedPrompt:
        """A text with its tokens, none of which stands for the begin of a text.

        Raises:
            UpstreamError: If the server does not answer.
        """
        return ServedPrompt(text, await self._ids_of(text, False, headers))

    async def spelt(self, ids: list[int], model: str | None, headers: RawHeaders) -> str:
        """The text that tokens spell, special ones too.

        Raises:
            UpstreamError: If the server does not answer.
        """
        found = await self.upstream.call("/detokenize", {"tokens": ids}, headers)
        return str(found.get("content") or "")

    async def _ids_of(self, text: str, is_first: bool, headers: RawHeaders) -> list[int]:
        asks = {"content": text, "add_special": is_first, "parse_special": True}
        found = (await self.upstream.call("/tokenize", asks, headers)).get("tokens")
        if not isinstance(found, list) or not all(isinstance(i, int) for i in found):
            raise UpstreamError("malformed", "upstream's /tokenize gave no ids")
        return found

    def sampled(self, temperature: float, seed: int) -> Json:
        """With the one sampler."""
        return {"temperature": temperature, "seed": seed, "samplers": ["temperature"]}

    def told_fields(self, slot: int | None) -> Json:
        """Names the slot, whose cache then holds what the next request goes on from.

        Parts of characters have no chunk of their own: the tokens so far are told with each.
        """
        return {"timings_per_token": True} | ({} if slot is None else {"id_slot": slot})

    def ended_by(self, end: str) -> Json:
        """A stop text: the slot is free at once.

        One whose client has left goes on for some tokens. What is asked next runs in another slot
        then, which computes all that was said before anew.
        """
        return {"stop": [end]} if end else {}

    def continued(
        self, prompt: ServedPrompt, said: Sequence[ServedToken], is_all: bool, tail: ServedPrompt
    ) -> Json:
        """Goes on from ids, but from text where a character's parts were not shown."""
        if prompt.ids is None or tail.ids is None:
            return super().continued(prompt, said, is_all, tail)
        ids = ids_in(said) if is_all else None
        middle = [text_of(said)] if ids is None else ids
        return {"prompt": [*prompt.ids, *middle, *tail.ids]}


class OllamaDialect(ServerDialect):
    """Ollama: puts every prompt into a template, and goes on with the assistant's last message."""

    kind = "ollama"
    owner = "library"

    async def facts(self, headers: RawHeaders) -> Json:
        """The version, and the digest of each model, which holds weights, template and settings.

        Raises:
            UpstreamError: If it does not answer.
        """
        build = (await self._told("/api/version", headers)).get("version")
        models = (await self._told("/api/tags", headers)).get("models")
        found = [m for m in models if isinstance(m, dict)] if isinstance(models, list) else []
        digests = {str(m.get("name")): str(m.get("digest", ""))[:16] for m in found}
        return {"kind": self.kind, "build": build, "models": digests}

    async def template(self, headers: RawHeaders) -> str:
        """It has one, which nobody else can apply."""
        return "its own"

    async def rendered(self, asks: Json, headers: RawHeaders) -> str:
        """The texts of the messages, in place of what its template makes of them."""
        return "".join(f"{message['content']}\n" for message in asks["messages"])

    async def prompt(self, asks: Json, headers: RawHeaders) -> ServedPrompt:
        """The messages as they are."""
        return ServedPrompt(await self.rendered(asks, headers), messages=asks["messages"])

    def continued(
        self, prompt: ServedPrompt, said: Sequence[ServedToken], is_all: bool, tail: ServedPrompt
    ) -> Json:
        """Goes on with a message that the assistant has begun."""
        *before, last = prompt.messages or [{"role": "user", "content": prompt.text}]
        text = text_of(said) + tail.text
        if last["role"] == "assistant":
            last = last | {"content": last["content"] + text}
        elif text:
            before, last = [*before, last], {"role": "assistant", "content": text}
        return {"messages": [*before, last]}


_DIALECTS: list[type[ServerDialect]] = [VllmDialect, SglangDialect, OllamaDialect, LlamaDialect]


def dialect_of(kind: str, models: list[Json]) -> type[ServerDialect]:
    """The dialect of a kind of server.

    Args:
        kind: The kind that it is said to be; "auto" to see it in its models.
        models: Those that it lists.
    """
    owner = owner_of(models)
    found = (d for d in _DIALECTS if (d.owner == owner if kind == "auto" else d.kind == kind))
    return next(found, ServerDialect)


async def listed_models(upstream: Upstream, headers: RawHeaders) -> list[Json]:
    """The models that a server lists.

    Raises:
        UpstreamError: If it does not answer.
    """
    models = (await upstream.call("/v1/models", None, headers)).get("data")
    return [m for m in models if isinstance(m, dict)] if isinstance(models, list) else []


def owner_of(models: list[Json]) -> str:
    """Whom a server names as the owner of its models; empty if it names none."""
    return str(models[0].get("owned_by", "")) if models else ""


def text_of(said: Sequence[ServedToken]) -> str:
    """The text of tokens."""
    return "".join(token.text for token in said)


def ids_in(said: Sequence[ServedToken]) -> list[int] | None:
    """The ids of tokens; None if one is unknown."""
    ids = [token.id for token in said if token.id is not None]
    return ids if len(ids) == len(said) else None


def digest_of(text: str) -> str:
    """A short name of a long text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
