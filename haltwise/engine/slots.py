"""Many sequences in one KV cache, each of its own length.

A forward pass runs over the sequences that move and over no others. A sequence is rolled back by
setting its length: what lies past it is never seen and is overwritten later.

Shapes: R rows in the cache, B rows in a forward pass, T tokens fed to each, V vocabulary,
L longest row of the pass, S tokens of a burst.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from haltwise import InputError
from haltwise.engine.burst import Burst, Shape, Start
from haltwise.engine.forced_answers import greedy_answers, take_tokens
from haltwise.engine.hidden_states import HiddenStateHook
from haltwise.engine.token_rules import TokenRules
from haltwise.policy.signals import Float, Index
from haltwise.session.forced_answer import ForcedAnswer

# Tokens a row; buffers grow to multiples of this.
_CAPACITY = 256
# Rows of a burst of more than one at least.
_NARROW = 8
# Tokens of forced answers between looks at whether they have ended.
_ANSWER_BURST = 4


class Slots:
    """R sequences of an LM that are fed in any combination, with their next-token logits.

    Args:
        model: A decoder-only LM with full attention in every layer.
        num_rows: Sequences in the cache.
        keep_hidden: Whether last-layer states are kept too.
        burst: Tokens of a burst at most; 0 for no bursts, not in forced answers either.

    Raises:
        InputError: If the LM cannot be rolled back, or its last-layer states not be seen.
    """

    def __init__(
        self, model: PreTrainedModel, num_rows: int, keep_hidden: bool = False, burst: int = 0
    ) -> None:
        """Starts with every row empty."""
        check_supported(model)
        self.model = model
        #: (R,) tokens in each row.
        self.lengths: Index = np.zeros(num_rows, dtype=np.int64)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        self._logits = torch.zeros(num_rows, vocabulary, device=model.device)
        self._tap = HiddenStateHook(model) if keep_hidden else None
        size = self._tap.size if self._tap else 0
        self._hidden = torch.zeros(num_rows, size, device=model.device)
        self._window = _Window()
        num_layers = len(DynamicCache(config=model.config).layers)
        self._layers = [_SlotLayer(num_rows, self._window) for _ in range(num_layers)]
        self._cache = Cache(layers=[*self._layers])
        # The rows of a forward pass lie side by side in the cache: row r is at _place[r].
        self._place: Index = np.arange(num_rows)
        # Columns of each buffer.
        self._capacity = 0
        self._burst: Burst | None = None
        if burst:
            most, device = max(burst, _ANSWER_BURST), model.device
            self._burst = Burst(num_rows, vocabulary, size, device, most, _has_graphs(model))

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
        self, rows: Index, rules: TokenRules, max_tokens: int, eos_ids: Sequence[int]
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

        if self._burst:
            answers = self._answers(rows, max_tokens, eos_ids, rules)
        else:
            answers = greedy_answers(self.next_logits(rows), feed, max_tokens, eos_ids, rules)
        self.rollback(rows, lengths)
        self._logits[index], self._hidden[index] = logits, hidden
        return answers

    @torch.inference_mode()
    def burst(
        self,
        rows: Index,
        num: int,
        temperature: float = 0.0,
        uniforms: Float | None = None,
        num_logprobs: int = 0,
    ) -> tuple[Index, Float]:
        """Generates and appends tokens, without a look at them by the host.

        Args:
            rows: (B,) each at most once.
            num: S, at most the constructor's `burst`.
            temperature: Of sampling; 0 takes the likeliest token.
            uniforms: (S, B) what each token is sampled with, if it is.
            num_logprobs: Of each token, see `haltwise.engine.burst.Shape`.

        Returns:
            Tokens (S, B), -1 where the logits were not numbers (what follows is void), and
            log probabilities (S, B, num_logprobs).
        """
        assert self._burst
        width = min(_width(len(rows)), len(self.lengths))
        if width < len(self.lengths):
            self._to_front(rows)
        here, place = np.argsort(self._place)[:width], self._place[rows]
        length = _window_length(int(self.lengths[rows].max()) + num)
        self._make_room(max(length, int(self.lengths.max()) + 1), spare=False)
        moves = np.zeros(width, dtype=np.bool_)
        moves[place] = True
        drawn = None
        if uniforms is not None:
            drawn = np.zeros((num, width), dtype=np.float32)
            drawn[:, place] = uniforms
        start = Start(self.next_logits(here), self.lengths[here], moves, self._capacity - 1, drawn)
        shape = Shape(width, length, temperature, num_logprobs)
        tokens, logprobs = self._burst.run(self._run, shape, start, num)
        self.lengths[rows] += num
        index, source = self._on_device(rows), self._on_device(place)
        self._logits[index] = self._burst.logits[source]
        self._hidden[index] = self._burst.hidden[source]
        return tokens[:, place], logprobs[:, place]

    def _answers(
        self, rows: Index, max_tokens: int, eos_ids: Sequence[int], rules: TokenRules
    ) -> list[ForcedAnswer]:
        """As `greedy_answers`, in bursts."""
        answers = [ForcedAnswer([], [], 0) for _ in rows]
        moving, left = np.arange(len(rows)), max_tokens
        while left and len(moving):
            num = min(left, _ANSWER_BURST)
            tokens, logprobs = self.burst(rows[moving], num, num_logprobs=1)
            going = np.ones(len(moving), dtype=np.bool_)
            for s in range(num):
                taken = np.flatnonzero(going)
                going[taken] = ~take_tokens(
                    [answers[i] for i in moving[taken]],
                    # Logits that were not numbers show in their logarithms.
                    np.maximum(tokens[s, taken], 0),
                    logprobs[s, taken, 0],
                    eos_ids,
                    rules,
                )
            moving, left = moving[going], left - num
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
        length = int(self.lengths[rows].max()) + num
        self._make_room(length)
        logits, hidden = self._run(self._on_device(tokens), positions, positions, length)
        self.lengths[rows] += num - pad
        index = self._on_device(rows)
        self._logits[index] = logits.float()
        if self._tap:
            self._hidden[index] = hidden.float()

    def _run(
        self, tokens: Tensor, positions: Tensor, columns: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """One pass over the first B places, all (B, T) on the device: nothing waits for it.

        Returns:
            The next logits (B, V) and the newest last-layer states (B, D), D = 0 if they are not
            kept.
        """
        self._window.set(columns, length)
        with self._tap or nullcontext():
            out = self.model(
                input_ids=tokens,
                position_ids=positions,
                attention_mask=_mask(positions, length, self.model.dtype),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: Tensor = out.logits[:, -1]
        return logits, self._tap.latest if self._tap else logits[:, :0]

    def _make_room(self, length: int, spare: bool = True) -> None:
        """Gives each row so many columns at least, half as many again if some are to be spare."""
        if length > self._capacity:
            wanted = max(length, 3 * self._capacity // 2 if spare else 0)
            self._capacity = -(-wanted // _CAPACITY) * _CAPACITY
            for layer in self._layers:
                layer.grow(self._capacity)
            if self._burst:
                self._burst.forget()

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


class _Window:
    """What the next forward pass writes and reads, told to all layers at once."""

    length = 0
    """L: what is read of each place."""

    def set(self, columns: Tensor, length: int) -> None:
        """Writes to columns (B, T) of the first B places."""
        self.columns = columns
        self.places = torch.arange(len(columns), device=columns.device)[:, None]
        self.length = length


class _SlotLayer(DynamicLayer):
    """Keys and values of one layer: buffers (R, heads, capacity, size)."""

    def __init__(self, num_places: int, window: _Window) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.buffers: list[Tensor] = []
        self._num_places = num_places
        self._capacity = 0
        self._window = window

    def grow(self, capacity: int) -> None:
        """Makes room. It is zeros: what is masked must be finite all the same."""
        room = (0, 0, 0, capacity - self._capacity)
        self.buffers = [torch.nn.functional.pad(buffer, room) for buffer in self.buffers]
        self._capacity = capacity

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores (B, heads, T, size) and returns what the pass reads, (B, heads, L, size)."""
        window, states = self._window, (key_states, value_states)
        if not self.buffers:
            shape = (self._num_places, key_states.shape[1], self._capacity)
            self.buffers = [new.new_zeros(*shape, new.shape[3]) for new in states]
        for buffer, new in zip(self.buffers, states, strict=True):
            buffer[window.places, :, window.columns] = new.transpose(1, 2)
        keys, values = (buffer[: len(key_states), :, : window.length] for buffer in self.buffers)
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens that the pass reads."""
        return self._window.length


def _width(num: int) -> int:
    """Rows of a burst: few sizes, lest many steps are captured. Idle rows fill them up."""
    return 1 if num == 1 else max(_NARROW, 1 << (num - 1).bit_length())


def _window_length(length: int) -> int:
    """Columns that a burst reads: the next power of two, or three quarters of it."""
    size = max(_CAPACITY, 1 << (length - 1).bit_length())
    return 3 * size // 4 if size > _CAPACITY and length <= 3 * size // 4 else size


def _has_graphs(model: PreTrainedModel) -> bool:
    """Whether a forward pass can be captured: all of the LM is on one CUDA device."""
    devices = {weight.device for weight in model.parameters()}
    return len(devices) == 1 and model.device.type == "cuda"


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
