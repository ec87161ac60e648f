"""What `haltwise serve` is told: its settings, and the file of API keys."""

import hashlib
import ipaddress
import json
import math
import os
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import tyro

from haltwise import InputError, Terms
from haltwise.control.budgets import Budget
from haltwise.control.group_names import TENANT, whole_tenant
from haltwise.control.store import is_database
from haltwise.control.targets import read_targets
from haltwise.errors import check_ranges, option, what_failed

# The end of a Host header that names a port.
_PORT = re.compile(r"^[^:\[]*:\d*$|^\[[^\]]*\]:\d*$")

# The group of a tenant, which is named by a digest.
_TENANT_GROUP = re.compile(f"{TENANT}[0-9a-f]{{16}}")

# Requests that no process serves at a time; the pools for them alone would take minutes.
_MOST = 100_000

# Thoughts of one request at most: each is told of in a header.
_MOST_THOUGHTS = 32

#: The controls that have a state.
GOVERNED = ("observe", "apply")

# Settings that mean something to these controls alone.
_OF_GOVERNED = (
    "challenger", "promotion", "target", "group_target", "audit", "state_key", "label_hours",
    "keep_days", "audit_traces", "dense_audits", "telemetry", "replay_all",
)  # fmt: skip

# Settings that mean nothing to a control of a cascade.
_NOT_BESIDE_BOTH = ("shadow", "challenger", "promotion", "audit_traces", "replay_all")

# What an entry of the file of keys may have.
_OF_ENTRIES = (
    "price", "value", "min_tokens", "max_tokens", "off", "segment", "budget", "target",
)  # fmt: skip

#: Most tokens that an answer is taken to have, unless settings or server tell another number.
MOST_TOKENS = 32_768

ServerKind = Literal["auto", "llama-server", "vllm", "sglang", "ollama"]
Answers = Literal["seen", "free"]


@dataclass(frozen=True)
class UpstreamConfig:
    """Where the LM's own server is, and how it is asked."""

    address: str
    """Its address."""
    key_env: str | None = None
    """Environment variable with its API key; None if it wants none, or each client's own."""
    max_streams: int = 1000
    """Most requests at a time."""
    connect_timeout: float = 15.0
    """Seconds to reach it."""
    read_timeout: float = 300.0
    """Seconds that it may be silent."""

    @property
    def url(self) -> str:
        """Its address without the "/v1" that OpenAI clients have at the end of theirs.

        Raises:
            InputError: If it is no HTTP address.
        """
        try:
            parts = urlsplit(self.address)
            is_http = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            is_http = False
        if not is_http or parts.query:
            raise InputError(f"server is {self.address!r}, expected like http://127.0.0.1:8080")
        return self.address.rstrip("/").removesuffix("/v1")

    @property
    def key(self) -> str | None:
        """The API key that it gets in place of clients' own.

        Raises:
            InputError: If its environment variable is not set.
        """
        return None if self.key_env is None else _key_in(self.key_env)


@dataclass(frozen=True)
class ServeConfig:
    """Stands between OpenAI clients and the server of an LM, and halts the LM's thoughts."""

    head: Path
    """Folder of a head, which may see forced answers, log probabilities and text."""
    upstream: str = "http://127.0.0.1:8080"
    """Address of the LM's own server."""
    kind: ServerKind = "auto"
    """Kind of that server; auto asks it."""
    host: str = "127.0.0.1"
    """Address to listen at; another one than loopback is open to the network."""
    allowed_hosts: tuple[str, ...] = ()
    """Names beside those of loopback by which browsers may ask a proxy that listens there."""
    port: int = 8700
    """Port to listen at; 0 takes any free one."""
    share_port: bool = False
    """Let other processes of the same user, started alike, listen at the same port."""
    price: float | None = None
    """Price of requests that name none, in exact match per 1,000 tokens; default the head's own."""
    min_thinking_tokens: int = 0
    """Thinking tokens before which the head halts no thought."""
    max_thinking_tokens: int | None = None
    """Thinking tokens at which every thought is closed, whatever the head says."""
    large: str | None = None
    """Address of the server of a large LM, for a --head that is a cascade: requests that the small
    LM cannot answer are left to it."""
    large_model: str | None = None
    """Name of the large LM there; default: the one that the client names."""
    large_key_env: str | None = None
    """Environment variable with the API key of that server; default: each client's own."""
    control: str = "off"
    """off; observe, to learn by audits what each price loses and saves; apply, to serve the price
    that they certify; or MODULE:NAME of a class that sets terms, see haltwise.Control."""
    challenger: tuple[Path, ...] = ()
    """Folders of other heads, which replay all audits of the control and may be promoted."""
    promotion: Literal["ask", "auto"] = "ask"
    """Whether a challenger that is known to be better waits for `haltwise promote`, or begins to
    serve by itself: 1, 5 and 25 % of all requests, and at last all."""
    target: float = 0.02
    """Mean loss that the control keeps to: 0.02 is two of 100 answers."""
    group_target: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=TARGET, any number of times: a mean loss of its own, no larger than that, for a group as
    the status names it, such as task:math=0.01. Its requests are not halted before their own audits
    vouch for that."""
    audit: float = 0.05
    """Share of requests that are answered in full for that, and half of it from 2,000 audits on; 0,
    to observe alone, for none."""
    state: str | Path | None = None
    """File in which the control keeps what it knows, made if it is not there; or postgresql://...,
    for proxies on several machines."""
    state_key: Path | None = None
    """File with the key of that state, made if it is not there; default FILE.key. All proxies of a
    state need the same."""
    context: int | None = None
    """Most tokens that an answer can have. A control leaves longer ones out of losses and savings,
    and its intervals of savings are the wider, the more that is; by default it takes the server's
    context as that is when the state is made, 32768 at most. Budgets take 32768 by default."""
    explore: float = 0.0
    """Share of the requests that name no price and are served the next stricter one, drawn and
    recorded with its probability: what a step of the price changes is seen on served requests."""
    replay_all: bool = False
    """Replay every request at all prices, not audits alone, which takes time at every decision
    point: then `haltwise experiment --prices` tells from all of them what prices would spend."""
    follow_doubts: bool = False
    """Take it for a bad score of a session (X-Haltwise-Session) if it asks the same again, or
    whether the LM is sure: its next requests are halted later. Needs --control apply."""
    label_hours: float = 0.0
    """Hours for which right answers of audits are waited for; 0 counts differing ones as lost."""
    keep_days: float = 365.0
    """Days for which the state keeps rows of requests, answers and labels; inf keeps them for good.
    What the audits have told is in the books, which lose nothing."""
    audit_traces: Path | None = None
    """Folder to write dense audits into, as lines that collect.py --json-lines makes traces of."""
    dense_audits: float = 0.1
    """Share of the audits that are dense: their answers are asked for at every decision point. It
    counts with --audit-traces alone; 0 turns it off."""
    audit_content: bool = False
    """Write questions, answers and thoughts into those traces as they are; default digests."""
    telemetry: bool = False
    """Send the control's requests to OpenTelemetry, by OTLP; OTEL_EXPORTER_OTLP_ENDPOINT and its
    like say where to."""
    operator_key_env: str | None = None
    """Environment variable with the key that /v1/haltwise wants; default everybody may read it."""
    load_target: int | None = None
    """Requests that may wait at the server: while more do, prices rise inside the certificate.
    Needs --control apply."""
    shadow: bool = False
    """Decide, log and count, but halt nothing."""
    most_thoughts: int = 1
    """Most thoughts that a request may ask for by X-Haltwise-Thoughts; it gets the answer that most
    of them give."""
    answers: Answers = "seen"
    """What follows a thought that was halted. seen: the answer that the head has seen, if it looks
    at answers and that one is whole; else the LM's likeliest answer, whatever the request samples
    by: such answers were recorded and certified. free: what the LM answers as the request samples,
    which loses more than the certificate says at temperatures above 0."""
    check_answers: str = "off"
    """readable or MODULE:NAME: the answer behind a thought that the head has halted is held back
    until it is whole. If the head's answer rule cannot read it, or that function of the request's
    body and the answer's text refuses it, the thought goes on to its end. off: it is given."""
    probe_beside: bool = False
    """Force answers beside the thought, which goes on meanwhile, on llama-server too; there they
    are forced in turn with the thought otherwise, in its slot."""
    max_probes: int = 64
    """Most answers that are forced at a time; beyond, decision points are passed."""
    probe_timeout: float = 5.0
    """Seconds that a forced answer may take; later it halts nothing."""
    probe_anyway: bool = False
    """Start even if forced answers do not run well beside a thought on this server."""
    keys: Path | None = None
    """JSON file {"API KEY": {"price": 0.5, "max_tokens": 2000}, ...}; no other key is let in."""
    tariffs: Path | None = None
    """JSON file with what tokens cost: {"unit": "dollars per 1,000,000 tokens", "models": {"LM":
    {"input": 0.55, "cached": 0.14, "output": 2.19}, ...}}."""
    value: float | None = None
    """Dollars that a right answer is worth, which with the tariffs is the price of requests that
    name none."""
    budgets: Path | None = None
    """JSON file with what may be spent: {"everything": {"dollars": 500, "hours": 24}, "tenant":
    {...}, "session": {...}, "request": {...}}; needs --state."""
    upstream_key_env: str | None = None
    """Environment variable with the upstream's API key; default each client's own is passed on."""
    max_streams: int = 1000
    """Most requests at a time; clients that send more are told to come back."""
    max_body_bytes: int = 16 * 2**20
    """Largest size of a request's body."""
    connect_timeout: float = 15.0
    """Seconds to reach the upstream."""
    read_timeout: float = 300.0
    """Seconds that the upstream may be silent."""
    send_timeout: float = 30.0
    """Seconds that a client may take to send its request, and may not read its answer."""
    drain_timeout: float = 30.0
    """Seconds that running requests have when the proxy is told to end."""

    def check(self) -> None:
        """Checks the settings before any work.

        Raises:
            InputError: If one is out of its range, or some do not go together.
        """
        check_ranges(self, self._ranges())
        try:
            self.connections.url  # noqa: B018, asking for it checks it
        except InputError as error:
            raise InputError(f"--upstream: {error}") from None
        self._check_control()
        self._check_money()
        self._check_large()
        self._check_thoughts()

    def _ranges(self) -> dict[str, tuple[bool, str]]:
        """By name of a setting, whether it is in its range, and what that is."""
        at_a_time = ("max_streams", "max_probes")
        seconds = [name for name in vars(self) if name.endswith("_timeout")]
        price, cap, least = self.price, self.max_thinking_tokens, max(self.min_thinking_tokens, 1)
        return {
            **{name: (0 < getattr(self, name) < math.inf, "seconds above 0") for name in seconds},
            **{name: (1 <= getattr(self, name) <= _MOST, f"1 to {_MOST}") for name in at_a_time},
            "max_body_bytes": (self.max_body_bytes >= 1, "at least 1"),
            "context": (self.context is None or self.context >= 1, "at least 1"),
            "port": (0 <= self.port < 2**16, "0 to 65535"),
            "load_target": (self.load_target is None or self.load_target >= 1, "1 or more"),
            "value": (self.value is None or 0 < self.value < math.inf, "dollars above 0"),
            "most_thoughts": (1 <= self.most_thoughts <= _MOST_THOUGHTS, f"1 to {_MOST_THOUGHTS}"),
            "price": (price is None or 0 <= price < math.inf, "0 or more, and finite"),
            "min_thinking_tokens": (self.min_thinking_tokens >= 0, "0 or more"),
            "max_thinking_tokens": (cap is None or cap >= least, f"at least {least}"),
            "target": (0 < self.target < 1, "between 0 and 1"),
            "audit": (0 <= self.audit <= 1, "from 0 to 1"),
            "explore": (0 <= self.explore < 1, "0 or more, and less than 1"),
            "label_hours": (0 <= self.label_hours < math.inf, "0 or more, and finite"),
            "keep_days": (self.keep_days > 0, "above 0"),
            "dense_audits": (0 <= self.dense_audits <= 1, "from 0 to 1"),
        }

    def _check_large(self) -> None:
        """Checks that what is told about a large LM goes together.

        Raises:
            InputError: If it does not.
        """
        if self.large is None:
            for name in ("large_model", "large_key_env"):
                if getattr(self, name) is not None:
                    raise InputError(f"{option(name)} is given, expected it with --large")
            return
        try:
            address = self.large_connections.url
        except InputError as error:
            raise InputError(f"--large: {error}") from None
        if address.lower() == self.connections.url.lower():
            told = f"--large is {self.large}, which is --upstream too"
            raise InputError(f"{told}, expected the server of another LM")
        if self.tariffs is not None and self.large_model is None:
            told = "--tariffs is given, expected --large-model with the name that it gives a tariff"
            raise InputError(f"{told} beside --large")
        if self.control != "off":
            self._check_control_of_both()

    def _check_thoughts(self) -> None:
        """Refuses several thoughts of a request beside what knows of one alone.

        Raises:
            InputError: If there is such a setting.
        """
        if self.most_thoughts == 1:
            return
        beside = "--large" if self.large is not None else f"--control {self.control}"
        if self.large is not None or self.control in GOVERNED:
            found = f"--most-thoughts is {self.most_thoughts}"
            raise InputError(f"{found}, expected 1 beside {beside}, which knows of one thought")

    def _check_control_of_both(self) -> None:
        """Checks that what a control of a small and a large LM is told goes together.

        Raises:
            InputError: If it does not.
        """
        usual = {one.name: one.default for one in fields(self)}
        if self.control not in GOVERNED:
            expected = f"{' or '.join(GOVERNED)} with --large"
            raise InputError(f"--control is {self.control!r}, expected {expected}")
        for name in _NOT_BESIDE_BOTH:
            if getattr(self, name) != usual[name]:
                told = f"{option(name)} is given, which does not know of --large"
                raise InputError(f"{told} under --control {self.control}")

    def _check_control(self) -> None:
        """Checks that what a control is told goes together.

        Raises:
            InputError: If it does not.
        """
        if self.control not in ("off", *GOVERNED) and ":" not in self.control:
            expected = f"off, {', '.join(GOVERNED)} or MODULE:NAME of a class"
            raise InputError(f"--control is {self.control!r}, expected {expected}")
        if self.audit_content and self.audit_traces is None:
            raise InputError("--audit-content is on, expected --audit-traces with a folder for it")
        if self.control not in GOVERNED:
            self._check_ungoverned()
            return
        self.group_targets  # noqa: B018, asking for them checks them
        if self.state is None:
            raise InputError(f"--control is {self.control}, expected --state with a file for it")
        if self.control == "apply" and not self.audit:
            raise InputError("--audit is 0, expected above 0, or --control observe")
        if is_database(self.state) and self.state_key is None:
            raise InputError("--state is a database, expected --state-key with a file for its key")

    def _check_ungoverned(self) -> None:
        """Refuses what would mean nothing without a control that has a state.

        Raises:
            InputError: If there is such a setting.
        """
        usual = {one.name: one.default for one in fields(self)}
        for name in _OF_GOVERNED:
            if getattr(self, name) != usual[name]:
                raise InputError(
                    f"{option(name)} is given, expected it with --control observe or apply"
                )
        for name in ("state", "context"):
            if getattr(self, name) != usual[name] and self.budgets is None:
                expected = "it with --control observe or apply, or --budgets"
                raise InputError(f"{option(name)} is given, expected {expected}")

    def _check_money(self) -> None:
        """Checks that what is told about money goes together.

        Raises:
            InputError: If it does not.
        """
        if self.follow_doubts and self.control != "apply":
            raise InputError("--follow-doubts is on, expected it with --control apply")
        if self.explore and self.control != "apply":
            raise InputError(f"--explore is {self.explore}, expected it with --control apply")
        if self.load_target is not None and self.control != "apply":
            found = f"--load-target is {self.load_target}"
            raise InputError(f"{found}, expected it with --control apply")
        if self.budgets is not None and self.state is None:
            raise InputError(f"--budgets is {self.budgets}, expected --state with a file for it")
        if self.value is not None and self.tariffs is None:
            raise InputError(f"--value is {self.value}, expected --tariffs with what tokens cost")
        if self.value is not None and self.price is not None:
            raise InputError("--value and --price are given, expected one of them")

    @property
    def operator_key(self) -> str | None:
        """The key that /v1/haltwise wants, if any.

        Raises:
            InputError: If its environment variable is not set.
        """
        return None if self.operator_key_env is None else _key_in(self.operator_key_env)

    @property
    def group_targets(self) -> dict[str, float]:
        """By group, the target that it has of its own.

        Raises:
            InputError: If one has another form.
        """
        try:
            found = read_targets(self.group_target)
        except InputError as error:
            raise InputError(f"--group-target: {error}") from None
        tenants = [whole_tenant(name) for name in found if name.startswith(TENANT)]
        if not all(_TENANT_GROUP.fullmatch(name) for name in tenants):  # it may be a key
            raise InputError("--group-target: expected a tenant's 16 digits as the status has them")
        return found

    @property
    def connections(self) -> "UpstreamConfig":
        """Where the upstream is, and how it is asked."""
        return UpstreamConfig(
            self.upstream,
            self.upstream_key_env,
            self.max_streams + self.max_probes,
            self.connect_timeout,
            self.read_timeout,
        )

    @property
    def large_connections(self) -> "UpstreamConfig":
        """Where the large LM's server is, and how it is asked."""
        return replace(self.connections, address=self.large or "", key_env=self.large_key_env)

    def lets_browsers_in_by(self, host: str) -> bool:
        """Whether pages may ask by this name, which a hostile one may have lent to the proxy.

        Args:
            host: The Host header.
        """
        if not (self.allowed_hosts or _is_loopback(self.host)):
            return True
        name = host.strip().rpartition(":")[0] if _PORT.search(host) else host.strip()
        name = name.strip("[]").lower()
        return _is_loopback(name) or name in (self.host, *map(str.lower, self.allowed_hosts))

    def terms(self, own: Terms) -> Terms:
        """The terms of requests that ask for no others.

        Args:
            own: The head's own terms, which hold where the operator names no price.

        Raises:
            InputError: If they contradict each other.
        """
        terms = own if self.price is None else Terms(self.price)
        return replace(
            terms, min_tokens=self.min_thinking_tokens, max_tokens=self.max_thinking_tokens
        )


@dataclass(frozen=True)
class Customer:
    """What holds for all requests of one API key."""

    terms: Terms
    """Those of requests that ask for no others."""
    value: float | None = None
    """Dollars that a right answer is worth, which name the price; None names none."""
    budget: Budget | None = None
    """What all of them may spend; None as everybody's."""
    target: float | None = None
    """The mean loss that its tenant is promised; None as everybody's."""


class APIKeys:
    """The API keys that are let in, each with what holds for it; only their digests are kept.

    Args:
        path: The file, in the form that `ServeConfig.keys` tells.
        default: What holds where an entry says nothing.

    Raises:
        InputError: If the file cannot be read or an entry has no terms. No message holds a key.
    """

    def __init__(self, path: Path, default: Customer) -> None:
        """Reads the file, which is not looked at again."""
        expected = 'expected {"API KEY": {"price": 0.5}, ...}'
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"--keys: {what_failed(error)}, {expected}") from None
        except (ValueError, RecursionError) as error:  # whose text may have a key
            found = f"no JSON ({type(error).__name__})"
            raise InputError(f"--keys: {path}: found {found}, {expected}") from None
        if not isinstance(entries, dict) or not entries:
            raise InputError(f"--keys: {path}: {expected}")
        if not all(key.strip() for key in entries):
            raise InputError(f"--keys: {path}: expected no empty key")
        self._customers = {
            _digest(key.strip().encode()): _customer(entry, default, f"--keys: {path}, entry {i}")
            for i, (key, entry) in enumerate(entries.items(), start=1)
        }

    @property
    def need(self) -> set[str]:
        """What some entry names: any of budget, value and target."""
        told = self._customers.values()
        names = ("budget", "value", "target")
        return {name for name in names for one in told if getattr(one, name)}

    @property
    def budgets(self) -> dict[str, Budget]:
        """The budgets that entries have for themselves, by tenant, as `tenant_of` names it."""
        known = self._customers.items()
        return {_short(key): one.budget for key, one in known if one.budget is not None}

    @property
    def targets(self) -> dict[str, float]:
        """The targets that entries have, by the group of all that their tenant asks."""
        known = self._customers.items()
        return {
            f"{TENANT}{_short(key)}": one.target for key, one in known if one.target is not None
        }

    def customer_of(self, authorization: str | None) -> Customer | None:
        """Whose a request's Authorization header is; None if its key is not let in.

        Digests are looked up, so how long it takes tells nothing about a key.
        """
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        return self._customers.get(_digest(key.strip().encode("latin-1", "replace")))


def tenant_of(authorization: str | None) -> str:
    """A short digest of the API key in an Authorization header; empty if there is none."""
    key = (authorization or "").partition(" ")[2].strip()
    return digest_of(key) if key else ""


def digest_of(text: str) -> str:
    """A short digest of what a header says."""
    return _short(_digest(text.encode("latin-1", "replace")))


def _key_in(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(
            f"environment variable {variable} is not set or empty, expected an API key in it"
        )
    return key


def _is_loopback(name: str) -> bool:
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _short(digest: bytes) -> str:
    return digest.hex()[:16]


def _customer(entry: Any, default: Customer, source: str) -> Customer:
    expected = f"{', '.join(_OF_ENTRIES[:-1])} or {_OF_ENTRIES[-1]}"
    if not isinstance(entry, dict):
        raise InputError(f"{source}: expected an object with {expected}")
    if unknown := sorted(entry.keys() - set(_OF_ENTRIES)):
        raise InputError(f"{source}: {unknown[0]!r}: expected {expected}")
    asked = dict(entry)
    budget, value, target = (asked.pop(name, None) for name in ("budget", "value", "target"))
    try:
        if value is not None and {"price", "off"} & set(asked):
            raise InputError("value is given, expected it without price and off")
        named = {"price", "off", "segment"} & set(asked)
        return Customer(
            Terms.read(asked, default.terms),
            read_dollars("value", value) if value is not None or named else default.value,
            default.budget if budget is None else Budget.read(budget),
            None if target is None else _read_target(target),
        )
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def _read_target(told: Any) -> float:
    """Reads the target of an entry.

    Raises:
        InputError: If it is no number between 0 and 1.
    """
    is_number = isinstance(told, int | float) and not isinstance(told, bool)
    if not is_number or not 0 < told < 1:
        raise InputError(f"target is {told!r:.40}, expected a number between 0 and 1")
    return float(told)


def read_dollars(name: str, told: Any) -> float | None:
    """Reads an amount of money, as a number or text; None is none.

    Raises:
        InputError: If it is no number above 0.
    """
    if told is None:
        return None
    try:
        value = math.nan if isinstance(told, bool) else float(told)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(f"{name} is {told!r:.40}, expected dollars above 0")
    return value
