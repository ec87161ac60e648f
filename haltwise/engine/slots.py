"""Many sequences in one KV cache, each of its own length.

A forward pass runs over the sequences that move and over no others. A sequence is rolled back by
setting its length: what lies behind its end is never seen and is overwritten later.

Shapes: R rows in the cache, B rows in a forward pass, T tokens fed to each, V vocabulary,
L longest row of the pass, S tokens of a burst, D size of a hidden state.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from haltwise import InputError
from haltwise.engine.burst import Burst, BurstShape, BurstStart
from haltwise.engine.forced_answers import greedy_answers, one_by_one
from haltwise.engine.hidden_states import HiddenStateHook
from haltwise.engine.token_rules import TokenRules
from haltwise.policy.signals import Float, Index
from haltwise.session.thought import ForcedAnswer

# Buffers of the cache have this many columns at least.
_FEWEST_COLUMNS = 256
# A burst of more than one row has room for this many at least.
_NARROW = 8
# Forced answers are generated in bursts of this many tokens; then it is seen which have ended.
_ANSWER_BURST = 4


class SequenceSlots:
    """R sequences of an LM that are fed in any combination, with their next-token logits.

    Args:
        model: A decoder-only LM with full attention in every layer.
        num_rows: R, the number of sequences in the cache.
        keep_hidden: Whether the last-layer states of the newest tokens are kept too.
        burst: The most tokens that `burst` is asked for; 0 if it is never called. Then forced
            answers are generated token by token as well.

    Raises:
        InputError: If the LM cannot be rolled back, or its last-layer states cannot be seen.
    """

    def __init__(
        self, model: PreTrainedModel, num_rows: int, keep_hidden: bool = False, burst: int = 0
    ) -> None:
        """Starts with every row empty."""
        _check_supported(model)
        self.model = model
        #: (R,) the number of tokens in each row.
        self.lengths: Index = np.zeros(num_rows, dtype=np.int64)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        self._logits = torch.zeros(num_rows, vocabulary, device=model.device)
        self._hook = HiddenStateHook(model) if keep_hidden else None
        size = self._hook.size if self._hook else 0
        self._hidden = torch.zeros(num_rows, size, device=model.device)
        self._cache = _SlotCache(model.config, num_rows)
        # The rows of a forward pass lie side by side in the cache: row r is at _place[r].
        self._place: Index = np.arange(num_rows)
        self._burst: Burst | None = None
        if burst:
            most = max(burst, _ANSWER_BURST)
            self._burst = Burst(self._logits, self._hidden, most, _has_graphs(model))

    @torch.inference_mode()
    def prefill(self, rows: Index, token_lists: Sequence[Sequence[int]]) -> None:
        """Appends tokens to rows (B,): one list for each row, none of them empty.

        Short lists are filled up in front, so that every row's last token is last in the pass and
        logits are computed for it alone. The filling is stored behind the row's end, where it is
        never seen.
        """
        num = max(map(len, token_lists))
        tokens = np.array([[*[0] * (num - len(tokens)), *tokens] for tokens in token_lists])
        pad = np.array([num - len(tokens) for tokens in token_lists])
        order = self._to_front(rows)
        rows, tokens, pad = rows[order], tokens[order], pad[order]
        column = (np.arange(num) - pad[:, None]) % num
        positions = self._on_device(self.lengths[rows, None] + column)
        length = int(self.lengths[rows].max()) + num
        self._make_room(length)
        logits, hidden = self._run(self._on_device(tokens), positions, positions, length)
        self.lengths[rows] += num - pad
        index = self._on_device(rows)
        self._logits[index], self._hidden[index] = logits.float(), hidden.float()

    def step(self, rows: Index, tokens: Index) -> None:
        """Appends one token (B,) to each of rows (B,)."""
        self.prefill(rows, tokens[:, None].tolist())

    @torch.inference_mode()
    def next_logits(self, rows: Index) -> Tensor:
        """Returns the logits (B, V), float32, of the token that follows each of rows (B,)."""
        return self._logits[self._on_device(rows)]

    @torch.inference_mode()
    def last_hidden(self, rows: Index) -> Tensor | None:
        """Returns the last-layer states (B, D), float32, of the newest tokens of rows (B,).

        It is None if the states are not kept.
        """
        return self._hidden[self._on_device(rows)] if self._hook else None

    def rollback(self, rows: Index, lengths: Index | int) -> None:
        """Cuts rows (B,) to some lengths (B,); feed them again before their logits are read."""
        self.lengths[rows] = lengths

    @torch.inference_mode()
    def force(self, rows: Index, rules: TokenRules, eos_ids: Sequence[int]) -> list[ForcedAnswer]:
        """Closes the thoughts of some rows, reads their greedy answers, and undoes it all.

        Args:
            rows: (B,) the rows, each at most once.
            rules: They know what closes a thought, and where an answer ends.
            eos_ids: Each of these tokens ends an answer.

        Returns:
            One answer for each row. The rows are as they were before.
        """
        lengths, index = self.lengths[rows], self._on_device(rows)
        logits, hidden = self._logits[index], self._hidden[index]
        self.prefill(rows, [rules.close_ids] * len(rows))

        def feed(moving: Index, newest: Index) -> Tensor:
            self.step(rows[moving], newest)
            return self.next_logits(rows[moving])

        def burst(moving: Index, _: Index | None, left: int) -> tuple[Index, Float]:
            num = min(left, _ANSWER_BURST)
            tokens, logprobs = self.burst(rows[moving], num, num_logprobs=1)
            # Logits that were not numbers show in the log probabilities.
            return np.maximum(tokens, 0), logprobs[:, :, 0]

        next_tokens = burst if self._burst else one_by_one(self.next_logits(rows), feed)
        answers = greedy_answers(len(rows), next_tokens, rules, eos_ids)
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
        """Generates and appends tokens, which the host sees only when all are there.

        Args:
            rows: (B,) the rows, each at most once.
            num: S, at most the constructor's `burst`.
            temperature: The temperature of sampling; 0 takes the likeliest token.
            uniforms: (S, B) the numbers that the tokens are sampled with, if they are sampled;
                see `haltwise.engine.burst.BurstStart`.
            num_logprobs: How many log probabilities of each token to return, see
                `haltwise.engine.burst.BurstShape`.

        Returns:
            The tokens (S, B), -1 where the logits were not numbers (what follows is void), and
            the log probabilities (S, B, num_logprobs).
        """
        assert self._burst
        num_rows = len(self.lengths)
        width = min(_width(len(rows)), num_rows)
        if width < num_rows:
            self._to_front(rows)
        length = _window_length(int(self.lengths[rows].max()) + num)
        self._make_room(max(length, int(self.lengths.max()) + 1))
        place, index = self._place[rows], self._on_device(rows)
        scratch = self._cache.capacity - 1
        start = BurstStart(place, self._logits[index], self.lengths[rows], scratch, uniforms)
        shape = BurstShape(width, length, temperature, num_logprobs)
        tokens, logprobs = self._burst.run(self._run, shape, start, num)
        self.lengths[rows] += num
        source = self._on_device(place)
        self._logits[index] = self._burst.logits[source]
        self._hidden[index] = self._burst.hidden[source]
        return tokens, logprobs

    def _run(
        self, tokens: Tensor, positions: Tensor, columns: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """Runs one pass over the first B places without waiting for the device.

        Args:
            tokens: (B, T) the tokens that are fed.
            positions: (B, T) their positions in their rows.
            columns: (B, T) the columns of the cache where they are stored.
            length: L, how many columns of the cache are read.

        Returns:
            The next logits (B, V) and the newest last-layer states (B, D), where D is 0 if they
            are not kept.
        """
        self._cache.aim(columns, length)
        with self._hook or nullcontext():
            out = self.model(
                input_ids=tokens,
                position_ids=positions,
                attention_mask=_mask(positions, length, self.model.dtype),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: Tensor = out.logits[:, -1]
        return logits, self._hook.latest if self._hook else logits[:, :0]

    def _make_room(self, length: int) -> None:
        """Gives each row at least so many columns, and some to spare."""
        if length > self._cache.capacity:
            self._cache.grow(_window_length(length))
            if self._burst:
                self._burst.forget()

    def _on_device(self, array: Index) -> Tensor:
        """Returns an array as a tensor on the LM's device."""
        return torch.from_numpy(array).to(self.model.device)

    def _to_front(self, rows: Index) -> Index:
        """Moves rows (B,) to the first B places; returns the order (B,) in which they lie there."""
        place = self._place[rows]
        outside = rows[place >= len(rows)]
        if len(outside):
            inside = np.flatnonzero(self._place < len(rows))
            evicted = np.setdiff1d(inside, rows)
            swapped = np.concatenate([outside, evicted])
            there = self._place[np.concatenate([evicted, outside])]
            source, target = self._on_device(self._place[swapped]), self._on_device(there)
            self._cache.move(source, target, int(self.lengths[swapped].max()))
            self._place[swapped] = there
        return np.argsort(self._place[rows])


class _SlotCache(DynamicCache):
    """The keys and values of R rows: for each layer two buffers (R, heads, capacity, size).

    The inherited layers hold nothing: transformers reads from them of what kind they are.
    """

    def __init__(self, config: PreTrainedConfig, num_rows: int) -> None:
        """Starts without columns; a layer's buffers are made when its first states come."""
        super().__init__(config=config)
        #: The number of columns of each buffer.
        self.capacity = 0
        self._num_rows = num_rows
        self._buffers: dict[int, list[Tensor]] = {}
        self._length = 0

    def aim(self, columns: Tensor, length: int) -> None:
        """Tells where the next pass writes and reads.

        Args:
            columns: (B, T) the columns of the first B places that are written.
            length: L, how many columns of these places are read.
        """
        self._columns, self._length = columns, length
        self._places = torch.arange(len(columns), device=columns.device)[:, None]

    def grow(self, capacity: int) -> None:
        """Adds columns of zeros: what is masked must be finite all the same."""
        room = (0, 0, 0, capacity - self.capacity)
        for buffers in self._buffers.values():
            buffers[:] = [torch.nn.functional.pad(buffer, room) for buffer in buffers]
        self.capacity = capacity

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copies the first columns of some places (N,) to others (N,), all of them at once."""
        for buffers in self._buffers.values():
            for buffer in buffers:
                buffer[target, :, :length] = buffer[source, :, :length]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores a layer's states (B, heads, T, size); returns what it reads (B, heads, L, size).

        Each layer of the LM calls it once in a pass, with its own index.
        """
        states = (key_states, value_states)
        if layer_idx not in self._buffers:
            self._buffers[layer_idx] = [
                new.new_zeros(self._num_rows, new.shape[1], self.capacity, new.shape[3])
                for new in states
            ]
        buffers = self._buffers[layer_idx]
        for buffer, new in zip(buffers, states, strict=True):
            buffer[self._places, :, self._columns] = new.transpose(1, 2)
        keys, values = (buffer[: len(key_states), :, : self._length] for buffer in buffers)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns how many columns the pass reads, which is the same in all layers."""
        return self._length


def _width(num: int) -> int:
    """Returns how many rows a burst has room for; idle rows fill it up.

    There are few widths, since each needs its own captured step.
    """
    return 1 if num == 1 else max(_NARROW, 1 << (num - 1).bit_length())


def _window_length(length: int) -> int:
    """Returns how many columns are made for a length: a power of two, or three quarters of it.

    A burst reads so many too. There are few such numbers, since each needs its own captured step.
    """
    size = max(_FEWEST_COLUMNS, 1 << (length - 1).bit_length())
    return 3 * size // 4 if size > _FEWEST_COLUMNS and length <= 3 * size // 4 else size


def _has_graphs(model: PreTrainedModel) -> bool:
    """Tells whether a forward pass can be captured: all of the LM is on one CUDA device."""
    devices = {weight.device for weight in model.parameters()}
    return len(devices) == 1 and model.device.type == "cuda"


def _check_supported(model: PreTrainedModel) -> None:
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
    """Returns what is added to attention scores, (B, 1, T, L).

    A token sees what is at its own position or before it.
    """
    hidden = torch.arange(length, device=positions.device) > positions[:, None, :, None]
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, -torch.inf)
