"""Copies of some rows of a running batch, on which answers are tried out.

What is fed to a fork leaves the batch and its cache as they were, whatever kind of cache it is:
keys and values of full or sliding attention, states of linear attention, quantised or static.

Shapes: B rows forked, T tokens fed to each, V vocabulary.
"""

import copy
from collections.abc import Iterator
from inspect import signature
from typing import Any, cast

import numpy as np
import torch
from torch import LongTensor, Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, cache_utils

from haltwise import InputError
from haltwise.policy.signals import Index


class Fork:
    """Copies of some rows of a batch, each of which can be fed more tokens.

    Args:
        model: The LM.
        cache: The cache of the running batch.
        mask: The attention mask (R, L) of the batch's prompts; None if there is no padding.
        rows: (B,) which rows of the batch to copy.
    """

    def __init__(
        self, model: PreTrainedModel, cache: Cache, mask: Tensor | None, rows: Index
    ) -> None:
        """Copies the rows."""
        self._model = model
        self._rows = np.arange(len(rows))
        index = self._on_device(rows)
        self._cache = fork_cache(model, cache, index)
        length = int(cache.get_seq_length())
        # (B, 1) the positions of the next tokens.
        self._positions = torch.full_like(index, length)[:, None]
        # transformers drops a mask without padding.
        self._mask = mask
        if mask is not None:
            self._positions -= (mask[index] == 0).sum(dim=1, keepdim=True)
            self._mask = torch.nn.functional.pad(mask[index], (0, length - mask.shape[1]), value=1)

    def feed(self, rows: Index, tokens: Index) -> Tensor:
        """Appends tokens to some of the copies, and drops all other copies.

        Args:
            rows: (B,) which copies, by their numbers from 0 to those that were made less 1.
            tokens: (B, T) what is appended to each.

        Returns:
            The logits (B, V) of the tokens that would follow.
        """
        if len(rows) < len(self._rows):
            self._keep(rows)
        num = tokens.shape[1]
        if self._mask is not None:
            self._mask = torch.nn.functional.pad(self._mask, (0, num), value=1)
        out = self._model(
            input_ids=self._on_device(tokens),
            attention_mask=self._mask,
            position_ids=self._positions + torch.arange(num, device=self._positions.device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._positions = self._positions + num
        logits: Tensor = out.logits[:, -1].float()
        return logits

    def _keep(self, rows: Index) -> None:
        """Drops all copies but some (B,) of those that are left."""
        kept = self._on_device(np.searchsorted(self._rows, rows))
        self._cache.reorder_cache(kept)
        self._positions, self._rows = self._positions[kept], rows
        if self._mask is not None:
            self._mask = self._mask[kept]

    def step(self, rows: Index, tokens: Index) -> Tensor:
        """Appends one token (B,) to each of some copies (B,), and drops all other copies.

        Returns:
            The logits (B, V) of the tokens that would follow.
        """
        return self.feed(rows, tokens[:, None])

    def _on_device(self, array: Index) -> LongTensor:
        """Returns an array as a tensor on the LM's device."""
        return cast(LongTensor, torch.from_numpy(array).to(self._model.device))


def check_forkable(model: PreTrainedModel, cache: Any) -> None:
    """Refuses a batch whose rows cannot be copied.

    Raises:
        InputError: If the LM is not decoder-only with explicit positions, or does not keep what
            it has read in one of transformers' caches.
    """
    name = type(model).__name__
    explicit = "position_ids" in signature(model.forward).parameters
    if model.config.is_encoder_decoder or not explicit:
        raise InputError(f"{name}: expected a decoder-only LM that takes position_ids")
    if not isinstance(cache, Cache):
        raise InputError(f"cache is {type(cache).__name__}, expected one of transformers', in use")
    mixed = [type(layer).__name__ for layer in cache.layers if _is_mixed(layer)]
    if mixed:
        raise InputError(f"cache has {mixed[0]}, expected a dynamic cache for this LM")


def fork_cache(model: PreTrainedModel, cache: Cache, rows: LongTensor) -> Cache:
    """Returns a cache with copies of some rows (B,) of another, which it leaves alone.

    Static layers become dynamic ones, since they may have no room left.
    """
    fork = copy.copy(cache)
    # Everything is copied but the tensors that hold rows: selecting rows copies those.
    shared = {id(held): held for layer in cache.layers for held in _rows_of(vars(layer))}
    fork.layers = copy.deepcopy(cache.layers, shared)
    fork.reorder_cache(rows)
    if any(isinstance(layer, cache_utils.StaticLayer) for layer in fork.layers):
        fresh: list[Any] = DynamicCache(config=model.config).layers
        for i, layer in enumerate(fork.layers):
            if isinstance(layer, cache_utils.StaticLayer):
                _fill(fresh[i], layer)
                fork.layers[i] = fresh[i]
    return fork


def _rows_of(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested containers, but for counters, which have no axis."""
    if isinstance(value, Tensor):
        if value.dim():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _rows_of(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _rows_of(item)


def _fill(dynamic: cache_utils.DynamicLayer, static: cache_utils.StaticLayer) -> None:
    """Gives a fresh dynamic layer what a static one holds."""
    assert static.keys is not None
    assert static.values is not None
    length = int(static.get_seq_length())
    held = min(length, static.max_cache_len)
    dynamic.update(static.keys[:, :, :held], static.values[:, :, :held])
    if isinstance(dynamic, cache_utils.DynamicSlidingWindowLayer):
        dynamic.cumulative_length = length


def _is_mixed(layer: Any) -> bool:
    """Tells whether a layer is static and something else as well."""
    static = (cache_utils.StaticLayer, cache_utils.StaticSlidingWindowLayer)
    return isinstance(layer, cache_utils.StaticLayer) and type(layer) not in static
