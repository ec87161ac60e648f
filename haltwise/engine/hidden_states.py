"""The last-layer states of a language model, seen while it runs."""

import threading

import torch
from torch import Tensor
from transformers import PreTrainedModel

from haltwise import InputError


class HiddenStateHook:
    """Sees what the head of an LM reads: the last-layer states of the newest tokens.

    It is a context manager around forward passes. Each thread sees its own passes alone.

    Args:
        model: The LM.

    Raises:
        InputError: If the LM has no head of its own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Finds the head."""
        head = model.get_output_embeddings()
        if head is None:
            raise InputError(f"{type(model).__name__} has no output embeddings: no hidden states")
        self._head = head
        #: D, the size of a state.
        self.size = int(head.weight.shape[-1])
        self._passes = threading.local()

    @property
    def latest(self) -> Tensor:
        """The states (B, D) of the newest tokens in the latest pass of this thread."""
        states: Tensor = self._passes.latest
        return states

    def __enter__(self) -> None:
        """Hooks into the LM's head: passes are seen from now on."""
        self._handle = self._head.register_forward_pre_hook(self._see)

    def __exit__(self, *_: object) -> None:
        """Takes the hook away, which leaves no mark on the LM."""
        self._handle.remove()

    def _see(self, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Keeps the states of the newest tokens; PyTorch calls it before the head runs."""
        self._passes.latest = inputs[0][:, -1].detach()
