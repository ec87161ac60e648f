"""An agent in a file, to go on from: its tensors alone, so that nothing in it is ever executed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from agents.ppo import Agent
from command import whole_file
from haltwise import InputError
from haltwise.errors import reason_of

# What the names of the policy's tensors and of Adam's begin with, and the key of what is beside.
_POLICY, _ADAM, _PROGRESS = "policy.", "adam.", "progress"


def save_agent(ppo: Agent, path: Path) -> None:
    """Writes an agent's weights, and what its optimiser remembers, whole or not at all."""
    tensors = {_POLICY + name: value for name, value in ppo.policy.state_dict().items()}
    for i, remembered in ppo.policy.optimizer.state_dict()["state"].items():
        for name, value in remembered.items():
            tensors[f"{_ADAM}{i}.{name}"] = torch.as_tensor(value)
    progress = {_PROGRESS: json.dumps({"num_timesteps": ppo.num_timesteps})}
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with whole_file(path) as temporary:
        temporary.write_bytes(save(contiguous, progress))


def restore_agent(ppo: Agent, path: Path) -> None:
    """Puts an agent back to where it was when it was saved; its settings stay its own.

    Raises:
        InputError: If the file is damaged, or was written by another agent than this.
    """
    try:
        with safe_open(path, "pt") as file:
            progress = json.loads((file.metadata() or {})[_PROGRESS])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        remembered: dict[int, dict[str, Any]] = {}
        for name, value in tensors.items():
            if name.startswith(_ADAM):
                index, _, kind = name.removeprefix(_ADAM).partition(".")
                remembered.setdefault(int(index), {})[kind] = value
        policy = {
            name.removeprefix(_POLICY): value
            for name, value in tensors.items()
            if name.startswith(_POLICY)
        }
        ppo.policy.load_state_dict(policy)
        adam = ppo.policy.optimizer
        adam.load_state_dict(adam.state_dict() | {"state": remembered})
        ppo.num_timesteps = int(progress["num_timesteps"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{path}: no agent to go on from: {reason_of(error)}") from None
