"""What vLLM's two model runners tell a logits processor about one step, in one form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from haltwise.policy.signals import Index
from haltwise.session.monitor import Bools

# A slot, and which of its generated tokens: the first, and the first that is not.
Span = tuple[int, int, int]


@dataclass(frozen=True)
class StepRows:
    """B rows of logits whose next token counts."""

    index: Index
    """(B,) which rows."""
    slots: Index
    """(B,) whose they are."""
    num_tokens: Index
    """(B,) generated so far."""
    known: Bools
    """(B,) whether the newest token is known, or there is none."""
    newest: Tensor
    """(rows,) of every row, on the device; anything before the first, -1 if it is not known."""

    def only(self, chosen: Bools) -> StepRows:
        """Returns some of the rows (B,)."""
        return StepRows(
            self.index[chosen],
            self.slots[chosen],
            self.num_tokens[chosen],
            self.known[chosen],
            self.newest,
        )


def on_device(device: torch.device, index: Index | Bools) -> Tensor:
    """Copies to a device, without waiting for it."""
    host = torch.from_numpy(index)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
