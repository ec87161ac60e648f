"""Trains the embedded LM from scratch: `python -m lms.train_embedded`.

Every training sequence is one whole thought plus a few forced answers. These are side branches that
read the thought up to a random token, then "</think>" and the answer, and that nothing else can
see. So one pass teaches the thought and, at many points of it, what the LM would answer if it were
halted there.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from command import run
from haltwise.policy.answers import read_answer
from haltwise.training import StoppingConfig, StoppingRule
from lms.embedded import (
    CHAT_TEMPLATE,
    CLOSE,
    EMBEDDED,
    EOS,
    HABITS,
    PAD,
    THINK,
    UNKNOWN,
    VOCABULARY,
    Habits,
    prompt_of,
    think,
)
from lms.language_model import check_device
from lms.questions import Question
from lms.tasks import TASKS, draw, questions

log = logging.getLogger(__name__)

IDS = {word: i for i, word in enumerate(VOCABULARY)}
MAX_TOKENS = 1024
#: The batches that are drawn together and sorted by length, so that little is padded.
POOL = 32
# The most that the loss on one thought changes from one evaluation to another.
_MOST_NATS = 10.0


@dataclass(frozen=True)
class EmbeddedTrainingConfig:
    """Train the embedded LM from scratch; the same seed gives the same weights."""

    out: Path = EMBEDDED
    """The folder for the finished model; a finished one is never overwritten."""
    seed: int = 0
    """The seed of the initial weights and of every question and thought."""
    device: str = "cpu"
    """The device to train on: cpu or cuda."""
    steps: int = 3600
    """The number of optimiser steps."""
    first_steps: int = 960
    """The number of steps at the start that are on single attempts without slips: an LM that sees
    checks before it can calculate learns to copy its first attempt instead."""
    rows: int = 8
    """The number of thoughts a step, twice as many while they are single attempts; many small
    steps learn faster than few large ones."""
    probes: int = 8
    """The number of forced answers a thought."""
    probe_weight: float = 2.0
    """The weight of a forced answer's token in the loss; a token of the thought weighs 1."""
    lr: float = 3e-3
    """The highest learning rate. It rises to this over 100 steps, and falls over the last two
    fifths of the steps."""
    layers: int = 4
    """The number of the LM's layers."""
    width: int = 128
    """The LM's hidden size; the feed-forward layers are four times as wide."""
    slips: float = 1.0
    """How often steps of a thought are wrong, as a multiple of the usual: larger LMs slip less."""
    temperature: float = 0.75
    """The temperature at which the finished model samples by default."""
    save_minutes: float = 2.0
    """The time between two checkpoints in minutes. They are kept in OUT.work, and the same command
    resumes from there."""
    held_out: int = 0
    """The number of train questions that tell by their loss when the LM has learned enough, at most
    for all steps; nothing is learned from them. The learning rate then falls once they are at a
    plateau. At 0 all steps are done."""
    least_gain: float = 0.005
    """The fall of that loss, in nats, that is asked of each 100 steps."""
    check: int = 40
    """The number of test questions that are answered at the end, to print the exact match of every
    task."""


@dataclass(frozen=True)
class TrainingSequence:
    """One thought with its forced answers, as the LM reads it; all arrays are [tokens].

    Its trunk is the prompt, the thought and the LM's own answer. Every forced answer is a branch.
    """

    ids: np.ndarray
    """The tokens that the LM reads."""
    labels: np.ndarray
    """The token to predict at each place."""
    weights: np.ndarray
    """The weight of each prediction in the loss; NaN in a forced answer, whose weight is a
    setting."""
    positions: np.ndarray
    """The place of each token in the sequence that the LM believes it reads."""
    reach: np.ndarray
    """The last place of the trunk that each token sees."""
    branch: np.ndarray
    """0 for the tokens of the trunk, else the number of the forced answer."""


def build_model(config: EmbeddedTrainingConfig) -> LlamaForCausalLM:
    """Returns the untrained LM, in float32."""
    torch.manual_seed(config.seed)
    shape = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        # The usual 0.02 suits wider LMs; here it delays copying from the question many times over.
        initializer_range=config.width**-0.5,
        pad_token_id=IDS[PAD],
        eos_token_id=IDS[EOS],
        bos_token_id=None,
    )
    return LlamaForCausalLM(shape)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns the word-level tokenizer; the think markers survive decoding, as in other LMs."""
    tokenizer = Tokenizer(models.WordLevel(dict(IDS), unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens([AddedToken(m, normalized=False, special=False) for m in (THINK, CLOSE)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def lesson_of_step(config: EmbeddedTrainingConfig, step: int) -> tuple[int, int, dict[str, Habits]]:
    """Returns what a step, and its whole pool, is to learn from.

    Returns:
        The number of sequences a step, the number of forced answers in each, and the habits of
        thinking about each task.
    """
    if step < config.first_steps:
        single = {t: replace(h, slip_first=0.0, attempts=1) for t, h in HABITS.items()}
        return 2 * config.rows, 0, single
    habits = {
        task: replace(
            h, slip_first=config.slips * h.slip_first, slip_check=config.slips * h.slip_check
        )
        for task, h in HABITS.items()
    }
    return config.rows, config.probes, habits


def build_sequence(
    question: Question, habits: Habits, probes: int, rng: np.random.Generator
) -> TrainingSequence:
    """Writes a thought about a question and forces answers at random tokens of it.

    Args:
        question: A question of the train split.
        habits: The habits of thinking about its task.
        probes: The number of forced answers.
        rng: Decides on the thought and on what is forced; it is moved on.
    """
    thought = think(question, habits, rng)
    prompt = prompt_of(question).split()
    trunk = [IDS[w] for w in (*prompt, *thought.words, CLOSE, thought.results[-1][1], EOS)]
    size = len(trunk) - 1
    cuts = rng.integers(len(thought.words) + 1, size=probes)
    answers: list[int] = []
    for cut in cuts:
        latest = thought.result_at(int(cut))
        if latest is None or rng.random() >= habits.stubborn:
            latest = question.gold
        answers.append(IDS[latest])
    ends = np.repeat(len(prompt) - 1 + cuts, 2)
    count = np.arange(2 * probes)
    place = np.arange(size)
    halted = np.array([(IDS[CLOSE], a) for a in answers], np.int64).ravel()
    told = np.array([(a, IDS[EOS]) for a in answers], np.int64).ravel()
    return TrainingSequence(
        ids=np.concatenate([trunk[:-1], halted]),
        labels=np.concatenate([trunk[1:], told]),
        weights=np.concatenate([place >= len(prompt) - 1, np.full(2 * probes, np.nan)]),
        positions=np.concatenate([place, ends + 1 + count % 2]),
        reach=np.concatenate([place, ends]),
        branch=np.concatenate([np.zeros(size, int), 1 + count // 2]),
    )


def _stack(arrays: list[np.ndarray]) -> torch.Tensor:
    """Returns arrays as one tensor [sequences, tokens], padded with 0 on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(a) for a in arrays], batch_first=True)


def visible(reach: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """Says what each token sees.

    Args:
        reach: [sequences, tokens], as in `TrainingSequence`.
        branch: [sequences, tokens], as in `TrainingSequence`.

    Returns:
        bool [sequences, 1, tokens, tokens], true where the second token is seen by the first.
    """
    place = torch.arange(reach.shape[1], device=reach.device)
    trunk = (branch[:, None, :] == 0) & (place <= reach[:, :, None])
    own = (branch[:, None, :] == branch[:, :, None]) & (place <= place[:, None])
    return (trunk | own)[:, None]


def loss_of(
    model: LlamaForCausalLM, rows: list[TrainingSequence], probe_weight: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """Returns the weighted loss, and the mean losses of thoughts and forced answers in nats."""
    ids, labels, weights, positions, reach, branch = (
        _stack([getattr(r, name) for r in rows]).to(model.device)
        for name in ("ids", "labels", "weights", "positions", "reach", "branch")
    )
    with torch.autocast(model.device.type, torch.bfloat16):
        out = model(input_ids=ids, attention_mask=visible(reach, branch), position_ids=positions)
    nats = F.cross_entropy(out.logits.float().transpose(1, 2), labels, reduction="none")
    probed = weights.isnan()
    parts = {
        "thought": nats[weights == 1].mean(),
        "forced": nats[probed].sum() / probed.sum().clamp(min=1),
    }
    weights = weights.nan_to_num(probe_weight)
    loss = (nats * weights).sum() / weights.sum()
    return loss, {name: part.item() for name, part in parts.items()}


def batches(config: EmbeddedTrainingConfig, first: int) -> Iterator[list[TrainingSequence]]:
    """Yields the batches of all steps from `first` on; the seed alone decides on each of them."""
    out = {question.question_id for question in held_out_questions(config)}
    for pool in range(first // POOL, math.ceil(config.steps / POOL)):
        rng = np.random.default_rng([config.seed, pool])
        size, probes, habits = lesson_of_step(config, pool * POOL)
        rows: list[TrainingSequence] = []
        while len(rows) < POOL * size:
            question = draw(TASKS[len(rows) % len(TASKS)], rng)
            if question.split == "train" and question.question_id not in out:
                rows.append(build_sequence(question, habits[question.task], probes, rng))
        rows.sort(key=lambda row: len(row.ids))
        order = [int(i) for i in rng.permutation(POOL)]
        for i in order[max(first - pool * POOL, 0) : config.steps - pool * POOL]:
            yield rows[i * size : (i + 1) * size]


def held_out_questions(config: EmbeddedTrainingConfig) -> list[Question]:
    """Returns the train questions that nothing is learned from."""
    num = config.held_out
    return questions("all", "train", num, config.seed) if num else []


def learning_rate(config: EmbeddedTrainingConfig, step: int) -> float:
    """Returns the learning rate of a step."""
    left = 1 - step / config.steps
    return config.lr * min(1.0, (step + 1) / 100, 0.01 + 0.99 * left / 0.4)


def build_optimizers(
    model: LlamaForCausalLM, config: EmbeddedTrainingConfig
) -> list[torch.optim.Optimizer]:
    """Returns Muon for the layers' matrices, and AdamW for the embedding and the norms."""
    layers = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(layers, config.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, config.lr, (0.9, 0.98), weight_decay=0.0),
    ]


def learn(
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    rows: list[TrainingSequence],
    config: EmbeddedTrainingConfig,
    rate: float,
) -> dict[str, float]:
    """Takes one step on a batch, at some learning rate.

    Returns:
        The mean losses of thoughts and forced answers before the step, in nats.
    """
    loss, parts = loss_of(model, rows, config.probe_weight)
    model.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return parts


class Watch:
    """Judges an LM as it learns by thoughts that are held out, and says when it is enough.

    It begins once the LM is shown whole thoughts.

    Args:
        model: The LM that learns.
        config: The settings.
    """

    def __init__(self, model: LlamaForCausalLM, config: EmbeddedTrainingConfig) -> None:
        """Writes a thought about each held-out question."""
        self._model, self._config = model, config
        rng = np.random.default_rng([config.seed, config.held_out])
        _, probes, habits = lesson_of_step(config, config.first_steps)
        asked = held_out_questions(config)
        self._rows = [build_sequence(each, habits[each.task], probes, rng) for each in asked]
        self.rule = StoppingRule(
            StoppingConfig(
                least_gain=config.least_gain,
                span=_MOST_NATS,
                interval="normal",
                most_steps=config.steps,
                cooldown_steps=config.steps // 5,
            )
        )

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step."""
        return self._config.lr * min(1.0, (step + 1) / 100) * self.rule.rate

    @torch.no_grad()
    def stepped(self, step: int) -> None:
        """Takes in that some steps are done, and judges the LM after each hundredth."""
        if step > self._config.first_steps and step % 100 == 0:
            weight = self._config.probe_weight
            nats = [loss_of(self._model, [row], weight)[0].item() for row in self._rows]
            self.rule.evaluated(step, [-each for each in nats])
        self.rule.stepped(step)


@dataclass
class TrainingProgress:
    """What a training has spent so far, in all of its resumed parts together."""

    step: int = 0
    """The number of optimiser steps."""
    tokens: int = 0
    """The number of tokens that the LM has read, forced answers included."""
    seconds: float = 0.0
    """The time by the wall clock."""


@dataclass(frozen=True)
class TrainingCheckpoint:
    """All that a training needs to go on after a kill, kept in one file."""

    path: Path
    model: LlamaForCausalLM
    optimizers: list[torch.optim.Optimizer]
    watch: Watch | None

    def save(self, progress: TrainingProgress) -> None:
        """Writes the present state, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": asdict(progress),
            "rule": self.watch and self.watch.rule.state(),
        }
        torch.save(state, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)  # a kill during a save harms nothing

    def load(self) -> TrainingProgress:
        """Restores the last state, if there is one, and returns what was spent to reach it."""
        if not self.path.exists():
            return TrainingProgress()
        state = torch.load(self.path, map_location=self.model.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.watch is not None:
            self.watch.rule.restore(state["rule"])
        return TrainingProgress(**state["progress"])


def train(
    config: EmbeddedTrainingConfig,
) -> tuple[LlamaForCausalLM, TrainingProgress, dict[str, float]]:
    """Trains to the end, or to a plateau, from the last checkpoint if there is one.

    Returns:
        The LM, what was spent on it, and the mean losses of the last hundred steps in nats.
    """
    model = build_model(config).train()
    model.to(config.device)
    optimizers = build_optimizers(model, config)
    watch = Watch(model, config) if config.held_out else None
    checkpoint = TrainingCheckpoint(_work_folder(config) / "state.pt", model, optimizers, watch)
    progress = checkpoint.load()
    recent: deque[dict[str, float]] = deque(maxlen=100)
    since = last_save = time.monotonic()
    for rows in batches(config, progress.step):
        if watch is not None and watch.rule.is_over:
            log.info("stopped: %s", watch.rule.latest.reason)
            break
        step = progress.step
        rate = learning_rate(config, step) if watch is None else watch.rate(step)
        recent.append(learn(model, optimizers, rows, config, rate))
        progress.step += 1
        progress.tokens += sum(len(row.ids) for row in rows)
        now = time.monotonic()
        progress.seconds += now - since
        since = now
        if watch is not None:
            watch.stepped(progress.step)
        if progress.step % 100 == 0:
            spent = f"{progress.tokens / 1e6:.2f} M tokens, {progress.seconds / 60:.1f} min"
            log.info("step %d of %d, %s, %s", progress.step, config.steps, spent, _means(recent))
        if now - last_save > 60 * config.save_minutes:
            checkpoint.save(progress)
            last_save = now
    return model.eval(), progress, _means(recent)


def _work_folder(config: EmbeddedTrainingConfig) -> Path:
    return config.out.with_name(config.out.name + ".work")


def _means(parts: Collection[dict[str, float]]) -> dict[str, float]:
    """Returns the mean of each loss over some steps; {} if there is no step."""
    names = next(iter(parts), {})
    return {name: round(sum(p[name] for p in parts) / len(parts), 4) for name in names}


@torch.no_grad()
def check_model(
    model: LlamaForCausalLM, config: EmbeddedTrainingConfig
) -> dict[str, dict[str, float]]:
    """Answers test questions, sampled and never halted.

    Returns:
        The exact match and the mean number of generated tokens, for each task.
    """
    tokenizer = build_tokenizer()
    figures = {}
    for task in TASKS:
        asked = questions(task, "test", config.check)
        inputs = tokenizer([prompt_of(q) for q in asked], return_tensors="pt", padding=True)
        ids = model.generate(  # type: ignore[misc]  # a mixin annotated for another class
            **inputs.to(model.device), generation_config=generation(config)
        )[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        answers = [read_answer(text.partition(CLOSE)[2]) for text in texts]
        right = [q.is_right(a) for a, q in zip(answers, asked, strict=True)]
        figures[task] = {
            "exact_match": round(sum(right) / config.check, 3),
            "tokens": round(float((ids != IDS[PAD]).sum() / config.check), 1),
        }
    return figures


def generation(config: EmbeddedTrainingConfig) -> GenerationConfig:
    """Returns how the finished model samples if it is told nothing else."""
    return GenerationConfig(
        do_sample=True,
        temperature=config.temperature,
        max_new_tokens=768,
        pad_token_id=IDS[PAD],
        eos_token_id=IDS[EOS],
    )


def _command(config: EmbeddedTrainingConfig) -> str:
    """Returns the command that trains the same weights; where they are put does not matter."""
    usual = asdict(EmbeddedTrainingConfig(out=config.out, seed=-1))  # so the seed is always stated
    changed = {name: value for name, value in asdict(config).items() if value != usual[name]}
    options = [f"--{name.replace('_', '-')} {value}" for name, value in changed.items()]
    return " ".join(["python -m lms.train_embedded", *options])


def main(config: EmbeddedTrainingConfig) -> None:
    """Trains, checks and writes the LM.

    Raises:
        FileExistsError: If `config.out` holds a finished model.
        InputError: If there is no such device.
    """
    if (config.out / "model.safetensors").exists():
        raise FileExistsError(f"{config.out} holds a finished model: choose another --out")
    check_device(config.device)
    torch.set_num_threads(1)  # at this size threads wait for each other more than they work
    model, progress, losses = train(config)
    model.generation_config = generation(config)
    record = {
        "command": _command(config),
        "seed": config.seed,
        "parameters": model.num_parameters(),
        "steps": progress.step,
        "tokens": progress.tokens,
        "minutes": round(progress.seconds / 60, 1),
        "final_losses": losses,
        "test": check_model(model, config),
    }
    model.save_pretrained(config.out)
    build_tokenizer().save_pretrained(config.out)
    (config.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    shutil.rmtree(_work_folder(config), ignore_errors=True)
    log.info("%s", json.dumps(record))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    run(main, EmbeddedTrainingConfig)
