"""Trains an LM on what its own answers return, with trl's GRPOTrainer.

Each step asks some questions several times. What an answer returns beyond the mean of its question
makes its tokens likelier, or less likely (Shao et al., 2024). That is divided by the spread in the
whole step, not of each question: else the tokens of an easy question would weigh as much as whether
a hard one is answered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from haltwise.errors import check_ranges
from lms.fine_tune import FineTuneConfig, lora_of, needing_trl, refusing_targets
from lms.held_out import HeldOut, told

if TYPE_CHECKING:
    from lms.language_model import LanguageModel
    from lms.questions import Question

#: Returns what an answer to a question is worth, by its token ids.
Worth = Callable[["Question", Sequence[int]], float]


@dataclass(frozen=True)
class GrpoConfig:
    """How an LM is trained on its own answers."""

    steps: int = 0
    """The number of steps, after the fine-tuning; 0 does without."""
    lr: float = 1e-5
    """The highest learning rate; it rises over the first twentieth of the steps, and falls to 0."""
    questions: int = 8
    """The number of questions a step."""
    generations: int = 8
    """How often each of them is answered."""
    max_tokens: int | None = None
    """The token budget of an answer; the longest one decides what a step costs. Default: as it was
    recorded."""

    def check(self, place: str) -> None:
        """Checks the settings before any work.

        Args:
            place: Where they stand among a command's settings, such as "grpo.".

        Raises:
            InputError: If one is out of its range.
        """
        ranges = {
            "steps": (self.steps >= 0, "0 or more"),
            "lr": (0 < self.lr < math.inf, "positive and finite"),
            "questions": (self.questions >= 1, "at least 1"),
            "generations": (self.generations >= 2, "at least 2, to be compared"),
            "max_tokens": (self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
        }
        check_ranges(self, ranges, place)


def reinforce(
    lm: LanguageModel,
    questions: Sequence[Question],
    worth: Worth,
    max_tokens: int,
    config: GrpoConfig,
    tuning: FineTuneConfig,
    held_out: HeldOut | None = None,
) -> dict[str, Any]:
    """Trains an LM in place on its own answers, which it samples at its own temperature.

    Args:
        lm: The LM; a greedy one samples at a temperature of 1.
        questions: What it is asked.
        worth: What an answer is worth.
        max_tokens: The token budget of an answer if the settings name none.
        config: The settings.
        tuning: Has LoRA's settings, and the seed.
        held_out: Questions that tell when the LM has learned enough. None does all steps.

    Returns:
        The number of steps, and the mean worth of the answers that the first and the last tenth of
        them have learned from; with held-out questions, what they have told.

    Raises:
        InputError: If an extra is missing, or a layer of LoRA is not there.
    """
    with needing_trl():
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer  # type: ignore[attr-defined]  # loaded lazily

    means: list[float] = []

    def reward(completion_ids: list[list[int]], row: list[int], **_: Any) -> list[float | None]:
        pairs = zip(row, completion_ids, strict=True)
        found = [worth(questions[i], tokens) for i, tokens in pairs]
        if lm.model.training:
            means.append(sum(found) / len(found))
        return [*found]

    # The trainer's call of the tokenizer puts the first token before each prompt by itself.
    first = lm.chat.template.bos
    prompts = [lm.prompt(one.text).removeprefix(first) for one in questions]
    data = Dataset.from_dict({"prompt": prompts, "row": range(len(prompts))})
    stopping = held_out and held_out.callback(config.steps)
    schedule: dict[str, Any] = {"lr_scheduler_type": "cosine"}
    schedule |= held_out.arguments(config.steps) if held_out else {}
    on_cpu = lm.model.device.type == "cpu"
    with TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            max_steps=config.steps,
            learning_rate=config.lr,
            per_device_train_batch_size=config.generations,
            gradient_accumulation_steps=min(config.questions, len(questions)),
            num_generations=config.generations,
            max_completion_length=config.max_tokens or max_tokens,
            temperature=lm.temperature or 1.0,
            scale_rewards="batch",
            warmup_steps=0.05,
            seed=tuning.seed,
            bf16=not on_cpu,
            use_cpu=on_cpu,
            activation_checkpointing=not on_cpu,
            save_strategy="no",
            report_to="none",
            logging_steps=10,
            **schedule,
        )
        with refusing_targets(tuning):
            trainer = GRPOTrainer(
                model=lm.model,
                reward_funcs=reward,
                args=settings,
                train_dataset=data,
                eval_dataset=data.select([0]) if stopping else None,
                processing_class=lm.tokenizer,
                peft_config=lora_of(tuning),
                callbacks=[stopping] if stopping else None,
            )
        trainer.train()
    model: Any = trainer.model
    if tuning.lora_rank:
        model.merge_and_unload()  # into lm.model, around which it is
    lm.model.eval()
    few = max(len(means) // 10, 1)
    return {
        "steps": len(means),
        "first_return": sum(means[:few]) / few,
        "last_return": sum(means[-few:]) / few,
    } | (told(stopping) if stopping else {})
