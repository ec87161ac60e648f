"""Many sequences in one KV cache, each of its own length.

A forward pass runs over the sequences that move and over no others. A sequence is rolled back by
setting its length: what lies past it is never seen and is overwritten later.

Shapes: R rows in the cache, B rows in a forward pass, T tokens fed to each, V vocabulary,
L longest row of the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from haltwise.errors import InputError
from haltwise.signals import Index
from haltwise.thought import ForcedAnswer, ThoughtRules

# Tokens a row; buffers grow to multiples of this.
_CAPACITY = 256


class Slots:
    """R sequences of an LM that are fed in any combination, with their next-token logits.

    Args:
        model: A decoder-only LM with full attention in every layer.
        num_rows: Sequences in the cache.
        keep_hidden: Whether last-layer states are kept too.

    Raises:
        InputError: If the LM cannot be rolled back, or its last-layer states not be seen.
    """

    def __init__(self, model: PreTrainedModel, num_rows: int, keep_hidden: bool = False) -> None:
        """Starts with every row empty."""
        check_supported(model)
        self.model = model
        #: (R,) tokens in each row.
        self.lengths: Index = np.zeros(num_rows, dtype=np.int64)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        self._logits = torch.zeros(num_rows, vocabulary, device=model.device)
        self._tap = HiddenTap(model) if keep_hidden else None
        size = self._tap.size if self._tap else 0
        self._hidden = torch.zeros(num_rows, size, device=model.device)
        self._window = _Window()
        num_layers = len(DynamicCache(config=model.config).layers)
        self._layers = [_SlotLayer(num_rows, self._window) for _ in range(num_layers)]
        self._cache = Cache(layers=[*self._layers])
        # The rows of a forward pass lie side by side in the cache: row r is at _place[r].
        self._place: Index = np.arange(num_rows)

    @torch.inference_mode()
    def prefill(self, rows: Index, token_lists: Sequence[Sequence[int]]) -> None:
        """Appends tokens to some rows: one list a row, none of them empty."""
        num = max(map(len, token_lists))
        pad = np.array([num - len(tokens) for tokens in token_lists])
        tokens = np.zeros((len(rows), num), dtype=np.int64)
        for i, row_tokens in enumerate(token_lists):
            tokens[i, pad[i] :] = row_tokens
        self._feed(rows, tokens, pad)

    @torch.inference_mode()
    def step(self, rows: Index, tokens: Index) -> None:
        """Appends one token (B,) to each of some rows (B,)."""
        self._feed(rows, tokens[:, None], np.zeros(len(rows), dtype=np.int64))

    @torch.inference_mode()
    def next_logits(self, rows: Index) -> Tensor:
        """Logits (B, V), float32, of the token that follows each of some rows."""
        return self._logits[self._on_device(rows)]

    @torch.inference_mode()
    def last_hidden(self, rows: Index) -> Tensor | None:
        """Last-layer states (B, D), float32, of some rows' newest tokens, if they are kept."""
        return self._hidden[self._on_device(rows)] if self._tap else None

    def rollback(self, rows: Index, lengths: Index | int) -> None:
        """Forgets what rows hold past some lengths; feed them before reading their logits."""
        self.lengths[rows] = lengths

    @torch.inference_mode()
    def force(
        self, rows: Index, rules: ThoughtRules, max_tokens: int, eos_ids: Sequence[int]
    ) -> list[ForcedAnswer]:
        """Closes the thoughts of some rows, reads their greedy answers, and undoes it all.

        Args:
            rows: (B,) each at most once.
            rules: What closes a thought, and what ends an answer.
            max_tokens: An answer is cut after this many.
            eos_ids: Any of these ends an answer.

        Returns:
            One answer a row. The rows are as before.
        """
        lengths, index = self.lengths[rows], self._on_device(rows)
        logits, hidden = self._logits[index], self._hidden[index]
        self.prefill(rows, [rules.close_ids] * len(rows))

        def feed(moving: Index, tokens: Index) -> Tensor:
            self.step(rows[moving], tokens)
            return self.next_logits(rows[moving])

        answers = greedy_answers(self.next_logits(rows), feed, max_tokens, eos_ids, rules)
        self.rollback(rows, lengths)
        self._logits[index], self._hidden[index] = logits, hidden
        return answers

    def _feed(self, rows: Index, tokens: Index, pad: Index) -> None:
        """Appends tokens (B, T) to rows (B,), of which the first pad (B,) are filling.

        Filling is stored behind the row's end, where it is never seen, so that every row's last
        token is last in the chunk and logits are computed for it alone.
        """
        order = self._to_front(rows)
        rows, tokens, pad = rows[order], tokens[order], pad[order]
        num = tokens.shape[1]
        column = (np.arange(num) - pad[:, None]) % num
        positions = self._on_device(self.lengths[rows, None] + column)
        self._window.set(positions, int(self.lengths[rows].max()) + num)
        with self._tap or nullcontext():
            out = self.model(
                input_ids=self._on_device(tokens),
                position_ids=positions,
                attention_mask=_mask(positions, self._window.length, self.model.dtype),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.lengths[rows] += num - pad
        index = self._on_device(rows)
        self._logits[index] = out.logits[:, -1].float()
        if self._tap:
            self._hidden[index] = self._tap.latest.float()

    def _on_device(self, array: Index) -> Tensor:
        return torch.from_numpy(array).to(self.model.device)

    def _to_front(self, rows: Index) -> Index:
        """Moves rows (B,) to the first B places; the order (B,) in which they lie there."""
        place = self._place[rows]
        outside = rows[place >= len(rows)]
        if len(outside):
            inside = np.flatnonzero(self._place < len(rows))
            evicted = np.setdiff1d(inside, rows)
            swapped = np.concatenate([outside, evicted])
            there = self._place[np.concatenate([evicted, outside])]
            source, target = self._on_device(self._place[swapped]), self._on_device(there)
            length = int(self.lengths[swapped].max())
            for layer in self._layers:
                for buffer in layer.buffers:
                    buffer[target, :, :length] = buffer[source, :, :length]
            self._place[swapped] = there
        return np.argsort(self._place[rows])


class HiddenTap:
    """Sees what the head of an LM reads: the last-layer states of the newest tokens.

    A context manager around forward passes.

    Raises:
        InputError: If the LM has no head of its own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Finds the head."""
        head = model.get_output_embeddings()
        if head is None:
            raise InputError(f"{type(model).__name__} has no output embeddings: no hidden states")
        self._head = head
        #: D
        self.size = int(head.weight.shape[-1])
        #: (B, D) of the latest pass.
        self.latest = torch.empty(0, self.size)

    def __enter__(self) -> None:
        """Begins to look."""
        self._handle = self._head.register_forward_pre_hook(self._see)

    def __exit__(self, *_: object) -> None:
        """Leaves no mark on the LM."""
        self._handle.remove()

    def _see(self, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.latest = inputs[0][:, -1]


class _Window:
    """What the next forward pass writes and reads, told to all layers at once."""

    length = 0
    """L: what is read of each place."""

    def set(self, positions: Tensor, length: int) -> None:
        """Writes at positions (B, T) of the first B places."""
        self.positions = positions
        self.places = torch.arange(len(positions), device=positions.device)[:, None]
        self.length = length


class _SlotLayer(DynamicLayer):
    """Keys and values of one layer: buffers (R, heads, capacity, size)."""

    def __init__(self, num_places: int, window: _Window) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.buffers: list[Tensor] = []
        self._num_places = num_places
        self._window = window

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores (B, heads, T, size) and returns what the pass reads, (B, heads, L, size)."""
        window, states = self._window, (key_states, value_states)
        if not self.buffers:
            empty = (self._num_places, key_states.shape[1], 0)
            self.buffers = [new.new_empty(*empty, new.shape[3]) for new in states]
        if self.buffers[0].shape[2] < window.length:
            self.buffers = [_grown(buffer, window.length) for buffer in self.buffers]
        for buffer, new in zip(self.buffers, states, strict=True):
            buffer[window.places, :, window.positions] = new.transpose(1, 2)
        keys, values = (buffer[: len(key_states), :, : window.length] for buffer in self.buffers)
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens that the pass reads."""
        return self._window.length


def _grown(buffer: Tensor, length: int) -> Tensor:
    """A copy with room for more. The room is zeros: what is masked must be finite all the same."""
    old = buffer.shape[2]
    room = -(-max(length, 3 * old // 2) // _CAPACITY) * _CAPACITY - old
    return torch.nn.functional.pad(buffer, (0, 0, 0, room))


def check_supported(model: PreTrainedModel) -> None:
    """Refuses an LM whose sequences cannot be rolled back token by token.

    Raises:
        InputError: If the LM is not decoder-only with explicit positions and full attention, by
            PyTorch's own kernels, in every layer.
    """
    name, config = type(model).__name__, model.config
    if config.is_encoder_decoder or "position_ids" not in signature(model.forward).parameters:
        raise InputError(f"{name}: expected a decoder-only LM that takes position_ids")
    if config._attn_implementation not in ("sdpa", "eager"):
        raise InputError(f"attention is {config._attn_implementation}, expected sdpa or eager")
    layers = DynamicCache(config=config).layers
    other = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if other:
        raise InputError(f"{name} has {', '.join(other)}: expected full attention in every layer")


def _mask(positions: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Added to attention scores, (B, 1, T, L): a token sees what is at its position or before."""
    hidden = torch.arange(length, device=positions.device) > positions[:, None, :, None]
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, -torch.inf)


def greedy_answers(
    logits: Tensor,
    feed: Callable[[Index, Index], Tensor],
    max_tokens: int,
    eos_ids: Sequence[int],
    rules: ThoughtRules,
) -> list[ForcedAnswer]:
    """Decodes one answer a row, always the likeliest token; rows drop out as they end.

    Logits that are not numbers give log probabilities that are not.

    Args:
        logits: (B, V) of each answer's first token.
        feed: Given which of the B rows go on (G,) and their tokens (G,), returns their next
            logits (G, V).
        max_tokens: An answer is cut after this many.
        eos_ids: Any of these ends an answer.
        rules: They know the text that ends an answer.
    """
    answers = [ForcedAnswer([], [], 0) for _ in logits]
    moving = np.arange(len(answers))
    for num in range(1, max_tokens + 1):
        best = logits.log_softmax(dim=-1).max(dim=-1)
        # One host copy; float32 holds token ids exactly.
        picks = torch.stack([best.indices.float(), best.values]).cpu().numpy()
        tokens, logprobs = picks[0].astype(np.int64), picks[1]
        ended = np.isin(tokens, eos_ids) & np.isfinite(logprobs)
        for j, i in enumerate(moving.tolist()):
            answers[i].num_tokens = num
            if not ended[j]:
                answers[i].tokens.append(int(tokens[j]))
                answers[i].logprobs.append(float(logprobs[j]))
                ended[j] = rules.is_complete(answers[i].tokens)
        moving = moving[~ended]
        if not len(moving) or num == max_tokens:
            break
        logits = feed(moving, tokens[~ended])
    return answers
