"""What vLLM's two model runners tell a logits processor, in one form: slots, and rows of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import MoveDirectionality

from haltwise.policy.signals import Bools, Index

# V1 keeps so many requests in mind that have left the batch and may come back.
_NUM_SPARE = 64

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

    def update(self, update: Any, num_seen: Index) -> Iterator[tuple[int, Any]]:
        """Follows a `BatchUpdate`: removed, then added, then moved.

        Args:
            update: What has changed.
            num_seen: (S,) generated tokens that have been seen of each slot's request.

        Yields:
            Slots that requests have left, and None; then those that new requests get, and their
            sampling parameters. Each still has the tokens of the request before.
        """
        before = list(self._slots.values())
        for row in update.removed:
            self._slots.pop(row, None)
        for number, (row, *_) in enumerate(update.added):
            self._slots[row] = ~number  # a slot is found below
        for source, target, direction in update.moved:
            self._move(source, target, direction == MoveDirectionality.SWAP)
        after = set(self._slots.values())
        left = dict.fromkeys(slot for slot in before if slot not in after)
        yield from left.items()
        self._free |= left
        for row, number in self._slots.items():
            if number < 0:
                request = _Request(*update.added[~number][1:])
                slot = self._slot_of(request, num_seen)
                if slot is None:
                    slot = next(iter(self._free))
                    yield slot, request.params
                del self._free[slot]
                self._slots[row], self._requests[slot] = slot, request

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


class V2Slots:
    """The slots that V2 itself gives to requests."""

    def __init__(self, req_states: Any) -> None:
        """Reads where requests are kept."""
        self.num_slots: int = req_states.max_num_reqs
        self.device: torch.device = req_states.device
        self._states = req_states
        # (S,) of the requests that have been seen: vLLM tells of a new one before its tokens come.
        self._prompt_len: Index = np.zeros(self.num_slots, dtype=np.int64)

    def rows(self, ctx: Any) -> StepRows:
        """The rows of this step."""
        slots = ctx.idx_mapping_np.astype(np.int64)
        length = ctx.seq_lens_upper_bound_np[: len(slots)].astype(np.int64)
        prompt = self._prompt_len[slots] = self._states.prompt_len.np[slots]
        # vLLM throws away what a prompt's earlier chunks give, and warms up without prompts.
        counts = (length >= self._states.prefill_len.np[slots]) & (prompt > 0)
        everyone = np.arange(len(slots))
        rows = StepRows(everyone, slots, length - prompt, everyone >= 0, ctx.input_ids)
        return rows.only(counts)

    def prompt(self, slot: int) -> list[int]:
        """A prompt's tokens."""
        all_tokens = self._states.all_token_ids.gpu
        tokens: list[int] = all_tokens[slot, : self._prompt_len[slot]].tolist()
        return tokens

    def generated(self, spans: Sequence[Span]) -> list[list[int]]:
        """Generated tokens in each of some spans: one copy."""
        lengths = [stop - start for _, start, stop in spans]
        slots = np.repeat([slot for slot, *_ in spans], lengths)
        places = np.concatenate([np.arange(start, stop) for _, start, stop in spans])
        places += self._prompt_len[slots]
        where = on_device(self.device, slots), on_device(self.device, places)
        found = self._states.all_token_ids.gpu[where].cpu()
        return [part.tolist() for part in found.split(lengths)]


def on_device(device: torch.device, index: Index | Bools) -> Tensor:
    """Copies to a device, without waiting for it."""
    host = torch.from_numpy(index)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
