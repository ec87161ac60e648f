"""Fine-tunes an LM on what it is to say, with trl's SFTTrainer and, for a large LM, peft's LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from haltwise import InputError
from haltwise.errors import from_clone, reason_of

if TYPE_CHECKING:
    from lms.language_model import LanguageModel


@dataclass(frozen=True)
class FineTuneConfig:
    """How an LM is fine-tuned."""

    epochs: float = 2.0
    """How often each example is seen."""
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


@dataclass(frozen=True)
class Example:
    """What an LM reads, and what it is to say then, as token ids."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


def fine_tune(lm: LanguageModel, examples: Sequence[Example], config: FineTuneConfig) -> Any:
    """Trains an LM on examples, and returns the trained model; only completions count in the loss.

    Raises:
        InputError: If an extra is missing, or a layer of LoRA is not there.
    """
    try:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]  # loaded lazily
    except ImportError as error:
        told = f"fine-tuning needs trl: {from_clone('distill')}"
        raise InputError(f"{told} ({error})") from None
    columns = {
        "input_ids": [[*one.prompt, *one.completion] for one in examples],
        "completion_mask": [[0] * len(one.prompt) + [1] * len(one.completion) for one in examples],
    }
    on_cpu = lm.model.device.type == "cpu"
    with TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            num_train_epochs=config.epochs,
            learning_rate=config.lr,
            per_device_train_batch_size=config.batch_size,
            warmup_steps=0.05,
            lr_scheduler_type="cosine",
            seed=config.seed,
            completion_only_loss=True,
            max_length=None,
            bf16=not on_cpu,
            use_cpu=on_cpu,
            save_strategy="no",
            report_to="none",
            logging_steps=50,
            activation_checkpointing=False,
        )
        try:
            trainer = SFTTrainer(
                model=lm.model,
                args=settings,
                train_dataset=Dataset.from_dict(columns),
                processing_class=lm.tokenizer,
                peft_config=_lora(config),
            )
        except ValueError as error:
            raise InputError(f"LoRA targets {config.lora_targets!r}: {reason_of(error)}") from None
        trainer.train()
    model: Any = trainer.model
    return model.merge_and_unload() if config.lora_rank else model


def _lora(config: FineTuneConfig) -> Any:
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


def save_lm(lm: LanguageModel, model: Any, folder: Path) -> None:
    """Writes a trained model with its tokenizer, as an LM folder like any other."""
    model.save_pretrained(folder)
    lm.model.generation_config.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
