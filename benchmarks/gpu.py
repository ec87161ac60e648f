"""A GPU in one call: builds, checks and times all that runs beside an LM, without a network.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --device cpu --tiny      the same script, on a CPU, in a minute

LMs have random weights, in the shapes of Qwen3-0.6B and Qwen2.5-7B: they cost what trained ones
do. Contestants take turns, by the wall clock. What does not fit into the time, or lacks a package,
is named as skipped. Prints a table last and writes JSON.
"""

from __future__ import annotations

import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen3Config

from benchmarks.gpu_checks import Check, check_bursts, check_head, check_live, some_questions
from benchmarks.overhead import never_halting_head, random_lm, shape_600m
from benchmarks.timing import Result, Work, rate, take_turns
from command import run, write_json
from haltwise import InputError
from haltwise.engine.decoder import Decoder
from haltwise.policy.features import signals_of
from haltwise.transformers import HaltProcessor, ProbingGeneration, generate_all
from lms.language_model import LanguageModel

_NUM_PROMPT = 32
_PACKAGES = ("torch", "transformers", "numpy", "gymnasium", "stable-baselines3")
_REPEATS = 3


@dataclass(frozen=True)
class Setup:
    """What is measured, and on what."""

    device: str
    seconds: float
    """For everything."""
    shapes: Mapping[str, Any] = field(
        default_factory=lambda: {"0.6B": shape_600m(), "7B": _shape_7b()}
    )
    """Of the LMs, the smallest first."""
    batch_sizes: tuple[int, ...] = (1, 32, 256)
    """Rows, and episodes of the live environment."""
    num_tokens: int = 128
    """Of each answer."""
    every: int = 64
    """Thinking tokens between decision points."""
    ppo_timesteps: int = 131_072


def tiny(device: str, seconds: float) -> Setup:
    """The same with LMs that any machine can run."""
    sizes: dict[str, Any] = {
        "vocab_size": 499,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    shapes = {"tiny Qwen3": Qwen3Config(**sizes, head_dim=8), "tiny Qwen2": Qwen2Config(**sizes)}
    return Setup(device, seconds, shapes, (1, 2, 4), num_tokens=16, every=8, ppo_timesteps=4096)


def _shape_7b() -> Qwen2Config:
    """Qwen2.5-7B's."""
    return Qwen2Config(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32_768,
    )


class Contest:
    """One LM, and all the ways to run it that are compared."""

    def __init__(self, name: str, setup: Setup) -> None:
        """The LM is made when it is first needed."""
        self.name, self._setup = name, setup
        self._head = never_halting_head(setup.every)

    @cached_property
    def lm(self) -> LanguageModel:
        """Random weights, and no token with which they end by themselves."""
        lm = random_lm(self._setup.shapes[self.name], self._setup.device)
        head: Any = lm.model.get_output_embeddings()
        with torch.no_grad():  # logits of 0 are never the largest
            head.weight[[1, 4]] = 0.0
        return lm

    def live(self, size: int) -> list[Result]:
        """The live environment against plain generation.

        Raises:
            ModuleNotFoundError: If gymnasium is not installed.
        """
        works: dict[str, Work] = {
            "generate": partial(self._generate, size),
            "live env": self._live(size),
        }
        return self._turns("live", size, works, [("live env", "generate")])

    def recorder(self, size: int) -> list[Result]:
        """Recording with a probe at every point against plain generation.

        Raises:
            ModuleNotFoundError: If a package that recording needs is not installed.
        """
        works: dict[str, Work] = {
            "generate": partial(self._generate, size),
            "record": self._record(size),
        }
        return self._turns("recorder", size, works, [("generate", "record")])

    def overhead(self, size: int) -> list[Result]:
        """A head that never halts, in three places, against the same without one."""
        works = {
            "generate": partial(self._generate, size),
            "HaltProcessor": partial(self._generate, size, self._processor),
            "ProbingGeneration": partial(self._generate, size, self._halter),
            "slots": partial(self._refilled, size, 0.0),
            "slots with a head": partial(self._refilled, size, 1.0),
        }
        over = [("generate", "HaltProcessor"), ("generate", "ProbingGeneration")]
        return self._turns("overhead", size, works, [*over, ("slots", "slots with a head")])

    def steps(self, size: int) -> list[Result]:
        """Bursts against tokens one by one, and against a static cache of transformers'.

        On a GPU transformers compiles the step of a static cache.
        """
        static = partial(
            self._generate, size, lambda: {"cache_implementation": "static"}, compiles=True
        )
        works = {
            "bursts": partial(self._decode, size, self._setup.every),
            "one by one": partial(self._decode, size, 0),
            "generate, static cache": static,
        }
        over = [("bursts", "one by one"), ("bursts", "generate, static cache")]
        return self._turns("steps", size, works, over)

    def _turns(
        self, part: str, size: int, works: Mapping[str, Work], ratios: list[tuple[str, str]]
    ) -> list[Result]:
        """Tokens a second of each, and pairs of them over each other."""
        label = f"{self.name}, batch {size}: "
        for work in works.values():
            work()  # warms up
        contestants = {
            label + name: partial(rate, work, clock=time.perf_counter)
            for name, work in works.items()
        }
        found = take_turns(part, "tokens/s", contestants, _REPEATS)
        over = [
            found[label + one].over(found[label + other], f"{label}{one} / {other}")
            for one, other in ratios
        ]
        return [*found.values(), *over]

    def _generate(
        self,
        size: int,
        arguments: Callable[[], dict[str, Any]] = dict,
        compiles: bool = False,
    ) -> int:
        """`generate`, as transformers runs it by default."""
        lm, num = self.lm, self._setup.num_tokens
        model: Any = lm.model  # its `generate` has no type
        texts = [question.text for question in some_questions(lm, size, _NUM_PROMPT)]
        inputs = lm.tokenizer(texts, return_tensors="pt").to(model.device)
        out = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=num,
            disable_compile=not compiles,
            **arguments(),
        )
        tokens = out[:, inputs["input_ids"].shape[1] :].cpu()
        assert tokens.shape == (size, num)
        return int(tokens.numel())

    def _processor(self) -> dict[str, Any]:
        return {"logits_processor": [HaltProcessor(self._head, self.lm.model, self.lm.tokenizer)]}

    def _halter(self) -> dict[str, Any]:
        return {"custom_generate": ProbingGeneration(self._head, self.lm.tokenizer)}

    def _refilled(self, size: int, price: float) -> int:
        """Slots that are refilled; at a price of 0 nobody measures anything."""
        lm = self.lm
        texts = [question.text for question in some_questions(lm, 2 * size, _NUM_PROMPT)]
        done = generate_all(
            lm.model, lm.tokenizer, self._head, texts, size, self._setup.num_tokens, price
        )
        return sum(len(answer.ids) for answer in done)

    def _decode(self, size: int, burst: int) -> int:
        """A full batch that is neither measured nor probed."""
        lm, num = self.lm, self._setup.num_tokens
        halting, slots = self._head.config.halting, np.arange(size)
        decoder = Decoder(lm.model, lm.tokenizer, halting, size, num, burst=burst)
        texts = [question.text for question in some_questions(lm, size, _NUM_PROMPT)]
        decoder.start(slots, texts, [0] * size)
        while not decoder.thoughts[0].ended:
            decoder.advance(slots)
        return size * num

    def _live(self, size: int) -> Work:
        """Episodes that are never halted, from round to round."""
        from envs.live import LiveEnv

        head, setup = self._head.config, self._setup
        env = LiveEnv(
            self.lm,
            some_questions(self.lm, 2 * size, _NUM_PROMPT),
            head.halting,
            head.observing,
            size,
            setup.num_tokens,
            temperature=0.0,
            price=1.0,
        )
        env.reset(seed=0)
        going_on = np.zeros(size, dtype=np.int64)
        num_steps = 2 * ((setup.num_tokens - 1) // setup.every)  # two episodes

        def work() -> int:
            """Steps; at a price of 1 a reward is an exact match less a thousandth a token."""
            value = 0.0
            for _ in range(num_steps):
                _, rewards, over, _, infos = env.step(going_on)
                value += rewards.sum()
                if over.any():
                    value -= infos["final_info"]["em"][over].sum()
            return round(-1000 * value)

        return work

    def _record(self, size: int) -> Work:
        from recording.hf_engine import record

        head, lm = self._head.config, self.lm
        decoder = Decoder(
            lm.model,
            lm.tokenizer,
            replace(head.halting, probing="always"),
            size,
            self._setup.num_tokens + 1,  # so that the last point is not the end
            signals=signals_of(head.observing.groups),
        )
        asked = some_questions(lm, size, _NUM_PROMPT)

        def work() -> int:
            return sum(row["num_tokens"] for row in record(lm, decoder, [(q, 0) for q in asked]))

        return work


def ppo(setup: Setup) -> list[Result]:
    """PPO on replay, its network on the device and on the CPU.

    Raises:
        ModuleNotFoundError: If a package that training needs is not installed.
    """
    from agents.fit import learn
    from agents.ppo import PPOConfig, make_ppo
    from benchmarks.environment import benchmark_observing, replay_env
    from benchmarks.synthetic import synthetic_traces

    traces, settings = synthetic_traces(600), PPOConfig(total_timesteps=setup.ppo_timesteps)
    observing = benchmark_observing(traces)

    def train(device: str) -> float:
        env = replay_env(traces, observing, settings.num_envs)
        agent = make_ppo(
            env, observing, settings, mean_points=traces.num_points / len(traces), seed=0
        )
        agent.device = agent.rollout_buffer.device = torch.device(device)
        agent.policy.to(device)

        def work() -> int:
            learn(agent, settings.total_timesteps, "benchmark", None, progress_bar=False)
            return agent.num_timesteps

        return rate(work, clock=time.perf_counter)

    devices = dict.fromkeys(("cpu", setup.device))
    contestants = {f"PPO on {device}": partial(train, device) for device in devices}
    found = list(take_turns("ppo", "steps/s", contestants, _REPEATS).values())
    return [*found, *(other.over(found[0]) for other in found[1:])]


@dataclass(frozen=True)
class Part:
    """One piece of the table."""

    name: str
    seconds: float
    """What it takes at most, as far as known; it is skipped if less is left."""
    measure: Callable[[], list[Result] | list[Check]]


def parts(setup: Setup) -> Iterator[Part]:
    """In the order of their worth; one LM is on the device at a time."""
    yield Part("check bursts", 30, partial(check_bursts, setup.device))
    yield Part("check head", 5, partial(check_head, setup.device))
    yield Part("check live", 30, partial(check_live, setup.device))
    small, *larger = setup.shapes
    contest = Contest(small, setup)
    *_, middle, largest = setup.batch_sizes
    for size in setup.batch_sizes:
        yield Part(f"live, {small}, batch {size}", 40, partial(contest.live, size))
    yield Part(f"recorder, {small}", 40, partial(contest.recorder, middle))
    for size in (1, middle):
        yield Part(f"overhead, {small}, batch {size}", 80, partial(contest.overhead, size))
    yield Part("ppo", 40, partial(ppo, setup))
    yield Part(f"steps, {small}", 150, partial(contest.steps, middle))
    for name in larger:
        contest = Contest(name, setup)
        for size in dict.fromkeys((largest, middle, 1)):
            yield Part(f"live, {name}, batch {size}", 60, partial(contest.live, size))
        yield Part(f"overhead, {name}", 90, partial(contest.overhead, middle))


def run_parts(setup: Setup) -> dict[str, Any]:
    """Runs what fits into the time: results, checks, what was skipped and what failed."""
    end = time.monotonic() + setup.seconds
    report: dict[str, Any] = {"results": [], "checks": [], "skipped": {}, "failed": {}}
    for part in parts(setup):
        start = time.monotonic()
        if start + part.seconds > end:
            report["skipped"][part.name] = f"no time: {end - start:.0f} s left"
            continue
        try:
            for found in part.measure():
                kind = "results" if isinstance(found, Result) else "checks"
                report[kind].append(found)
        except ModuleNotFoundError as error:
            report["skipped"][part.name] = str(error)
        except Exception as error:  # what else has been measured must not be lost with it
            traceback.print_exc()
            report["failed"][part.name] = f"{type(error).__name__}: {error}".partition("\n")[0]
        print(f"{part.name}: {time.monotonic() - start:.1f} s", flush=True)
    return report


def content(setup: Setup, report: dict[str, Any]) -> dict[str, Any]:
    """The JSON file."""
    on_gpu = torch.device(setup.device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(setup.device) if on_gpu else platform.processor(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "batch_sizes": setup.batch_sizes,
        "num_tokens": setup.num_tokens,
        "every": setup.every,
        "checks": [
            asdict(check) | {"passed": check.passed, "difference": _finite(check.difference)}
            for check in report["checks"]
        ],
        "results": [asdict(result) | {"median": result.median} for result in report["results"]],
        "skipped": report["skipped"],
        "failed": report["failed"],
    }


def table(report: dict[str, Any]) -> str:
    """A short one: checks, medians, and what is missing."""
    lines = [
        f"{'ok' if check.passed else 'WRONG':<6}{check.name}: {check.difference:.3g}, "
        f"allowed {check.allowed:g}"
        for check in report["checks"]
    ]
    for result in report["results"]:
        digits = 3 if result.unit == "x" else 0
        name = f"{result.part:<9} {result.name}"
        lines.append(f"{name:<68}{result.median:>12,.{digits}f}  {result.unit}")
    for kind in ("skipped", "failed"):
        lines += [f"{kind}: {name} ({reason})" for name, reason in report[kind].items()]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


@dataclass(frozen=True)
class GpuConfig:
    """Check and time, on one GPU, all that runs beside an LM."""

    device: str = "cuda"
    """As PyTorch names it."""
    tiny: bool = False
    """Take LMs that any machine can run."""
    seconds: float = 540.0
    """For everything; what does not fit is skipped."""
    out: Path = field(default_factory=lambda: Path(os.environ.get("OUT", ".")) / "gpu.json")
    """The JSON file to write."""


def main(config: GpuConfig) -> None:
    """Measures, writes, prints; ends the process with status 1 if a check or a part failed.

    Raises:
        InputError: If there is no such GPU, or no folder to write into.
    """
    if torch.device(config.device).type == "cuda" and not torch.cuda.is_available():
        raise InputError("no GPU in reach: expected --device cpu --tiny, or a machine with one")
    if not config.out.absolute().parent.is_dir():
        raise InputError(f"{config.out}: no such folder, expected one to write into")
    setup = (tiny if config.tiny else Setup)(config.device, config.seconds)
    report = run_parts(setup)
    write_json(config.out, content(setup, report))
    print(f"wrote {config.out}")
    print(table(report))
    sys.exit(bool(report["failed"]) or not all(check.passed for check in report["checks"]))


if __name__ == "__main__":
    run(main, GpuConfig)
