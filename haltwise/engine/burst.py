"""Bursts: an LM generates several tokens of several rows without a word to the host.

All that the tokens need lies on the LM's device beforehand, and all that they show waits there
until the burst is over. On CUDA one step of each shape is captured as a graph and replayed.

Shapes: R rows at most, W of them in a burst, S tokens each, V vocabulary, D size of a hidden
state.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from haltwise.engine.signal_reducer import logprobs_of
from haltwise.policy.signals import Float, Index
from haltwise.session.token_statistics import NUM_TOP

Forward = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Feeds tokens (W, 1), at positions (W, 1) of their rows, stored in columns (W, 1) of the cache, of
which the first L are read; gives the next logits (W, V) and the last-layer states (W, D)."""

Work = Callable[[], None]


@dataclass(frozen=True)
class Shape:
    """What a step is captured for."""

    width: int
    """W"""
    length: int
    """L: columns of the cache that are read."""
    temperature: float
    """Of sampling; 0 takes the likeliest token."""
    num_logprobs: int
    """Kept of each token: 0 none, 1 its own, 1 + NUM_TOP those of the likeliest too."""


@dataclass(frozen=True)
class Start:
    """Where the rows of a burst stand."""

    logits: Tensor
    """(W, V) of their next tokens."""
    positions: Index
    """(W,) where those will stand."""
    moves: NDArray[np.bool_]
    """(W,) whether a row is really meant: the others only fill up the width."""
    scratch: int
    """Column of the cache that no row uses; the fillers write there."""
    uniforms: Float | None = None
    """(S, W) what each token is sampled with."""


class Burst:
    """The device's side of generating: buffers of fixed place and size, and one step over them.

    Args:
        num_rows: R.
        vocabulary: V.
        hidden: D, or 0 if nobody wants the states.
        device: The LM's.
        most: S at most.
        captures: Whether steps are captured as CUDA graphs.
    """

    def __init__(
        self,
        num_rows: int,
        vocabulary: int,
        hidden: int,
        device: torch.device,
        most: int,
        captures: bool,
    ) -> None:
        """Makes the buffers."""
        self._device, self._captures = device, captures
        new = partial(torch.zeros, device=device)
        #: (R, V) of what follows; the first W rows are the burst's.
        self.logits = new(num_rows, vocabulary)
        #: (R, D) of the newest tokens.
        self.hidden = new(num_rows, hidden)
        self._tokens = new(most, num_rows, dtype=torch.int64)
        self._logprobs = new(most, num_rows, 1 + NUM_TOP)
        self._uniforms = new(most, num_rows)
        self._positions = new(num_rows, 1, dtype=torch.int64)
        self._columns = torch.zeros_like(self._positions)
        # 1 where a row moves on, 0 where it only fills up.
        self._pace = torch.zeros_like(self._positions)
        # Tokens so far, where the device can see it.
        self._num = new(1, dtype=torch.int64)
        self.forget()

    def forget(self) -> None:
        """Drops all graphs: what they read and write has moved."""
        self._graphs: dict[Shape, Work] = {}
        self._pool: Any = None

    def run(self, forward: Forward, shape: Shape, start: Start, num: int) -> tuple[Index, Float]:
        """Generates `num` tokens of each row; `logits` and `hidden` are then of the last ones.

        Returns:
            Tokens (S, W), -1 where the logits were not numbers (what follows is void), and the
            logarithms (S, W, num_logprobs) of probabilities: the only copy to the host.
        """
        step = self._graphs.get(shape) or self._prepare(forward, shape, start.scratch)
        self._load(shape.width, start)
        for _ in range(num):
            step()
        tokens = self._tokens[:num, : shape.width]
        logprobs = self._logprobs[:num, : shape.width, : shape.num_logprobs]
        # float32 holds token ids exactly.
        flat = torch.cat([tokens.flatten().float(), logprobs.flatten()]).cpu().numpy()
        found = flat[: tokens.numel()].reshape(tokens.shape).astype(np.int64)
        return found, flat[tokens.numel() :].reshape(logprobs.shape)

    def step(self, forward: Forward, shape: Shape) -> None:
        """Chooses a token a row, keeps what it shows, and feeds it."""
        width = shape.width
        logits, num = self.logits[:width], self._num
        uniforms = self._uniforms[:, :width].index_select(0, num)[0]
        chosen, sound = choose(logits, shape.temperature, uniforms)
        self._tokens[:, :width].index_copy_(0, num, chosen.masked_fill(~sound, -1)[None])
        if shape.num_logprobs:
            seen = logprobs_of(logits, chosen, shape.num_logprobs - 1)
            kept = self._logprobs[:, :width, : shape.num_logprobs]
            kept.index_copy_(0, num, seen[None])
        positions, columns = self._positions[:width], self._columns[:width]
        new, hidden = forward(chosen[:, None], positions, columns, shape.length)
        logits.copy_(new)
        self.hidden[:width].copy_(hidden)
        positions.add_(self._pace[:width])
        columns.add_(self._pace[:width])
        num.add_(1)

    def _load(self, width: int, start: Start) -> None:
        """Puts rows in their places. A filler stands still, at its row's beginning."""
        self.logits[:width] = start.logits
        where = np.stack(
            [
                np.where(start.moves, start.positions, 0),
                np.where(start.moves, start.positions, start.scratch),
                start.moves.astype(np.int64),
            ]
        )
        loaded = torch.from_numpy(where).to(self._device)[:, :, None]
        self._positions[:width], self._columns[:width], self._pace[:width] = loaded
        if start.uniforms is not None:
            uniforms = torch.from_numpy(start.uniforms).to(self._device)
            self._uniforms[: len(uniforms), :width] = uniforms
        self._num.zero_()

    def _prepare(self, forward: Forward, shape: Shape, scratch: int) -> Work:
        """The step of some shape, as a graph where there are graphs."""
        step = partial(self.step, forward, shape)
        if not self._captures:
            return step
        # A step is run to warm up: one that writes where nobody reads.
        for buffer, value in ((self._positions, 0), (self._columns, scratch), (self._pace, 0)):
            buffer.fill_(value)
        self._num.zero_()
        try:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = self._graphs[shape] = capture(step, self._device, self._pool)
            return graph
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._captures = False
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"no CUDA graph of this LM, tokens take longer: {reason}", RuntimeWarning, 2
            )
            return step


def capture(work: Work, device: torch.device, pool: Any) -> Work:
    """Captures work as a CUDA graph, after doing it once.

    Args:
        work: Reads and writes tensors that stay where they are.
        device: A CUDA device.
        pool: Of memory, shared by graphs that never run at the same time.

    Returns:
        What does the work again.

    Raises:
        RuntimeError: If the work waits for the device, or cannot be captured for another reason.
    """
    with torch.cuda.device(device):
        aside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        aside.wait_stream(torch.cuda.current_stream())
        # A capture that fails leaves its stream current; the outer context does not.
        with torch.cuda.stream(aside):
            work()
            with torch.cuda.graph(graph, pool, aside, capture_error_mode="thread_local"):
                work()
        torch.cuda.current_stream().wait_stream(aside)
    return graph.replay


def choose(logits: Tensor, temperature: float, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
    """The next token of each row.

    Args:
        logits: (B, V) float32.
        temperature: Of sampling; 0 takes the likeliest token.
        uniforms: (B,) in [0, 1); only sampling looks at them.

    Returns:
        Tokens (B,), and whether the logits made sense (B,).
    """
    if temperature:
        assert uniforms is not None
        return sample(logits, temperature, uniforms)
    largest, tokens = logits.max(dim=-1)
    return tokens, largest.isfinite()


def sample(logits: Tensor, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draws one token a row by inverting the cumulative distribution.

        token = the first whose cumulative probability exceeds the uniform number

    Args:
        logits: (B, V) float32.
        temperature: Above 0.
        uniforms: (B,) in [0, 1).

    Returns:
        Tokens (B,), and whether the logits made sense (B,).
    """
    cumulative = (logits / temperature).softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, uniforms[:, None] * total, right=True)[:, 0]
    return tokens.clamp(max=logits.shape[1] - 1), total[:, 0].isfinite()
