"""Prunes the embedded LM: `python -m lms.prune --out FOLDER --share 0.25`.

Of every feed-forward layer the units with the smallest weights are cut, as many in each. What is
left is trained on for a few steps, on new questions of the train split, as the LM was trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from command import run, whole_folder
from haltwise import InputError
from haltwise.errors import check_ranges
from lms.embedded import EMBEDDED
from lms.train_embedded import (
    EmbeddedTrainingConfig,
    batches,
    build_optimizers,
    build_tokenizer,
    generation,
    learn,
    learning_rate,
)


@dataclass(frozen=True)
class PruneConfig:
    """Prune the embedded LM, and train on what is left."""

    out: Path
    """The folder for the pruned LM; it must not exist."""
    share: float = 0.25
    """The share of the units of every feed-forward layer to cut."""
    steps: int = 200
    """The number of optimiser steps behind the cut; 0 trains nothing."""
    lr: float = 1e-3
    """The highest learning rate of these steps; it rises and falls as in lms.train_embedded."""
    seed: int = 1
    """The seed of the questions and thoughts to train on; the embedded LM has learned from 0."""


def prune(model: LlamaForCausalLM, share: float) -> None:
    """Cuts the smallest units of every feed-forward layer, in place.

    Args:
        model: The LM.
        share: The share of the units to cut, in [0, 1); to whole units; one is left at least.
    """
    for layer in model.model.layers:
        kept = kept_units(layer.mlp, share)
        layer.mlp.gate_proj = _linear(layer.mlp.gate_proj.weight[kept])
        layer.mlp.up_proj = _linear(layer.mlp.up_proj.weight[kept])
        layer.mlp.down_proj = _linear(layer.mlp.down_proj.weight[:, kept])
        model.config.intermediate_size = len(kept)


def kept_units(mlp: LlamaMLP, share: float) -> torch.Tensor:
    """Returns the indices of the units that a cut leaves, in order.

    A unit is as large as the product of the Euclidean norms of its weights in the three matrices:
    what one of them is multiplied by, and another divided, does not matter.

    Args:
        mlp: A feed-forward layer.
        share: The share of the units to cut, in [0, 1).
    """
    sizes = mlp.gate_proj.weight.norm(dim=1) * mlp.up_proj.weight.norm(dim=1)
    sizes = sizes * mlp.down_proj.weight.norm(dim=0)
    num_kept = max(len(sizes) - round(share * len(sizes)), 1)
    kept: torch.Tensor = sizes.topk(num_kept).indices.sort().values
    return kept


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.detach().clone())
    return linear


def _check(config: PruneConfig) -> None:
    """Refuses what cannot be done.

    Raises:
        InputError: If the folder exists, or a setting is out of its range.
    """
    if config.out.exists():
        raise InputError(f"{config.out} exists: expected a new folder")
    check_ranges(
        config,
        {
            "share": (0 <= config.share < 1, "from 0 to 1, 1 not included"),
            "steps": (config.steps >= 0, "0 or more"),
            "lr": (0 < config.lr < inf, "above 0, and finite"),
        },
    )


def main(config: PruneConfig) -> None:
    """Prunes, trains and writes the LM.

    Raises:
        InputError: If the folder exists, or a setting is out of its range.
    """
    _check(config)
    torch.set_num_threads(1)  # at this size threads wait for each other more than they work
    model = LlamaForCausalLM.from_pretrained(EMBEDDED)
    prune(model, config.share)
    training = EmbeddedTrainingConfig(
        seed=config.seed, steps=config.steps, first_steps=0, lr=config.lr
    )
    optimizers = build_optimizers(model.train(), training)
    for step, rows in enumerate(batches(training, 0)):
        losses = learn(model, optimizers, rows, training, learning_rate(training, step))
        if step % 50 == 0:
            told = ", ".join(f"{name} {nats:.3f}" for name, nats in losses.items())
            print(f"step {step} of {config.steps}, losses in nats: {told}", flush=True)
    model.generation_config = generation(training)
    with whole_folder(config.out) as folder:
        model.eval().save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
    width = model.config.intermediate_size
    print(f"{config.out}: feed-forward width {width}, {model.num_parameters():,} parameters")


if __name__ == "__main__":
    run(main, PruneConfig)
