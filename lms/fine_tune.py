"""Fine-tunes an LM on what it is to say, with trl's SFTTrainer and, for a large LM, peft's LoRA."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from haltwise import InputError
from haltwise.errors import check_ranges, from_clone, reason_of
from lms.held_out import HeldOut, told

if TYPE_CHECKING:
    from lms.language_model import LanguageModel


@dataclass(frozen=True)
class FineTuneConfig:
    """How an LM is fine-tuned."""

    epochs: float = 2.0
    """How often each example is seen; 0 does without."""
    lr: float = 2e-4
    """The highest learning rate; it rises over the first twentieth of the steps, and falls to 0."""
    batch_size: int = 16
    """The number of examples a step."""
    lora_rank: int = 0
    """The rank of LoRA's matrices; 0 trains all weights."""
    lora_targets: str = "all-linear"
    """The layers that have such matrices: all-linear, or names with commas between them."""
    seed: int = 0
    """The seed of the order of the examples, and of LoRA's first weights."""

    def check(self, place: str) -> None:
        """Checks the settings before any work.

        Args:
            place: Where they stand among a command's settings, such as "fine_tune.".

        Raises:
            InputError: If one is out of its range.
        """
        ranges = {
            "epochs": (0 <= self.epochs < math.inf, "0 or more, and finite"),
            "lr": (0 < self.lr < math.inf, "positive and finite"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "lora_rank": (self.lora_rank >= 0, "0 or more"),
        }
        check_ranges(self, ranges, place)


@dataclass(frozen=True)
class Example:
    """What an LM reads, and what it is to say then, as token ids."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


def fine_tune(
    lm: LanguageModel,
    examples: Sequence[Example],
    config: FineTuneConfig,
    held_out: HeldOut | None = None,
) -> dict[str, Any]:
    """Trains an LM in place on examples; only completions count in the loss.

    Args:
        lm: The LM.
        examples: What it is to say.
        config: The settings.
        held_out: Questions that tell when the LM has learned enough. None does all steps.

    Returns:
        The number of steps; with held-out questions, what they have told.

    Raises:
        InputError: If an extra is missing, or a layer of LoRA is not there.
    """
    with needing_trl():
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]  # loaded lazily

    columns = {
        "input_ids": [[*one.prompt, *one.completion] for one in examples],
        "completion_mask": [[0] * len(one.prompt) + [1] * len(one.completion) for one in examples],
    }
    on_cpu = lm.model.device.type == "cpu"
    data = Dataset.from_dict(columns)
    num_steps = math.ceil(math.ceil(len(examples) / config.batch_size) * config.epochs)
    stopping = held_out and held_out.callback(num_steps)
    schedule: dict[str, Any] = {"lr_scheduler_type": "cosine"}
    schedule |= held_out.arguments(num_steps) if held_out else {}
    with TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            num_train_epochs=config.epochs,
            learning_rate=config.lr,
            per_device_train_batch_size=config.batch_size,
            warmup_steps=0.05,
            seed=config.seed,
            completion_only_loss=True,
            max_length=None,
            bf16=not on_cpu,
            use_cpu=on_cpu,
            save_strategy="no",
            report_to="none",
            logging_steps=50,
            activation_checkpointing=False,
            **schedule,
        )
        with refusing_targets(config):
            trainer = SFTTrainer(
                model=lm.model,
                args=settings,
                train_dataset=data,
                # The Trainer asks for one to evaluate at all; what counts are the returns.
                eval_dataset=data.select([0]) if stopping else None,
                processing_class=lm.tokenizer,
                peft_config=lora_of(config),
                callbacks=[stopping] if stopping else None,
            )
        trainer.train()
    model: Any = trainer.model
    if config.lora_rank:
        model.merge_and_unload()  # into lm.model, around which it is
    lm.model.eval()
    return {"steps": trainer.state.global_step} | (told(stopping) if stopping else {})


@contextmanager
def needing_trl() -> Iterator[None]:
    """Tells in one line that the extra is missing.

    Raises:
        InputError: If it is.
    """
    try:
        yield
    except ImportError as error:
        reason = f"fine-tuning needs trl: {from_clone('distill')}"
        raise InputError(f"{reason} ({error})") from None


@contextmanager
def refusing_targets(config: FineTuneConfig) -> Iterator[None]:
    """Tells in one line that a layer of LoRA is not there.

    Raises:
        InputError: If it is not.
    """
    try:
        yield
    except ValueError as error:
        if not config.lora_rank:
            raise
        raise InputError(f"LoRA targets {config.lora_targets!r}: {reason_of(error)}") from None


def lora_of(config: FineTuneConfig) -> Any:
    """Returns LoRA's settings; None if all weights are trained."""
    if not config.lora_rank:
        return None
    from peft import LoraConfig

    names = config.lora_targets
    targets = names if names == "all-linear" else [name.strip() for name in names.split(",")]
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )


def save_lm(lm: LanguageModel, folder: Path) -> None:
    """Writes an LM with its tokenizer, as a folder like any other."""
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
