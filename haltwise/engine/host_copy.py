"""Copies from an LM's device to the host, which waits for the device at each of them."""

import torch
from torch import Tensor

from haltwise.policy.signals import Float


def copy_to_host(*tensors: Tensor) -> list[Float]:
    """Returns tensors of one device as float32 arrays on the host, by a single copy.

    A float32 number holds a token id exactly.
    """
    flat = torch.cat([tensor.flatten().float() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.reshape(t.shape).numpy() for part, t in zip(parts, tensors, strict=True)]
