"""Checks that a device gives what it should, for benchmarks/gpu.py before anything is timed.

They run a small LM in float32, where no two tokens are as good as tied.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import Qwen3Config

from benchmarks.overhead import never_halting_head, random_lm
from haltwise import HaltHead
from haltwise.engine.decoder import Decoder
from haltwise.session.signal_collector import STEPWISE
from lms.language_model import LanguageModel
from lms.questions import Question

_NUM_PROMPT, _EVERY, _NUM_TOKENS = 8, 8, 40


@dataclass(frozen=True)
class DeviceCheck:
    """One thing that a device gives, compared with what it should be."""

    name: str
    """The name of what was compared."""
    difference: float
    """The largest difference between numbers, or how many texts differ."""
    allowed: float
    """The largest difference that passes."""

    @property
    def passed(self) -> bool:
        """Whether the difference is allowed; one that is not a number is not."""
        return self.difference <= self.allowed


def small_lm(device: str) -> LanguageModel:
    """Returns an LM with four layers and random float32 weights."""
    shape = Qwen3Config(
        vocab_size=997,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        initializer_range=0.2,
    )
    lm = random_lm(shape, device)
    lm.model.float()
    return lm


def some_questions(lm: LanguageModel, num: int, num_words: int = _NUM_PROMPT) -> list[Question]:
    """Returns questions of made-up words, at whose end the LM begins to think."""
    drawn = np.random.default_rng(0).integers(5, lm.model.config.vocab_size, (num, num_words))
    texts = [" ".join(f"w{i}" for i in row) + " <think>" for row in drawn.tolist()]
    return [Question(f"q{i}", "random", "", text, "w7", "train") for i, text in enumerate(texts)]


def check_bursts(device: str) -> list[DeviceCheck]:
    """Compares the tokens, probes and signals of bursts with those of tokens one by one.

    Raises:
        RuntimeWarning: If steps could not be captured as CUDA graphs.
    """
    lm, checks = small_lm(device), []
    for temperature in (0.0, 0.8):
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            tokens, numbers = _lived(lm, temperature, burst=64)
        expected, of_expected = _lived(lm, temperature, burst=0)
        differing = sum(mine != theirs for mine, theirs in zip_longest(tokens, expected))
        worst = np.abs(numbers - of_expected).max() if not differing else np.nan
        label = f"temperature {temperature}: bursts against tokens one by one"
        checks += [
            DeviceCheck(f"{label}, thoughts and answers that differ", differing, 0),
            DeviceCheck(f"{label}, signals", float(worst), 1e-3),
        ]
    return checks


def _lived(
    lm: LanguageModel, temperature: float, burst: int
) -> tuple[list[list[int]], NDArray[np.float64]]:
    """Returns the tokens of all thoughts and forced answers, and the numbers measured on them."""
    halting = replace(never_halting_head(_EVERY).config.halting, probing="always")
    decoder = Decoder(
        lm.model,
        lm.tokenizer,
        halting,
        12,
        _NUM_TOKENS,
        temperature,
        signals=(*STEPWISE, "end_think_logprob"),
        burst=burst,
    )
    asked, running = some_questions(lm, 11, 230), np.arange(11)
    prompts = [lm.prompt(question.text) for question in asked]
    decoder.start(running, prompts, range(len(asked)))
    answers, numbers = [], []
    while len(running):
        here = running[decoder.advance(running)]
        probes = decoder.force(here)
        seen = vars(decoder.signals(here, probes))
        answers += [probe.tokens for probe in probes]
        numbers += [seen[name] for name in ("confidence", *decoder.measured)]
        running = running[[not decoder.thoughts[slot].ended for slot in running.tolist()]]
    thoughts = [decoder.thoughts[slot].tokens for slot in range(len(asked))]
    return [*thoughts, *answers], np.concatenate(numbers).astype(np.float64)


def check_head(device: str) -> list[DeviceCheck]:
    """Compares the head in numpy, as it runs, with the same network in torch on the device."""
    head = never_halting_head(_EVERY)
    size = (512, head.config.observing.size)
    obs = np.random.default_rng(1).standard_normal(size, dtype=np.float32)
    with torch.inference_mode():
        found = _in_torch(head).to(device)(torch.from_numpy(obs).to(device))[:, 0].cpu().numpy()
    worst = np.abs(head.log_odds_of(obs) - found).max()
    return [DeviceCheck("log-odds of a head: numpy against torch", float(worst), 1e-4)]


def _in_torch(head: HaltHead) -> nn.Sequential:
    """Returns the head's network as PPO trains it."""
    layers: list[nn.Module] = []
    for i in range(3):
        out, size = head.weights[f"w{i}"].shape
        layer = nn.Linear(size, out)
        layer.load_state_dict(
            {
                "weight": torch.from_numpy(head.weights[f"w{i}"]),
                "bias": torch.from_numpy(head.weights[f"b{i}"]),
            }
        )
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def check_live(device: str) -> list[DeviceCheck]:
    """Compares the rewards of the live environment with those of its questions when recorded.

    Raises:
        ModuleNotFoundError: If gymnasium, or what recording needs, is not installed.
    """
    from envs.live import LiveEnv
    from envs.reward import reward, step_costs, step_ems
    from recording.hf_engine import record
    from traces import read_traces, write_shard

    lm, price, head = small_lm(device), 0.5, never_halting_head(_EVERY)
    asked = some_questions(lm, 16)
    halting, observing = replace(head.config.halting, probing="always"), head.config.observing
    env = LiveEnv(lm, asked, halting, observing, 6, _NUM_TOKENS, temperature=0.8, price=price)
    played = _play(env, num_steps=20)
    by_id = {question.question_id: question for question in asked}
    decoder = Decoder(
        lm.model,
        lm.tokenizer,
        halting,
        4,
        _NUM_TOKENS,
        0.8,
        signals=observing.signals,
    )
    rows = record(lm, decoder, [(by_id[name], seed) for name, seed in played])
    with TemporaryDirectory() as folder:
        write_shard(Path(folder) / "0.parquet", list(rows), {})
        traces = read_traces(folder)
    costs, ems, worst = step_costs(traces, "always"), step_ems(traces), 0.0
    for n, key in enumerate(zip(traces.question_id.tolist(), traces.seed.tolist(), strict=True)):
        rewards, halted = played[key]
        at = traces.offsets[n] + np.arange(len(rewards))
        actions = np.zeros(len(rewards), dtype=np.int64)
        actions[-1] = halted
        expected = reward(ems[at, actions], costs[at, actions], price)
        worst = max(worst, float(np.abs(np.array(rewards) - expected).max()))
    assert len(played) > 10
    return [DeviceCheck("rewards of the live environment against replay", worst, 1e-5)]


def _play(env: Any, num_steps: int) -> dict[tuple[str, int], tuple[Sequence[float], bool]]:
    """Plays at random.

    Returns:
        The rewards of each finished episode and whether it was halted, by question and seed.
    """
    rng = np.random.default_rng(2)
    played: dict[tuple[str, int], tuple[Sequence[float], bool]] = {}
    env.reset(seed=3)
    rewards: list[list[float]] = [[] for _ in range(env.num_envs)]
    for _ in range(num_steps):
        actions = (rng.random(env.num_envs) < 0.2).astype(np.int64)
        _, paid, over, _, infos = env.step(actions)
        for i in range(env.num_envs):
            rewards[i].append(float(paid[i]))
            if over[i]:
                final = infos["final_info"]
                key = str(final["question_id"][i]), int(final["seed"][i])
                played[key] = rewards[i], bool(actions[i])
                rewards[i] = []
    return played
