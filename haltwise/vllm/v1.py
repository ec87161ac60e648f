"""The requests of vLLM's V1 model runner, whose rows change from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.v1.sample.logits_processor import MoveDirectionality

from haltwise.policy.signals import Index
from haltwise.vllm.step import Span, StepRows, on_device

# V1 keeps so many requests in mind that have left the batch and may come back.
_NUM_SPARE = 64


class _Request(NamedTuple):
    """A request as V1 describes it: lists that vLLM goes on writing to."""

    params: Any
    prompt: list[int] | None
    output: list[int]

    def goes_on_as(self, other: _Request, num_seen: int) -> bool:
        """Whether the other one is this one, back in the batch, with one new token at most."""
        return (
            num_seen >= len(other.output) - 1
            and self.params is other.params
            and self.prompt is other.prompt
            and self.output[:num_seen] == other.output[:num_seen]
        )


class V1Slots:
    """Gives the requests of V1's batch slots, since their rows change.

    Those that have left keep theirs until it is needed: vLLM also takes requests out of the batch
    that it puts back later.
    """

    def __init__(self, max_num_reqs: int, device: torch.device) -> None:
        """Starts with every slot free."""
        self.num_slots, self.device = max_num_reqs + _NUM_SPARE, device
        self._requests: dict[int, _Request] = {}
        self._slots: dict[int, int] = {}
        # In the order in which their requests have left.
        self._free: dict[int, None] = dict.fromkeys(range(self.num_slots))

    def update(self, update: Any, num_seen: Index) -> list[tuple[int, Any]]:
        """Follows a `BatchUpdate`: removed, then added, then moved.

        Args:
            update: What has changed.
            num_seen: (S,) generated tokens that have been seen of each slot's request.

        Returns:
            Slots that have new requests, and their sampling parameters.
        """
        before = list(self._slots.values())
        for row in update.removed:
            self._slots.pop(row, None)
        for number, (row, *_) in enumerate(update.added):
            self._slots[row] = ~number  # a slot is found below
        for source, target, direction in update.moved:
            self._move(source, target, direction == MoveDirectionality.SWAP)
        after = set(self._slots.values())
        self._free |= dict.fromkeys(slot for slot in before if slot not in after)
        joined = []
        for row, number in self._slots.items():
            if number < 0:
                request = _Request(*update.added[~number][1:])
                slot = self._slot_of(request, num_seen)
                if slot is None:
                    slot = next(iter(self._free))
                    joined.append((slot, request.params))
                del self._free[slot]
                self._slots[row], self._requests[slot] = slot, request
        return joined

    def _move(self, source: int, target: int, swaps: bool) -> None:
        coming, going = self._slots.pop(source, None), self._slots.pop(target, None)
        if coming is not None:
            self._slots[target] = coming
        if swaps and going is not None:
            self._slots[source] = going

    def _slot_of(self, request: _Request, num_seen: Index) -> int | None:
        """The slot that a request had before, if it still is its own."""
        for slot in reversed(self._free):  # it may have had others even before
            before = self._requests.get(slot)
            if before is not None and before.goes_on_as(request, int(num_seen[slot])):
                return slot
        return None

    def rows(self, _: object) -> StepRows:
        """The rows of this step."""
        index = np.fromiter(self._slots.keys(), np.int64, len(self._slots))
        slots = np.fromiter(self._slots.values(), np.int64, len(self._slots))
        outputs = [self._requests[slot].output for slot in slots.tolist()]
        num_tokens = np.array([len(output) for output in outputs], dtype=np.int64)
        newest = np.zeros(len(index), dtype=np.int64)
        newest[index] = [output[-1] if output else 0 for output in outputs]
        return StepRows(
            index, slots, num_tokens, newest[index] >= 0, on_device(self.device, newest)
        )

    def prompt(self, slot: int) -> list[int]:
        """A prompt's tokens; none if it has only embeddings."""
        return self._requests[slot].prompt or []

    def generated(self, spans: Sequence[Span]) -> list[list[int]]:
        """Generated tokens in each of some spans."""
        return [self._requests[slot].output[start:stop] for slot, start, stop in spans]
