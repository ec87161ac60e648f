"""The proxy as an ASGI application: who is let in, what is watched, what is passed on."""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import anyio
import httpx2
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from haltwise import Control, HaltHead, InputError, Terms, ThoughtRequest
from haltwise.control.budgets import Budget, Budgets
from haltwise.control.governed import GovernedControl, Mode
from haltwise.control.installation import tell_if_readable
from haltwise.control.opening import KeptTraces, most_tokens_of, open_control
from haltwise.control.store import store_of
from haltwise.control.tariffs import Tariffs
from haltwise.control.telemetry import Telemetry
from haltwise.errors import what_failed
from haltwise.policy.head import NEVER_HALTS
from haltwise.proxy import aside
from haltwise.proxy.acceptance import Acceptance
from haltwise.proxy.auditor import Auditor
from haltwise.proxy.billing import Bill, BudgetFile, Cashier, read_budgets
from haltwise.proxy.budget_figures import BudgetFigures
from haltwise.proxy.client import (
    ClientGoneError,
    RefusedError,
    RequestingClient,
    check_browser,
)
from haltwise.proxy.client_terms import (
    TERMS,
    dollars_named,
    ignored,
    logged,
    named_by,
    terms_of,
    thoughts_named,
)
from haltwise.proxy.completion import Completion, CompletionSettings, WatchedCompletion
from haltwise.proxy.completion_request import CompletionRequest
from haltwise.proxy.config import (
    GOVERNED,
    MOST_TOKENS,
    APIKeys,
    Customer,
    ServeConfig,
    UpstreamConfig,
    digest_of,
    tenant_of,
)
from haltwise.proxy.control_figures import ControlFigures
from haltwise.proxy.dialect import dialect_of, listed_models
from haltwise.proxy.doubt import Doubts
from haltwise.proxy.large import TOOK_NOTHING, LargeLM, large_lm, served_head
from haltwise.proxy.lm_server import LMServer, find_lm_server
from haltwise.proxy.load import Load
from haltwise.proxy.metrics import Metrics, RequestRecord, log
from haltwise.proxy.operator import OperatorPages, shows_key
from haltwise.proxy.page import live_page
from haltwise.proxy.probe_trial import check_probes
from haltwise.proxy.probing import ProbeRoom
from haltwise.proxy.sampling import SamplingWatch
from haltwise.proxy.upstream import SharedQuestion, Upstream, UpstreamLeg
from haltwise.proxy.voted_completion import VotedCompletion
from haltwise.proxy.wire import (
    EVENT_STREAM,
    Json,
    RawHeaders,
    StreamEvent,
    UpstreamError,
    error_body,
)
from haltwise.session.control import ConstantControl, load_control
from haltwise.session.request import Spent
from haltwise.session.stream import check_served
from haltwise.session.thought import PointRules

_ENDPOINTS = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
_RESPONSES = "/v1/responses"
# Other endpoints whose LMs think.
_UNWATCHED = (_RESPONSES, "/v1/messages", "/v1/chat/completions", "/v1/completions")
# How paths end at which an LM has nothing to do.
_WITHOUT_LM = ("/tokenize", "/detokenize", "/count_tokens", "/input_tokens", "/control", "/cancel")
# What the clients are told whose answers are not whole when the proxy has to end.
_ENDING = RefusedError(503, "ending", "the proxy is told to end")
# Headers that are about one connection.
_HOP_BY_HOP = {
    *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te"),
    *(b"trailer", b"trailers", b"transfer-encoding", b"upgrade", b"proxy-connection"),
}
# Headers of a request that do not hold for the one that is sent on.
_OF_REQUESTS = {b"host", b"content-length", b"expect"}
# Seconds that a server may take to tell its context; then it counts as one that does not tell.
_CONTEXT_TIMEOUT = 5.0
# Seconds for which a store may take to tell a number.
_STORE_TAKES = 1.0
# Seconds for which the health of the upstream is believed.
_CHECK_LASTS = 1.0
# How an upstream fails that was never asked for anything.
_NEVER_ASKED = ("unreachable", "connect timeout")
# Seconds between two tries of probes on a server that did not answer at start.
_BETWEEN_TRIALS = 60.0
# Statuses that do not hang on what is asked for beside: who asks, and how many do.
_OF_CLIENTS_OR_LOAD = (401, 402, 403, 407, 408, 429, 502, 503, 504)
# Statuses of answers that have nothing to read.
_WITHOUT_BODY = (204, 205)
# Headers of an answer that do not hold for one that is written anew.
_OF_BODIES = {b"content-length", b"content-encoding", b"content-type"}


class Proxy:
    """The proxy as an ASGI endpoint, with everything that its requests share.

    Args:
        config: The settings.
        control: Sets terms and prices, in place of the one that the settings name.
        context: Most tokens that an answer can have, as `told_context` finds it; None if it did not
            ask.

    Raises:
        InputError: If a setting, the head or the file of keys cannot be used.
    """

    def __init__(
        self, config: ServeConfig, control: Control | None = None, context: int | None = None
    ) -> None:
        """Reads the head and the keys; the upstream is not asked for anything yet."""
        config.check()
        self.config = config
        self.metrics = Metrics()
        head = served_head(config)
        check_served(head)
        halting = head.config.halting
        halting.check_runnable()
        self._looks = halting.probing == "always"
        self._tariffs = _tariffs(config)
        self._default = Customer(config.terms(Terms.of_head(head.config)), config.value)
        self._terms = self._default.terms
        for told in _told_at_start(config, head, self._terms):
            log.warning(json.dumps({"warning": told}))
        self._keys = _keys(config, self._default)
        if config.keys is not None:
            tell_if_readable(config.keys)
        # What else may be refused comes before the state, which is made where it is not there.
        config.operator_key  # noqa: B018, asking for it checks it
        if config.budgets is not None:
            _budgets_in(config.budgets, config, self._tariffs)
        acceptance = Acceptance(config.check_answers)
        control = control or _control(config, head, self._keys, config.context or context)
        self.control = control if isinstance(control, GovernedControl) else None
        patience = config.read_timeout
        self._room = anyio.CapacityLimiter(config.max_streams)
        self._settings = CompletionSettings(
            head,
            control,
            self.metrics,
            config.shadow,
            patience,
            ProbeRoom(config.max_probes, lambda: self._room.borrowed_tokens),
            config.probe_timeout,
            config.answers == "seen",
            acceptance,
            large_lm(config),
            None
            if self.control is None
            else Auditor(self.control, self.metrics, patience, acceptance),
        )
        governed = self.control if config.follow_doubts else None
        self._doubts = None if governed is None else Doubts(governed.key)
        self.load = None if config.load_target is None else Load(config.load_target)
        self._watching: asyncio.Task[None] | None = None
        own = _own_budgets(self._keys)
        self.cashier = _cashier(config, own, self._tariffs, PointRules(halting), self.metrics)
        self.upstream = Upstream(config.connections)
        samples_answers = config.answers == "free"
        rules = PointRules(halting)
        self._unknown = LMServer(self.upstream, rules, halting.close_text, samples_answers)
        self._server = self._unknown
        self._finding = SharedQuestion(partial(find_lm_server, self._unknown, config.kind))
        self._checking = anyio.Lock()
        # Of probes, if they are still to be tried: when that may begin again, on the loop's clock.
        self._next_trial: float | None = None
        self._trial: asyncio.Task[None] | None = None
        self._checked, self._answered = -math.inf, False
        self._sampling = SamplingWatch(self.metrics)
        if self.control is not None and self.control.traces is not None:
            writer = self.control.traces.writer
            self.metrics.audit_traces_lost.set_function(lambda: writer.num_lost)
        self.metrics.streams_in_flight.set_function(lambda: self._room.borrowed_tokens)

    def reload(self) -> None:
        """Reads the head and the keys anew, and says how that went.

        Requests that run go on with what they have begun with; what cannot be used changes nothing.
        """
        try:
            self._reload()
        except (InputError, OSError) as error:
            log.warning(json.dumps({"warning": f"nothing is reloaded: {what_failed(error)}"}))
        else:
            told = {"reloaded": self._settings.head.digest, "price": self._terms.price}
            log.info(json.dumps(told))

    def _reload(self) -> None:
        head, before = served_head(self.config), self._settings.head
        check_served(head)
        if differs := head.config.halting.differs(before.config.halting):
            told = f"the head halts under other conditions: {differs}"
            raise InputError(f"{told}, or a process of its own")
        if self.control is not None and head.digest not in self.control.heads:
            raise InputError("the state is about the head before, expected a process of its own")
        config = self.config
        tariffs = _tariffs(config)
        file = None if config.budgets is None else _budgets_in(config.budgets, config, tariffs)
        default = Customer(config.terms(Terms.of_head(head.config)), config.value)
        keys = _keys(config, default)
        if self.control is not None and _targets(config, keys) != self.control.groups.targets:
            raise InputError("the state is about the targets before, expected a process of its own")
        self._keys = keys
        self._tariffs, self._default, self._terms = tariffs, default, default.terms
        if self.control is not None:
            self.control.reprice(default.terms)
        if self.cashier is not None and file is not None:
            self.cashier.replace(file, _own_budgets(self._keys), tariffs)
        self._settings = replace(self._settings, head=head)

    def try_upstream(self) -> None:
        """Tries whether the LM's server answers, and runs forced answers if the head looks at any.

        A server that does not answer yet is none to be refused, but a person is told.

        Raises:
            InputError: If forced answers do not run well there, and the settings do not say
                that this is no matter.
        """
        config = self.config
        trials = [(config.connections, self._try_probes if self._looks else _try_calls)]
        if config.large is not None:
            trials.append((config.large_connections, _try_calls))
        for connections, tried in trials:
            try:
                asyncio.run(_with_own(connections, tried))
            except UpstreamError as error:
                told = f"{connections.url} does not answer at start, it is asked again: {error}"
                log.warning(json.dumps({"warning": told}))
                if tried != _try_calls:
                    self._next_trial = -math.inf

    def _try_probes_late(self, server: LMServer, headers: RawHeaders) -> None:
        """Tries them beside the requests, where that could not be done at start."""
        if self._next_trial is not None and anyio.current_time() >= self._next_trial:
            self._next_trial = math.inf
            self._trial = asyncio.create_task(self._tried_late(server, headers))

    async def _tried_late(self, server: LMServer, headers: RawHeaders) -> None:
        """Says what probes take; while the server does not tell, it is asked again."""
        try:
            patience = self.config.probe_timeout
            await check_probes(server, patience, True, headers, self._takes_turns)
            self._next_trial = None
        except UpstreamError:
            self._next_trial = anyio.current_time() + _BETWEEN_TRIALS
        except Exception:
            log.exception("a defect of the proxy")

    async def _try_probes(self, upstream: Upstream) -> None:
        config = self.config
        unknown = LMServer(upstream, self._unknown.rules, self._unknown.close_text)
        server = await find_lm_server(unknown, config.kind, [])
        patience, anyway = config.probe_timeout, config.probe_anyway
        await check_probes(server, patience, anyway, [], self._takes_turns)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request under /v1, whatever happens on the way."""
        posts = scope["method"] == "POST"
        endpoint = _ENDPOINTS.get(scope["path"], "other") if posts else "other"
        record = RequestRecord(endpoint, self.metrics)
        client = RequestingClient(scope, receive, send, self.config.send_timeout, record)
        try:
            await self._answer(client)
        except RefusedError as error:
            record.outcome = error.kind
            await self._refuse(client, error, error.headers)
        except UpstreamError as error:
            record.note_error(error)
            await self._refuse(client, error, [])
        except ClientGoneError as error:
            record.outcome = str(error)
        except asyncio.CancelledError:  # the server is told to end, and has waited long enough
            record.outcome = "cut off"
            if not client.has_started:
                await self._refuse(client, _ENDING, [])
            with suppress(ClientGoneError):
                await client.finish()
            raise
        except Exception:
            log.exception("a defect of the proxy")
            record.outcome = "defect"
            await self._refuse(client, RefusedError(500, "defect", "the proxy failed"), [])
        finally:
            record.close()
        with suppress(ClientGoneError):
            await client.finish()

    async def _refuse(
        self, client: RequestingClient, error: RefusedError | UpstreamError, headers: RawHeaders
    ) -> None:
        """Answers with an error, or cuts an answer that has begun."""
        client.record.status = error.status
        with suppress(ClientGoneError):
            if client.has_started:
                await client.drop()
            else:
                await client.answer(error.status, error.body, headers)

    async def _answer(self, client: RequestingClient) -> None:
        """Answers a request if the client may ask it and there is room for it."""
        customer = self._let_in(client)
        if not self._room.available_tokens:
            message = f"{self._room.borrowed_tokens} requests run, there is no room for more"
            raise RefusedError(503, "busy", message, [(b"retry-after", b"1")])
        async with self._room:
            body = await client.body(self.config.max_body_bytes)
            async with client.attended():
                if client.record.endpoint == "other":
                    await self._answer_unwatched(client, body, customer)
                else:
                    await self._complete(client, body, customer)

    def _let_in(self, client: RequestingClient) -> Customer:
        """What holds for this client's requests.

        Raises:
            RefusedError: If the client may not ask at all, or not for this path.
        """
        if client.scope["method"] == "CONNECT":
            raise RefusedError(405, "method_not_allowed", "CONNECT is for proxies of another kind")
        parts = unquote(client.scope["path"]).replace("\\", "/").split("/")
        if "." in parts or ".." in parts:
            raise RefusedError(404, "not_found", "no such path")
        self._check_page(client)
        if self._keys is None or _is_preflight(client):
            return self._default
        customer = self._keys.customer_of(client.headers.get("authorization"))
        if customer is None:
            bearer = [(b"www-authenticate", b"Bearer")]
            raise RefusedError(401, "unauthorized", "expected a known API key", bearer)
        return customer

    def _check_page(self, client: RequestingClient) -> None:
        """Refuses what any page can make a browser ask for without asking whether it may.

        Raises:
            RefusedError: If this may be such a request.
        """
        headers = client.headers
        host, origin = headers.get("host", ""), headers.get("origin")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        is_foreign = origin is not None and origin.partition("//")[2] != host
        # A browser asks first for any other type, and before it shows a key.
        is_simple = kind != "application/json" and "authorization" not in headers
        if is_foreign and is_simple and client.scope["method"] == "POST":
            message = "expected application/json, or a key, from another site"
            raise RefusedError(415, "unsupported_media_type", message)
        check_browser(headers, self.config.lets_browsers_in_by)

    # Completions

    async def _complete(self, client: RequestingClient, body: bytes, customer: Customer) -> None:
        """Answers a request for a completion: watched if it can be halted, else passed on."""
        record, headers = client.record, _passed_headers(client)
        asked = await aside.read_object(body)
        if asked is None:
            raise RefusedError(400, "invalid_request_error", "expected a JSON object")
        request = CompletionRequest(record.endpoint == "chat", asked, headers)
        terms = terms_of(client, customer, self._tariffs, request.model)
        record.about = {"model": request.model[:100], **logged(terms)}
        num_thoughts = thoughts_named(client, self.config.most_thoughts)
        if num_thoughts > 1:
            request = replace(request, num_thoughts=num_thoughts)
            close_text = self._unknown.close_text
            is_large = aside.is_large(asked)
            _check_several(request, await aside.run(is_large, request.why_not_several, close_text))
        if terms.names_unknown_segment:
            self.metrics.unknown_segments.inc()
        large = self._settings.large
        may_ask = None if large is None or self.config.shadow else large.model_of(request)
        async with self._billed(client, body, asked, True, may_ask, num_thoughts) as bill:
            if bill is not None and bill.max_tokens is not None:
                request = request.limited(bill.max_tokens)
                body = await aside.encoded(request.body)
            await self._completed(client, body, request, terms, bill)

    async def _completed(
        self,
        client: RequestingClient,
        body: bytes,
        request: CompletionRequest,
        terms: Terms,
        bill: Bill | None,
    ) -> None:
        """Does so once it is known what the answer may cost."""
        record, headers = client.record, request.headers
        governed = self.control is not None and terms.is_named
        is_asked_only = governed or isinstance(self._settings.control, ConstantControl)
        off = is_asked_only and terms.price == 0 and terms.max_tokens is None
        is_large = aside.is_large(request.body)
        # Who has to know what it costs has to watch, and whoever may be answered by the large LM.
        uncounted = off and bill is None and self._reference is None and request.num_thoughts == 1
        why_not = "off" if uncounted else await aside.run(is_large, request.why_not_halted)
        if why_not is None:
            server = await self._find_server(headers)
            if server is not self._unknown:
                self._try_probes_late(server, _authorization(headers))
                recorded = self._settings.head.config.recording.get("temperature")
                record.about |= self._sampling.note(server.sampling, request.body, recorded)
            why_not = await aside.run(is_large, server.why_not_halted, request)
            why_not = why_not or self._why_unseen(server, request, terms)
            if request.num_thoughts > 1:
                _check_several(request, why_not)
        if why_not is None:
            about = self._about(client, request, terms, bill)
            if self._takes_turns:
                request = await server.in_turns(request) or request
            settings = self._serving(about)
            thought = ThoughtRequest(terms, about)
            completion = _completion(request, thought, server, settings, bill)
            try:
                why_not = await self._watch(client, completion)
            finally:
                if self._doubts is not None and not completion.has_answered:
                    self._doubts.forget(_session_of(thought.about))
                await completion.close()
        if why_not is not None:
            if bill is not None:
                bill.spent = None  # of the answer that follows
            told = self._why_not(why_not, record, ignored(terms))
            if not await self._refer(client, request, body, told, bill):
                await self._pass_on(client, body, told)

    @property
    def _takes_turns(self) -> bool:
        """Whether answers are forced in turn with thoughts, where a server does that well."""
        is_beside = self.config.probe_beside or self._settings.large is not None
        return self._looks and not is_beside

    @property
    def _reference(self) -> LargeLM | None:
        """The large LM, if a control measures against it; None if there is none."""
        large = self._settings.large
        return large if large is not None and large.is_reference else None

    def _serving(self, about: Json) -> CompletionSettings:
        """The settings of a completion that begins now, with the head that is to serve it.

        Args:
            about: What is known of it, to which the head is added.
        """
        if self.control is None:
            return self._settings
        about |= self.control.head_for(about)
        return replace(self._settings, head=self.control.heads[about["head"]])

    def _about(
        self,
        client: RequestingClient,
        request: CompletionRequest,
        terms: Terms,
        bill: Bill | None,
    ) -> Json:
        """What is known of a request beside its terms."""
        record, named = client.record, named_by(client)
        about: Json = {"endpoint": record.endpoint, "model": request.model, "id": record.id}
        about["tenant"] = tenant_of(client.headers.get("authorization"))
        about |= {name: named.get(name, "") for name in ("task", "session")}
        about |= {"user": request.user, "names_price": terms.is_named}
        if self._settings.large is not None:
            about["question"] = request.question  # of which a cascade decides
            about["unescalated"] = bill is not None and bill.is_unescalated
        if self._doubts is not None and about["session"]:
            about["doubted"] = self._doubts.sees(_session_of(about), request)
        urgent = [
            None if bill is None else bill.urgency,
            None if self.load is None else self.load.urgency,
        ]
        about["urgency"] = max((one for one in urgent if one is not None), default=None)
        return about

    @asynccontextmanager
    async def _billed(
        self,
        client: RequestingClient,
        body: bytes,
        asked: Json,
        is_watched: bool,
        large: str | None = None,
        num_thoughts: int = 1,
    ) -> AsyncIterator[Bill | None]:
        """Holds back what a request can cost for as long as its block runs, and settles its bill.

        Args:
            client: Asks.
            body: Its request.
            asked: What that says.
            is_watched: Whether its thought may be halted.
            large: The large LM that may be asked too; None if none may.
            num_thoughts: The most thoughts behind its answer.

        Raises:
            RefusedError: If a budget has not enough left.
        """
        named, record = named_by(client), client.record
        most = dollars_named("max-cost", named.get("max_cost"))
        if self.cashier is None:
            if most is not None:
                message = "X-Haltwise-Max-Cost is given, expected a proxy with --budgets"
                raise RefusedError(400, "invalid_request_error", message)
            yield None
            return
        tenant = tenant_of(client.headers.get("authorization"))
        session = f"{tenant} {digest_of(named['session'])}" if named.get("session") else ""
        path = client.scope["path"].rstrip("/")
        size, limit = self.cashier.size_of(
            path, len(body), asked, is_watched, self._looks, num_thoughts
        )
        bill = await self.cashier.open(
            record.id,
            {"tenant": tenant, "session": session},
            most,
            str(asked.get("model") or ""),
            size,
            limit,
            can_cut=is_watched,
            large=large,
        )
        if bill.max_tokens is not None:
            record.about["budget_max_tokens"] = bill.max_tokens
        try:
            yield bill
            bill.is_free = record.status is not None and record.status >= 400
        except RefusedError:
            bill.is_free = True
            raise
        except UpstreamError as error:
            was_asked = bill.spent is not None and bool(bill.spent.output_tokens)
            bill.is_free = error.kind in _NEVER_ASKED and not was_asked
            raise
        finally:
            await self.cashier.close(bill)

    def _why_unseen(self, server: LMServer, request: CompletionRequest, terms: Terms) -> str | None:
        """Why the head sees too little of a request, which no cap can end either; None if not."""
        if not server.shows_numbers(request):
            is_capped = terms.max_tokens is not None and request.num_top is None
            return None if is_capped else "tools"
        if self._looks and terms.max_tokens is None:
            return request.why_not_continued(server.close_text)
        return None

    async def _find_server(self, headers: RawHeaders) -> LMServer:
        """The LM's server, whose kind is asked for until it has told it."""
        if self._server is self._unknown:
            try:
                found = await self._finding.answer(headers)
            except UpstreamError as error:
                if error.kind not in ("status", "timeout"):
                    raise
                return self._unknown  # it may tell others, or later
            if self._server is self._unknown:
                self._server = found
                log.info(json.dumps({"upstream": found.kind}))
                await self._check_lm(found, headers)
        return self._server

    async def _check_lm(self, server: LMServer, headers: RawHeaders) -> None:
        """Warns if the server's LM is another than the head's, or is served otherwise."""
        config = self._settings.head.config
        if not server.is_of(config.lm):
            told = f"the head was trained for {config.lm}, the server has {', '.join(server.names)}"
            log.warning(json.dumps({"warning": told[:1000]}))
        if config.server:
            with suppress(UpstreamError):
                facts = await server.facts(headers)
                for name in config.server.keys() & facts.keys():
                    was, now = config.server[name], facts[name]
                    if was != now:
                        told = f"recorded from a server with {name} {was!r}, this one has {now!r}"
                        log.warning(json.dumps({"warning": f"the head was {told}"[:1000]}))

    async def _watch(self, client: RequestingClient, completion: Completion) -> str | None:
        """Answers with a watched completion.

        Returns:
            None once the client has its answer; if the upstream refuses, why it was not halted.
        """
        leg = await completion.open()
        status = leg.response.status_code
        if not leg.response.is_success and status not in _OF_CLIENTS_OR_LOAD:
            completion.release("refused")  # perhaps for what was asked for beside
            return "refused"
        if not leg.response.is_success or status in _WITHOUT_BODY:
            self._settings.probes.leave_alone(completion.request.headers, leg.wait)
            await self._relay(client, leg, [])
            return None
        if not leg.is_readable:
            raise UpstreamError("malformed", "upstream did not answer with a stream")
        headers = _without(leg.response.headers.raw, _OF_BODIES)
        if self.control is not None:
            headers.append((b"x-haltwise-request", client.record.id.encode()))
        try:
            if completion.request.streams:
                headers.append((b"content-type", _stream_type(leg)))
                async with aclosing(completion.events(leg)) as events:
                    pieces = (event.encode() async for event in events)
                    async with client.kept_alive() if completion.waits else nullcontext():
                        await self._send(client, 200, pieces, headers)
            else:
                answer = await completion.whole(leg)
                client.record.note_first()
                report = json.dumps(answer["usage"]["haltwise"]).encode()
                await client.answer(200, answer, [*headers, (b"x-haltwise", report)])
        finally:
            client.record.about |= completion.count()
        return None

    # Everything else

    async def _answer_unwatched(
        self, client: RequestingClient, body: bytes, customer: Customer
    ) -> None:
        """Passes on what nobody watches; of what may generate it says which terms do not hold."""
        path, record = client.scope["path"].rstrip("/"), client.record
        has_terms = any(name.startswith(TERMS) for name in client.headers)
        is_free = client.scope["method"] != "POST" or path.endswith(_WITHOUT_LM)
        if is_free or not (path in _UNWATCHED or has_terms or self.cashier is not None):
            await self._pass_on(client, body, [])
            return
        asked = await aside.read_object(body) or {} if self._tells_models else {}
        if not (path in _UNWATCHED or has_terms):
            async with self._billed(client, body, asked, is_watched=False):
                await self._pass_on(client, body, [])
            return
        model = str(asked.get("model") or "")
        terms = terms_of(client, customer, self._tariffs, model)
        if thoughts_named(client, self.config.most_thoughts) > 1:
            message = f"X-Haltwise-Thoughts is given, expected it at {' or '.join(_ENDPOINTS)}"
            raise RefusedError(400, "invalid_request_error", message)
        record.about = logged(terms)
        async with self._billed(client, body, asked, is_watched=False):
            leg = await self._capped(client, body, terms) if path == _RESPONSES else None
            if leg is None:
                leg = await self._open(client, body)
            else:
                terms = replace(terms, max_tokens=None)  # that holds
            try:
                await self._relay(client, leg, self._why_not("endpoint", record, ignored(terms)))
            finally:
                await leg.close()

    @property
    def _tells_models(self) -> bool:
        """Whether anything hangs on the LM that a request names."""
        return self._tariffs is not None or self.cashier is not None

    async def _capped(
        self, client: RequestingClient, body: bytes, terms: Terms
    ) -> UpstreamLeg | None:
        """The answer of a server that was told to close the thought at the cap itself.

        Returns:
            None if there is no cap, or no server that can or wants to.
        """
        if terms.max_tokens is None or self.config.shadow:
            return None
        server = await self._find_server(_passed_headers(client))
        asked = await aside.read_object(body) if server.caps_itself else None
        if asked is None:
            return None
        try:
            capped = await aside.encoded(server.capped_body(asked, terms.max_tokens))
        except RecursionError:  # it can be read, but not written
            return None
        leg = await self._open(client, capped)
        if leg.response.is_success or leg.response.status_code in _OF_CLIENTS_OR_LOAD:
            return leg
        await leg.close()
        return None

    def _why_not(
        self, reason: str, record: RequestRecord, ignored: Sequence[str] = ()
    ) -> RawHeaders:
        """Notes why a completion cannot be halted; returns the header that says it.

        Args:
            reason: Why.
            record: Where it is noted.
            ignored: The terms that do not hold for it.
        """
        record.outcome = "relayed"
        told: Json = {"reason": reason} | ({"ignored": [*ignored]} if ignored else {})
        record.about |= told
        self.metrics.thoughts.labels(reason).inc()
        for name in ignored:
            self.metrics.ignored_terms.labels(name).inc()
        return [(b"x-haltwise", json.dumps({"halted": False} | told).encode())]

    async def _refer(
        self,
        client: RequestingClient,
        request: CompletionRequest,
        body: bytes,
        more: RawHeaders,
        bill: Bill | None,
    ) -> bool:
        """Lets the large LM answer what nobody watches, where a control measures against it.

        Args:
            client: Gets its answer.
            request: What is asked.
            body: The same as bytes.
            more: Headers that the answer has beside its own.
            bill: What is held back for it; None if nobody wants to know what it costs.

        Returns:
            Whether it does.
        """
        large = self._reference
        if large is None or (bill is not None and bill.is_unescalated):
            return False
        try:
            renamed = large.renamed(request.body)
            body = body if renamed == request.body else await aside.encoded(renamed)
            leg = await self._open(client, body, large.upstream)
        except UpstreamError as error:
            if bill is not None and error.kind not in TOOK_NOTHING:
                bill.leave_to_large()
            return False
        except RecursionError:  # what is nested deeply cannot be written
            return False
        try:
            if leg.response.is_success:
                if bill is not None:
                    bill.leave_to_large()
                    bill.count(Spent(input_tokens=0, output_tokens=0), 0)
                await self._relay(client, leg, more)
            return leg.response.is_success
        finally:
            await leg.close()

    async def _pass_on(self, client: RequestingClient, body: bytes, headers: RawHeaders) -> None:
        """Passes a request on as it is, and the answer back with some headers more."""
        leg = await self._open(client, body)
        try:
            await self._relay(client, leg, headers)
        finally:
            await leg.close()

    async def _open(
        self, client: RequestingClient, body: bytes, upstream: Upstream | None = None
    ) -> UpstreamLeg:
        """Asks a server as a client has asked, with a body that may be another one.

        Args:
            client: Asks.
            body: The body.
            upstream: Where the server is; by default the LM's own.

        Raises:
            RefusedError: If there can be no such path.
            UpstreamError: If no answer comes.
        """
        scope = client.scope
        query = scope["query_string"]
        target = scope["raw_path"] + (b"?" + query if query else b"")
        passed = _passed_headers(client)
        try:
            server = upstream or self.upstream
            return await server.open(scope["method"], target, passed, body)
        except httpx2.InvalidURL:
            raise RefusedError(404, "not_found", "no such path") from None

    async def _relay(self, client: RequestingClient, leg: UpstreamLeg, more: RawHeaders) -> None:
        """Passes an answer back as it is, with some headers more."""
        if leg.response.status_code >= 500:
            self.metrics.upstream_errors.labels("status").inc()
        told = leg.response.headers
        # What has both is as long as its pieces; and a stream that breaks off gets an end.
        is_open = "transfer-encoding" in told or _is_stream(_type_of(leg))
        dropped = {b"content-length"} if is_open else set[bytes]()
        headers = [*_without(told.raw, dropped), *more]
        async with aclosing(leg.pieces()) as pieces:
            await self._send(client, leg.response.status_code, pieces, headers)

    async def _send(
        self,
        client: RequestingClient,
        status: int,
        pieces: AsyncIterator[bytes],
        headers: RawHeaders,
    ) -> None:
        """Sends an answer piece by piece; a stream that breaks off ends in an event that says so.

        Args:
            client: Gets it.
            status: Its status.
            pieces: Its body.
            headers: Its headers.

        Raises:
            ClientGoneError: If the client has left, or does not read.
            UpstreamError: If it breaks off and is no stream.
        """
        await client.start(status, headers)
        end = b""
        try:
            async for data in pieces:
                client.record.note_first()
                await client.send(data)
                end = (end + data)[-2:]
        except (UpstreamError, asyncio.CancelledError) as error:
            is_stream = any(name == b"content-type" and _is_stream(kind) for name, kind in headers)
            gap = b"" if end in (b"", b"\n\n") else b"\n\n"
            if isinstance(error, asyncio.CancelledError):
                if is_stream and not client.is_gone:
                    await client.send(gap + StreamEvent(chunk=_ENDING.body).encode())
                raise
            if not is_stream:
                raise
            client.record.note_error(error)
            await client.send(gap + StreamEvent(chunk=error.body).encode())

    # About the proxy itself

    async def health(self, request: Request) -> Response:
        """Tells whether the upstream answers, with status 503 if it does not."""
        answers = await self._upstream_answers()
        health = {
            "status": "ok" if answers else "upstream unreachable",
            "upstream": "ok" if answers else "unreachable",
            "kind": self.config.kind if self._server is self._unknown else self._server.kind,
            "streams_in_flight": self._room.borrowed_tokens,
        }
        return JSONResponse(health, 200 if answers else 503)

    async def _upstream_answers(self) -> bool:
        """Whether the upstream answers, or did a moment ago."""
        async with self._checking:
            if anyio.current_time() < self._checked + _CHECK_LASTS:
                return self._answered
            self._answered = False
            with anyio.move_on_after(self.config.connect_timeout):
                try:
                    await self.upstream.call("/v1/models", None, [])
                    self._answered = True
                except UpstreamError as error:
                    self._answered = error.kind == "status"
            self._checked = anyio.current_time()
            return self._answered

    def begin(self) -> None:
        """Begins to watch the server's load, if that matters, on the loop that runs."""
        if self.load is not None:
            self._watching = asyncio.create_task(self.load.watch(self.upstream))
            self.metrics.load_urgency.set_function(lambda: self.load.urgency if self.load else 0)

    async def close(self) -> None:
        """Ends the audits, writes what the control knows, and closes all connections."""
        for task in (self._trial, self._watching):
            if task is not None:
                task.cancel()
                await asyncio.wait((task,))
        if self._settings.auditor is not None:
            await self._settings.auditor.close()
        if self.control is not None:
            self.control.close()
        if self.cashier is not None:
            self.cashier.budgets.close()
        await self.upstream.close()
        if self._settings.large is not None:
            await self._settings.large.upstream.close()

    async def tell_metrics(self, request: Request) -> Response:
        """Tells the metrics in the form that Prometheus reads."""
        content = generate_latest(self.metrics.registry)
        if self.control is not None:
            shows_all = shows_key(request, self.config.operator_key)
            content += generate_latest(ControlFigures(self.control, shows_all))
        if self.cashier is not None:
            # The store is asked; if it is away, all else is told.
            figures = BudgetFigures(self.cashier)
            with anyio.move_on_after(_STORE_TAKES):
                content += await anyio.to_thread.run_sync(
                    generate_latest, figures, abandon_on_cancel=True
                )
        return Response(content, headers={"content-type": CONTENT_TYPE_LATEST})


def create_app(config: ServeConfig, control: Control | None = None) -> Starlette:
    """The proxy with its pages about itself, for any ASGI server.

    Args:
        config: The settings.
        control: Sets terms and prices, in place of the one that the settings name.

    Raises:
        InputError: If a setting, the head or the file of keys cannot be used.
    """
    return app_of(Proxy(config, control))


def app_of(proxy: Proxy) -> Starlette:
    """A proxy with its pages about itself, for any ASGI server."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        proxy.begin()
        yield
        await proxy.close()

    routes = [
        Route("/health", proxy.health),
        Route("/metrics", proxy.tell_metrics),
        Route("/haltwise", live_page),
        *OperatorPages(
            proxy.config.control,
            proxy.control,
            proxy.config.operator_key,
            proxy.config.lets_browsers_in_by,
            proxy.cashier,
            proxy.load,
        ).routes,
        Route("/v1/{path:path}", proxy),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={404: _tell_path})


def _tell_path(request: Request, _: Exception) -> Response:
    """Says what is expected to whom asks for a path that is not there, mostly one without /v1."""
    told = (
        f"no such path, {request.url.path!r:.80}: expected one that begins with /v1, such as "
        "/v1/chat/completions"
    )
    return JSONResponse(error_body(told, "not_found"), 404)


def _is_stream(content_type: bytes) -> bool:
    return content_type.strip().lower().startswith(EVENT_STREAM.encode())


def _type_of(leg: UpstreamLeg) -> bytes:
    """The content type of a leg; empty if it tells none."""
    return str(leg.response.headers.get("content-type", "")).encode("utf-8", "replace")


def _stream_type(leg: UpstreamLeg) -> bytes:
    """The content type of a leg, if it is one of streams, as all that are watched become."""
    own = _type_of(leg)
    return own if _is_stream(own) else f"{EVENT_STREAM}; charset=utf-8".encode()


def _is_preflight(client: RequestingClient) -> bool:
    """Whether a browser asks what its page may ask for: it never shows a key then."""
    asks = client.headers.get("access-control-request-method")
    return client.scope["method"] == "OPTIONS" and asks is not None


def _completion(
    request: CompletionRequest,
    thought: ThoughtRequest,
    server: LMServer,
    settings: CompletionSettings,
    bill: Bill | None,
) -> Completion:
    """What a request is answered with: one thought, or what most of several give."""

    def begin(request: CompletionRequest, bill: Bill | None) -> WatchedCompletion:
        return WatchedCompletion(request, thought, server, settings, bill)

    if request.num_thoughts == 1:
        return begin(request, bill)
    return VotedCompletion(request, begin, settings.metrics, bill)


def _check_several(request: CompletionRequest, why_not: str | None) -> None:
    """Refuses several thoughts of a request of which one cannot be watched.

    Args:
        request: The request.
        why_not: Why it cannot; None if it can.

    Raises:
        RefusedError: If it cannot.
    """
    if why_not is not None:
        found = f"X-Haltwise-Thoughts is {request.num_thoughts}"
        message = f"{found}, expected 1 for a request with this: {why_not}"
        raise RefusedError(400, "invalid_request_error", message)


def _control(
    config: ServeConfig, head: HaltHead, keys: APIKeys | None, context: int | None
) -> Control:
    """The control that the settings name.

    Args:
        config: The settings.
        head: The head that is to serve.
        keys: The API keys that are let in.
        context: Most tokens that an answer can have; None if nobody has told.

    Raises:
        InputError: If there is none of that name, or its state cannot be used.
    """
    if config.control == "off":
        return ConstantControl()
    if config.state is None:
        return load_control(config.control)
    usual = config.terms(Terms.of_head(head.config))
    mode: Mode = "apply" if config.control == "apply" else "observe"
    control = open_control(
        head,
        mode,
        config.state,
        config.target,
        config.audit,
        usual,
        context or MOST_TOKENS,
        3600 * config.label_hours,
        _kept(config),
        config.state_key,
        Telemetry() if config.telemetry else None,
        [_challenger(path, head) for path in config.challenger],
        config.promotion,
        config.explore,
        _targets(config, keys),
        config.replay_all,
        86_400 * config.keep_days,
    )
    if context is not None:
        _tell_of_other_range(control, context)
    return control


def _tell_of_other_range(control: GovernedControl, context: int) -> None:
    """Warns of a state that was made for other answers, whose range is what holds.

    Args:
        control: Has opened the state.
        context: Most tokens of an answer that a new one would be made for.
    """
    made, now = control.keeper.library.books.most_tokens, most_tokens_of(control.head, context)
    if made == now:
        return
    does = "longer requests are left out of losses and savings"
    if made > now:
        does = f"intervals of savings are {made / now:.3g} times as wide as they would be there"
    told = f"the state was made for requests of up to {made:.0f} tokens, a new one would be for"
    log.warning(json.dumps({"warning": f"{told} {now:.0f}: {does}"}))


def told_context(config: ServeConfig) -> int | None:
    """Asks the servers how many tokens an answer can have, where it matters and nobody says it.

    Returns:
        The largest context of all LMs, and `MOST_TOKENS` at most; None if a server does not tell.
    """
    if config.control not in GOVERNED or config.context is not None:
        return None
    asked = [(config.connections, config.kind)]
    asked += [] if config.large is None else [(config.large_connections, "auto")]
    found: list[int] = []

    async def ask(kind: str, upstream: Upstream) -> None:
        with anyio.move_on_after(_CONTEXT_TIMEOUT), suppress(UpstreamError):
            models = await listed_models(upstream, [])
            context = await dialect_of(kind, models)(upstream).context([])
            found.extend([] if context is None else [context])

    for connections, kind in asked:
        asyncio.run(_with_own(connections, partial(ask, kind)))
    return min(max(found), MOST_TOKENS) if len(found) == len(asked) else None


def _told_at_start(config: ServeConfig, head: HaltHead, usual: Terms) -> list[str]:
    """Returns what an operator would else find out late, a line each."""
    told = [NEVER_HALTS] if usual.price == 0 else []
    if config.label_hours and config.operator_key_env is None:
        told.append(
            "--label-hours waits for labels, which nobody can tell without --operator-key-env: all "
            "audits whose answers differ count as lost"
        )
    certificate = head.config.certificate
    promised = 0.0 if certificate is None else certificate.max_em_drop
    if config.control == "apply" and promised > config.target:
        told.append(
            f"the head's certificate promises {promised:g}, which is more than --target "
            f"{config.target:g}: audits have to vouch for a price, and until then nothing is halted"
        )
    segments = ", ".join(sorted(head.config.segment_prices))
    if segments and not usual.segment_prices and config.control != "apply":
        told.append(
            f"--price {usual.price:g} is that of all requests that name none: the head's prices of "
            f"segments ({segments}) are not served"
        )
    if config.control == "apply" and usual.segment_prices:
        told.append(
            f"segments ({segments}) have prices of their own, which --control apply goes beyond: "
            "audits vouch for all requests together, and for a segment by itself with "
            "--group-target segment:NAME=TARGET"
        )
    return told


async def _with_own(
    connections: UpstreamConfig, tried: Callable[[Upstream], Awaitable[None]]
) -> None:
    """Tries something on a server, by connections of its own: they belong to one event loop."""
    upstream = Upstream(connections)
    try:
        await tried(upstream)
    finally:
        await upstream.close()


async def _try_calls(upstream: Upstream) -> None:
    """Tries whether a server answers anything: whatever status it does it with.

    Raises:
        UpstreamError: If it does not.
    """
    try:
        await upstream.call("/v1/models", None, [])
    except UpstreamError as error:
        if error.kind != "status":
            raise


def _tariffs(config: ServeConfig) -> Tariffs | None:
    """What tokens cost, if the settings tell.

    Raises:
        InputError: If their file cannot be used, or does not know the large LM.
    """
    if config.tariffs is None:
        return None
    found = Tariffs(config.tariffs)
    if config.large_model is not None and found.of(config.large_model) is None:
        told = f"--large-model is {config.large_model!r:.60}"
        raise InputError(f"{told}, expected a tariff of it in --tariffs {config.tariffs}")
    return found


def _targets(config: ServeConfig, keys: APIKeys | None) -> dict[str, float]:
    """The targets that groups have of their own.

    Raises:
        InputError: If a group has two.
    """
    named, own = config.group_targets, {} if keys is None else keys.targets
    for name in named.keys() & own.keys():
        raise InputError(f"--keys: {config.keys}: {name} has a --group-target too, expected one")
    return named | own


def _challenger(path: Path, head: HaltHead) -> HaltHead:
    """A head that may serve in the place of another one.

    Raises:
        InputError: If it cannot be used, or halts under other conditions.
    """
    found = HaltHead.load(path)
    check_served(found)
    if differs := found.config.halting.differs(head.config.halting):
        raise InputError(f"--challenger {path} halts under other conditions than --head: {differs}")
    return found


def _kept(config: ServeConfig) -> KeptTraces | None:
    """Which audits the settings keep as traces."""
    if config.audit_traces is None or not config.dense_audits:
        return None
    return KeptTraces(config.audit_traces, config.dense_audits, config.audit_content)


def _keys(config: ServeConfig, default: Customer) -> APIKeys | None:
    """The API keys that are let in; None if everybody is.

    Raises:
        InputError: If their file cannot be used, or needs what the settings do not have.
    """
    if config.keys is None:
        return None
    keys = APIKeys(config.keys, default)
    if "value" in keys.need and config.tariffs is None:
        raise InputError(f"--keys: {config.keys}: an entry has a value, expected --tariffs")
    if "budget" in keys.need and config.budgets is None:
        raise InputError(f"--keys: {config.keys}: an entry has a budget, expected --budgets")
    if "target" in keys.need and config.control not in GOVERNED:
        expected = "expected --control observe or apply"
        raise InputError(f"--keys: {config.keys}: an entry has a target, {expected}")
    for own in keys.budgets.values():
        if own.nano is not None and config.tariffs is None:
            raise InputError(f"--keys: {config.keys}: dollars are given, expected --tariffs")
        if own.requests is not None:
            _check_pacing(config, f"--keys: {config.keys}")
    return keys


def _budgets_in(path: Path, config: ServeConfig, tariffs: Tariffs | None) -> BudgetFile:
    """What everybody may spend.

    Raises:
        InputError: If the file makes no sense, or needs what the settings do not have.
    """
    file = read_budgets(path, tariffs)
    if file.paces:
        _check_pacing(config, f"budgets {path}")
    return file


def _check_pacing(config: ServeConfig, source: str) -> None:
    """Refuses a budget whose spending nobody can pace.

    Raises:
        InputError: If nobody can.
    """
    if config.control != "apply":
        told = "requests are given, expected --control apply: prices are paced inside certificates"
        raise InputError(f"{source}: {told}")


def _own_budgets(keys: APIKeys | None) -> Mapping[str, Budget]:
    """The budgets that tenants have for themselves."""
    return {} if keys is None else keys.budgets


def _cashier(
    config: ServeConfig,
    own: Mapping[str, Budget],
    tariffs: Tariffs | None,
    rules: PointRules,
    metrics: Metrics,
) -> Cashier | None:
    """Holds back what requests may spend; None if they may spend anything.

    Raises:
        InputError: If the budgets or their state cannot be used.
    """
    if config.budgets is None or config.state is None:
        return None
    file = _budgets_in(config.budgets, config, tariffs)
    budgets = Budgets(store_of(config.state))
    return Cashier(budgets, file, own, tariffs, rules, config.context or MOST_TOKENS, metrics)


def _session_of(about: Mapping[str, Any]) -> str:
    """The name of a request's session, which no other tenant's has."""
    return f"{about['tenant']} {about['session']}"


def _authorization(headers: RawHeaders) -> RawHeaders:
    """The header with the key that a client asks with, if it has any."""
    return [pair for pair in headers if pair[0] == b"authorization"]


def _passed_headers(client: RequestingClient) -> RawHeaders:
    """The headers of a client that go on to the upstream: all but those that are the proxy's."""
    headers = _without(client.headers.raw, _OF_REQUESTS)
    return [pair for pair in headers if not pair[0].startswith(TERMS.encode())]


def _without(headers: RawHeaders, names: set[bytes]) -> RawHeaders:
    """Headers with lower-case names, less some, and less those of one connection only."""
    found = [(name.lower(), value) for name, value in headers]
    own = {n.strip() for name, v in found if name == b"connection" for n in v.lower().split(b",")}
    dropped = names | _HOP_BY_HOP | own
    return [(name, value) for name, value in found if name not in dropped]
