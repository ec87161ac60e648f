"""How much time a head saves behind the proxy, with the prompts of its looks at answers.

A llama-server runs an LM on one thread, with twice as many slots as there are streams. Clients ask
it for whole chats, each the next one as soon as it has an answer: directly, and through proxies
whose heads halt every thought at one fixed place. One head does not look at answers; one looks at
them beside the thought, and one in turn with it. At last both look and halt nothing, which tells
what a look costs. With `--servers.head`, a trained head stands in place of these: it halts where it
will, at its own price.

Every round asks other questions, all ways the same; machines change over minutes, so that many
short rounds tell more than a long one. What they come to together is told beside.

Prompts take time that no head saves, and none of it is a token that anybody counts as saved. So
the same questions are also asked for one token each, and what is saved of the time is told with
the prompts and without them. No slot has a prompt from the way before.

Two times stand beside each other: the wall clock's, in which all processes wait for each other, and
the CPU time of server and proxy, which is disturbed less by whatever else runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, get_args

from benchmarks.timing import BenchResult, take_turns
from examples.stories import stories
from haltwise import MEAN_LOGPROB, HaltHead, Halting, InputError
from haltwise.policy.answers import READERS
from haltwise.policy.halting import Probing
from lms.embedded import CLOSE
from lms.gguf import write_gguf
from lms.questions import Question
from lms.tasks import questions
from tests.heads import place_head
from tests.proxy.proxies import Fetched, Proxy, cpu_seconds_of, fetch, saved_head, spawned_proxy

if TYPE_CHECKING:
    from tests.proxy.llama_server import LlamaServer

_NEVER = {"X-Haltwise-Price": "0.1"}
# That of the recording in docs/SMALL_LM.md.
_INSTRUCTION = (
    "Solve it step by step. Then check your result by solving it again from the beginning, twice. "
    "Only then end with: The answer is"
)
_PLAIN = "server alone"
_PROMPTS = "prompts alone"

Way = Literal[
    "no looks", "looks beside", "looks in turn", "beside, never halts", "in turn, never halts"
]


@dataclass(frozen=True)
class ServersConfig:
    """How much time a head saves behind the proxy against the tokens that it saves."""

    lm: Path | None = None
    """A GGUF file of an instruct LM, which is asked stories. Default: the embedded LM."""
    head: Path | None = None
    """The run folder of a head that looks at answers, for --servers.lm. Default: heads that halt at
    one fixed place."""
    ways: tuple[Way, ...] = get_args(Way)
    """The ways to ask beside the server alone. A trained head has "looks beside" and "looks in
    turn"."""
    num_streams: tuple[int, ...] = (1, 8, 32)
    """The numbers of streams at once."""
    num_questions: int = 64
    """The number of questions of a round, of which each stream takes the next one."""
    every: int = 16
    """The number of tokens between decision points."""
    halts_at: int = 64
    """The number of tokens from which on the heads halt."""
    max_tokens: int = 512
    """The token budget of an answer."""


def measure(config: ServersConfig, repeats: int) -> list[BenchResult]:
    """Measures tokens and times of each way to ask, and what is saved of both.

    Raises:
        InputError: If a request fails, or the settings contradict each other.
    """
    if config.head and (config.lm is None or not {*config.ways} <= {*_LOOKING}):
        raise InputError(f"--servers.head needs --servers.lm, and no --servers.ways but {_LOOKING}")
    # The servers of tests need packages that the other parts do not.
    from tests.proxy.llama_server import llama_server

    results: list[BenchResult] = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        lm = config.lm or folder / "embedded.gguf"
        if config.lm is None:
            write_gguf(lm)
        blind, always = (saved_head(folder / kind, _head(config, kind)) for kind in _KINDS)
        looking = str(config.head or always)
        for num in config.num_streams:
            with llama_server(lm, 2 * num) as server:
                flags = ["--upstream", server.url, "--probe-timeout", "60"]
                beside = ["--head", looking, *flags, "--probe-beside", "--probe-anyway"]
                in_turn = ["--head", looking, *flags]
                # Flags of a proxy, and headers.
                known: dict[Way, tuple[list[str], dict[str, str]]] = {
                    "no looks": (["--head", str(blind), *flags], {}),
                    "looks beside": (beside, {}),
                    "looks in turn": (in_turn, {}),
                    "beside, never halts": (beside, _NEVER),
                    "in turn, never halts": (in_turn, _NEVER),
                }
                asked = _Asked(config, num, server, repeats)
                ways = {
                    _PLAIN: _WayToAsk(asked, server.url),
                    _PROMPTS: _WayToAsk(asked, server.url, max_tokens=1),
                }
                with ExitStack() as proxies:
                    for name in config.ways:
                        of_proxy, headers = known[name]
                        proxy = proxies.enter_context(spawned_proxy(*of_proxy))
                        ways[name] = _WayToAsk(asked, proxy.url, proxy, headers)
                    results += _compared(f"servers, {num} streams", ways, repeats)
    return results


_KINDS: tuple[Probing, ...] = ("at_halt", "always")
_LOOKING: tuple[Way, ...] = ("looks beside", "looks in turn")
_NEVER_HALTING: tuple[Way, ...] = ("beside, never halts", "in turn, never halts")
_HALTING: tuple[Way, ...] = ("no looks", *_LOOKING)


def _head(config: ServersConfig, probing: Probing) -> HaltHead:
    """A head that halts from one place on, at a price of 1; at 0.1 never."""
    groups = ("pace", "confidence" if probing == "always" else "distribution")
    markers = {} if config.lm is None else {"think_start": "", "think_end": "", "answer_end": "\n"}
    halting = Halting(
        probing,
        f"every {config.every} tokens",
        CLOSE if config.lm is None else "\nAnswer:",
        MEAN_LOGPROB,
        max_answer_tokens=8,
        **markers,
    )
    return place_head(config.halts_at, groups, halting)


class _Asked:
    """The questions, and who asks them.

    Args:
        config: The settings.
        num_streams: The number of streams at once.
        server: The server, which has twice as many slots.
        repeats: The number of rounds.
    """

    def __init__(
        self, config: ServersConfig, num_streams: int, server: LlamaServer, repeats: int
    ) -> None:
        self.num_streams, self._server = num_streams, server
        num = max(config.num_questions, num_streams)
        # As services have it; slots keep what prompts begin with.
        self._system = [{"role": "system", "content": _INSTRUCTION}] if config.lm else []
        if config.lm is None:
            found = questions("all", "test", num * repeats)
        else:
            found = [_story(row) for row in stories(num * repeats, seed=1)]
        self.rounds = [found[i * num : (i + 1) * num] for i in range(repeats)]
        self._common = {"model": "lm", "temperature": 0, "max_tokens": config.max_tokens}

    def body(self, question: Question) -> dict[str, Any]:
        """The body of a request."""
        asked = {"role": "user", "content": question.text}
        return self._common | {"messages": [*self._system, asked]}

    def cpu_seconds(self) -> float:
        """The CPU time that the server has taken."""
        return cpu_seconds_of(self._server.process.pid)

    def empty_slots(self) -> None:
        """Takes from every slot the prompt that it had last, which the next one may begin like."""
        for slot in range(2 * self.num_streams):
            self._server.post("/completion", {"prompt": "1", "n_predict": 1, "id_slot": slot})


def _story(row: dict[str, str]) -> Question:
    asked, segment = row["question"], row["segment"]
    return Question(asked, "stories", segment, asked, row["answer"], "test", "number")


@dataclass
class _WayToAsk:
    """A way to ask; each call of it is measured."""

    asked: _Asked
    """The questions."""
    url: str
    """The address to ask."""
    proxy: Proxy | None = None
    """The proxy that is asked; None if the server is asked directly."""
    headers: dict[str, str] = field(default_factory=dict)
    """The headers of a request."""
    max_tokens: int | None = None
    """The token budget of an answer, if it is another than that of the settings."""
    measured: dict[str, list[float]] = field(default_factory=dict)
    """By name, what was measured beside the time, one a call."""

    def __call__(self) -> float:
        """Asks all questions, and returns the seconds that it took."""
        self.asked.empty_slots()
        before, of_proxy = self.asked.cpu_seconds(), self._of_proxy()
        started = perf_counter()
        answers = asyncio.run(self._ask_all())
        wall = perf_counter() - started
        usages = [found.reply.usage for _, found in answers]
        probes = [usage.get("haltwise", {}).get("probes", {}) for usage in usages]
        for name, value in {
            "CPU of the server": self.asked.cpu_seconds() - before,
            "CPU of the proxy": self._of_proxy() - of_proxy,
            "time to answer": median(found.ended - found.started for _, found in answers),
            "tokens": sum(usage["completion_tokens"] for usage in usages),
            "probes": sum(each.get("num", 0) for each in probes),
            "halted": sum(usage.get("haltwise", {}).get("halted", False) for usage in usages),
            "right": sum(asked.is_right(_read(asked, found)) for asked, found in answers),
        }.items():
            self.measured.setdefault(name, []).append(float(value))
        return wall

    def _of_proxy(self) -> float:
        return self.proxy.cpu_seconds() if self.proxy else 0.0

    async def _ask_all(self) -> list[tuple[Question, Fetched]]:
        """All questions and what was answered."""
        waiting = iter(self.asked.rounds[len(self.measured.get("tokens", ()))])
        answers: list[tuple[Question, Fetched]] = []

        async def stream() -> None:
            for question in waiting:
                body = self.asked.body(question)
                if self.max_tokens is not None:
                    body["max_tokens"] = self.max_tokens
                found = await fetch(self.url, "/v1/chat/completions", body, self.headers)
                if found.reply.status != 200:
                    raise InputError(f"a request failed: {found.reply.body[-200:]!r}")
                answers.append((question, found))

        await asyncio.gather(*(stream() for _ in range(self.asked.num_streams)))
        return answers


def _read(question: Question, found: Fetched) -> str:
    """The answer as its rule reads it."""
    return READERS[question.scorer](found.reply.text)


def _compared(part: str, ways: dict[str, _WayToAsk], repeats: int) -> list[BenchResult]:
    found = take_turns(part, "s", ways, repeats)
    results = [*_named("all answers", found.values())]
    units = {"tokens": "", "probes": "", "halted": "", "right": ""}
    told: dict[str, dict[str, BenchResult]] = {}
    for what in ways[_PLAIN].measured:
        told[what] = {
            name: BenchResult(part, name, units.get(what, "s"), tuple(way.measured[what]))
            for name, way in ways.items()
        }
        results += _named(what, told[what].values())
    cpu = {
        name: BenchResult(part, name, "s", tuple(map(sum, zip(
            told["CPU of the server"][name].values, told["CPU of the proxy"][name].values,
            strict=True,
        ))))
        for name in ways
    }  # fmt: skip
    clocks = {"time": found, "CPU time": cpu}
    for name in [name for name in ways if name in _HALTING]:
        results += _savings(part, name, told["tokens"], clocks)
        if repeats > 1:
            of_all = {clock: _summed(times) for clock, times in clocks.items()}
            results += _savings(part, name, _summed(told["tokens"]), of_all, ", all rounds")
    for name in [name for name in ways if name in _NEVER_HALTING]:
        clocks = {"time": _behind(found), "CPU time": _behind(cpu)}
        results += _cost_of_a_look(part, name, told, clocks)
    return results


def _savings(
    part: str,
    name: str,
    tokens: dict[str, BenchResult],
    clocks: dict[str, dict[str, BenchResult]],
    when: str = "",
) -> list[BenchResult]:
    """What a way saves of tokens and of time, and how much of the one is left as the other."""
    of_tokens = _saved(tokens, name)
    results = [BenchResult(part, f"tokens saved{when}: {name}", "%", _percent(of_tokens))]
    for clock, times in clocks.items():
        for which, clocked in ((clock, times), (f"{clock} behind prompts", _behind(times))):
            saved = _saved(clocked, name)
            title = f"{which} saved{when}: {name}"
            results.append(BenchResult(part, title, "%", _percent(saved)))
            ratios = tuple(mine / theirs for mine, theirs in zip(saved, of_tokens, strict=True))
            title = f"{which} saved / tokens saved{when}: {name}"
            results.append(BenchResult(part, title, "x", ratios))
    return results


def _summed(results: dict[str, BenchResult]) -> dict[str, BenchResult]:
    """What all rounds come to together."""
    return {name: replace(one, values=(sum(one.values),)) for name, one in results.items()}


def _named(what: str, results: Any) -> list[BenchResult]:
    return [BenchResult(one.part, f"{what}: {one.name}", one.unit, one.values) for one in results]


def _saved(results: dict[str, BenchResult], name: str) -> tuple[float, ...]:
    """The share that a way saves of what asking the server alone takes, one a round."""
    ratio = results[name].over(results[_PLAIN])
    return tuple(1 - value for value in ratio.values)


def _behind(times: dict[str, BenchResult]) -> dict[str, BenchResult]:
    """The times less what the prompts take by themselves."""
    prompts = times[_PROMPTS].values
    return {
        name: replace(
            one, values=tuple(mine - own for mine, own in zip(one.values, prompts, strict=True))
        )
        for name, one in times.items()
    }


def _percent(shares: Sequence[float]) -> tuple[float, ...]:
    return tuple(100 * share for share in shares)


def _cost_of_a_look(
    part: str,
    name: str,
    told: dict[str, dict[str, BenchResult]],
    clocks: dict[str, dict[str, BenchResult]],
) -> list[BenchResult]:
    """How many tokens of plain serving take as long as a look does that halts nothing."""
    num = told["probes"][name].values
    results = []
    for clock, times in clocks.items():
        plain, tokens = times[_PLAIN].values, told["tokens"][_PLAIN].values
        values = tuple(
            (mine - theirs) / max(looks, 1) / (theirs / generated)
            for mine, theirs, looks, generated in zip(
                times[name].values, plain, num, tokens, strict=True
            )
        )
        results.append(BenchResult(part, f"{clock} of a look: {name}", "tokens", values))
    return results
