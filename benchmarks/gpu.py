"""A GPU in one call: builds, checks and times all that runs beside an LM, without a network.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --device cpu --tiny      the same script, on a CPU, in a minute

LMs have random weights, in the shapes of Qwen3-0.6B and Qwen2.5-7B: they cost what trained ones
do. Contestants take turns and are timed by the wall clock. What does not fit into the time, or
lacks a package, is named as skipped. The script writes JSON, and prints a table at its end.
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

from benchmarks.gpu_checks import DeviceCheck, check_bursts, check_head, check_live, some_questions
from benchmarks.overhead import never_halting_head, random_lm, shape_600m
from benchmarks.timing import BenchResult, TimedWork, rate, take_turns
from command import run, write_json
from haltwise import InputError
from haltwise.engine.decoder import Decoder
from haltwise.transformers import HaltProcessor, ProbingGeneration, generate_all
from lms.language_model import LanguageModel

_NUM_PROMPT = 32
_PACKAGES = ("torch", "transformers", "numpy", "gymnasium", "stable-baselines3")
_REPEATS = 3


@dataclass(frozen=True)
class GpuSetup:
    """What is measured, and on which device."""

    device: str
    """The device, as PyTorch names it."""
    seconds: float
    """The time for everything together."""
    shapes: Mapping[str, Any] = field(
        default_factory=lambda: {"0.6B": shape_600m(), "7B": _shape_7b()}
    )
    """The configs of the LMs by name, the smallest LM first."""
    batch_sizes: tuple[int, ...] = (1, 32, 256)
    """The numbers of rows, and of episodes of the live environment; ascending."""
    num_tokens: int = 128
    """The number of tokens of each answer."""
    every: int = 64
    """The number of thinking tokens between decision points."""
    ppo_timesteps: int = 131_072
    """The number of decisions that PPO learns from."""


def tiny_setup(device: str, seconds: float) -> GpuSetup:
    """Returns a setup with LMs that any machine can run."""
    sizes: dict[str, Any] = {
        "vocab_size": 499,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    shapes = {"tiny Qwen3": Qwen3Config(**sizes, head_dim=8), "tiny Qwen2": Qwen2Config(**sizes)}
    return GpuSetup(device, seconds, shapes, (1, 2, 4), num_tokens=16, every=8, ppo_timesteps=4096)


def _shape_7b() -> Qwen2Config:
    """Returns the shape of Qwen2.5-7B."""
    return Qwen2Config(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32_768,
    )


class LMContest:
    """One LM, and all the ways to run it that are compared."""

    def __init__(self, name: str, setup: GpuSetup) -> None:
        """Makes no LM yet: that waits until it is needed.

        Args:
            name: The name of the LM's shape in the setup.
            setup: What is measured, and on which device.
        """
        self.name, self._setup = name, setup
        self._head = never_halting_head(setup.every)

    @cached_property
    def lm(self) -> LanguageModel:
        """An LM with random weights that never ends by itself."""
        lm = random_lm(self._setup.shapes[self.name], self._setup.device)
        head: Any = lm.model.get_output_embeddings()
        with torch.no_grad():  # logits of 0 are never the largest
            head.weight[[1, 4]] = 0.0
        return lm

    def live(self, size: int) -> list[BenchResult]:
        """Measures the live environment against plain generation.

        Raises:
            ModuleNotFoundError: If gymnasium is not installed.
        """
        works: dict[str, TimedWork] = {
            "generate": partial(self._generate, size),
            "live env": self._live(size),
        }
        return self._turns("live", size, works, [("live env", "generate")])

    def recorder(self, size: int) -> list[BenchResult]:
        """Measures recording with a probe at every point against plain generation.

        Raises:
            ModuleNotFoundError: If a package that recording needs is not installed.
        """
        works: dict[str, TimedWork] = {
            "generate": partial(self._generate, size),
            "record": self._record(size),
        }
        return self._turns("recorder", size, works, [("generate", "record")])

    def overhead(self, size: int) -> list[BenchResult]:
        """Measures a head that never halts, in three places, against the same without a head."""
        works = {
            "generate": partial(self._generate, size),
            "HaltProcessor": partial(self._generate, size, self._processor),
            "ProbingGeneration": partial(self._generate, size, self._probing_generation),
            "slots": partial(self._refilled, size, 0.0),
            "slots with a head": partial(self._refilled, size, 1.0),
        }
        over = [("generate", "HaltProcessor"), ("generate", "ProbingGeneration")]
        return self._turns("overhead", size, works, [*over, ("slots", "slots with a head")])

    def steps(self, size: int) -> list[BenchResult]:
        """Measures bursts against tokens one by one, and against transformers' static cache.

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
        self, part: str, size: int, works: Mapping[str, TimedWork], ratios: list[tuple[str, str]]
    ) -> list[BenchResult]:
        """Measures tokens a second of each contestant, and takes ratios.

        Args:
            part: The part of the table.
            size: The batch size, for the names.
            works: The contestants by name.
            ratios: The pairs of names whose ratios are to be told.
        """
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
        """Runs `generate` as transformers does by default, and returns the number of tokens.

        Args:
            size: The number of rows.
            arguments: Makes further arguments of `generate`, anew for each call.
            compiles: Whether transformers may compile the step.
        """
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

    def _probing_generation(self) -> dict[str, Any]:
        return {"custom_generate": ProbingGeneration(self._head, self.lm.tokenizer)}

    def _refilled(self, size: int, price: float) -> int:
        """Answers in refilled slots, and returns the number of tokens.

        At a price of 0 nothing is measured: it is the same without a head.
        """
        lm = self.lm
        texts = [question.text for question in some_questions(lm, 2 * size, _NUM_PROMPT)]
        done = generate_all(
            lm.model, lm.tokenizer, self._head, texts, size, self._setup.num_tokens, price
        )
        return sum(len(answer.ids) for answer in done)

    def _decode(self, size: int, burst: int) -> int:
        """Decodes a full batch without measuring or probing, and returns the number of tokens."""
        lm, num = self.lm, self._setup.num_tokens
        halting, slots = self._head.config.halting, np.arange(size)
        decoder = Decoder(lm.model, lm.tokenizer, halting, size, num, burst=burst)
        texts = [question.text for question in some_questions(lm, size, _NUM_PROMPT)]
        decoder.start(slots, texts, [0] * size)
        while not decoder.thoughts[0].ended:
            decoder.advance(slots)
        return size * num

    def _live(self, size: int) -> TimedWork:
        """Returns work that plays episodes and never halts them, from round to round."""
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
            """Takes steps and returns the number of tokens that they cost.

            At a price of 1 a reward is an exact match less a thousandth a token.
            """
            value = 0.0
            for _ in range(num_steps):
                _, rewards, over, _, infos = env.step(going_on)
                value += rewards.sum()
                if over.any():
                    value -= infos["final_info"]["em"][over].sum()
            return round(-1000 * value)

        return work

    def _record(self, size: int) -> TimedWork:
        from recording.hf_engine import record

        head, lm = self._head.config, self.lm
        decoder = Decoder(
            lm.model,
            lm.tokenizer,
            replace(head.halting, probing="always"),
            size,
            self._setup.num_tokens + 1,  # else the last point would be the end
            signals=head.observing.signals,
        )
        asked = some_questions(lm, size, _NUM_PROMPT)

        def work() -> int:
            return sum(row["num_tokens"] for row in record(lm, decoder, [(q, 0) for q in asked]))

        return work


def ppo(setup: GpuSetup) -> list[BenchResult]:
    """Measures PPO on replay, with its network on the device and on the CPU.

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
class GpuPart:
    """One piece of the table."""

    name: str
    """The name of the part."""
    seconds: float
    """The time that it takes at most, as far as is known; it is skipped if less is left."""
    measure: Callable[[], list[BenchResult] | list[DeviceCheck]]
    """Measures or checks, and returns what was found."""


def gpu_parts(setup: GpuSetup) -> Iterator[GpuPart]:
    """Yields the parts, the most worthwhile first; only one LM is on the device at a time."""
    yield GpuPart("check bursts", 30, partial(check_bursts, setup.device))
    yield GpuPart("check head", 5, partial(check_head, setup.device))
    yield GpuPart("check live", 30, partial(check_live, setup.device))
    small, *larger = setup.shapes
    contest = LMContest(small, setup)
    *_, middle, largest = setup.batch_sizes
    for size in setup.batch_sizes:
        yield GpuPart(f"live, {small}, batch {size}", 40, partial(contest.live, size))
    yield GpuPart(f"recorder, {small}", 40, partial(contest.recorder, middle))
    for size in (1, middle):
        yield GpuPart(f"overhead, {small}, batch {size}", 80, partial(contest.overhead, size))
    yield GpuPart("ppo", 40, partial(ppo, setup))
    yield GpuPart(f"steps, {small}", 150, partial(contest.steps, middle))
    for name in larger:
        contest = LMContest(name, setup)
        for size in dict.fromkeys((largest, middle, 1)):
            yield GpuPart(f"live, {name}, batch {size}", 60, partial(contest.live, size))
        yield GpuPart(f"overhead, {name}", 90, partial(contest.overhead, middle))


def run_parts(setup: GpuSetup) -> dict[str, Any]:
    """Runs the parts that fit into the time.

    Returns:
        The lists "results" and "checks", and the reasons by part of what was "skipped" and what
        "failed".
    """
    end = time.monotonic() + setup.seconds
    report: dict[str, Any] = {"results": [], "checks": [], "skipped": {}, "failed": {}}
    for part in gpu_parts(setup):
        start = time.monotonic()
        if start + part.seconds > end:
            report["skipped"][part.name] = f"no time: {end - start:.0f} s left"
            continue
        try:
            for found in part.measure():
                kind = "results" if isinstance(found, BenchResult) else "checks"
                report[kind].append(found)
        except ModuleNotFoundError as error:
            report["skipped"][part.name] = str(error)
        except Exception as error:  # a part that fails must not take the others with it
            traceback.print_exc()
            report["failed"][part.name] = f"{type(error).__name__}: {error}".partition("\n")[0]
        print(f"{part.name}: {time.monotonic() - start:.1f} s", flush=True)
    return report


def report_json(setup: GpuSetup, report: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of the JSON file."""
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


def report_table(report: dict[str, Any]) -> str:
    """Returns a short table of checks, medians, and what is missing."""
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
    """The device, as PyTorch names it."""
    tiny: bool = False
    """Take LMs that any machine can run."""
    seconds: float = 540.0
    """The time for everything, in seconds; what does not fit is skipped."""
    out: Path = field(default_factory=lambda: Path(os.environ.get("OUT", ".")) / "gpu.json")
    """The JSON file to write."""


def main(config: GpuConfig) -> None:
    """Measures, writes and prints; ends the process with status 1 if a check or a part failed.

    Raises:
        InputError: If there is no such GPU, or no folder to write into.
    """
    if torch.device(config.device).type == "cuda" and not torch.cuda.is_available():
        raise InputError("no GPU in reach: expected --device cpu --tiny, or a machine with one")
    if not config.out.absolute().parent.is_dir():
        raise InputError(f"{config.out}: no such folder, expected one to write into")
    setup = (tiny_setup if config.tiny else GpuSetup)(config.device, config.seconds)
    report = run_parts(setup)
    write_json(config.out, report_json(setup, report))
    print(f"wrote {config.out}")
    print(report_table(report))
    sys.exit(bool(report["failed"]) or not all(check.passed for check in report["checks"]))


if __name__ == "__main__":
    run(main, GpuConfig)
