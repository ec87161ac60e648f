"""Bursts: an LM generates several tokens of several rows without a word to the host.

All that the tokens need lies on the LM's device beforehand, and all that they show waits there
until the burst is over. On CUDA one step of each shape is captured as a graph and replayed.

Shapes: R rows of the LM's cache, W of them in a burst, B of these that move on, S tokens each,
V vocabulary, D size of a hidden state.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haltwise.engine.signal_reducer import copy_to_host, logprobs_of
from haltwise.errors import reason_of
from haltwise.policy.signals import Float, Index
from haltwise.session.signal_collector import NUM_TOP

Forward = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Feeds tokens (W, 1), at positions (W, 1) of their rows, stored in columns (W, 1) of the cache, of
which the first L are read; returns the next logits (W, V) and the last-layer states (W, D)."""

DeviceWork = Callable[[], None]
"""Something that a device does to tensors that stay where they are."""


# In place of a number in [0, 1) that a token is sampled with: it is the likeliest one.
LIKELIEST = -1.0


@dataclass(frozen=True)
class BurstShape:
    """What a step of a burst is captured for: another shape needs another capture."""

    width: int
    """W, the number of rows."""
    length: int
    """L, how many columns of the cache are read."""
    temperature: float
    """The temperature of sampling; 0 takes the likeliest token."""
    num_logprobs: int
    """How many log probabilities of each token are kept: 0 for none, 1 for its own, 1 + NUM_TOP
    for those of the likeliest tokens too."""


@dataclass(frozen=True)
class BurstStart:
    """Where the rows that move on in a burst stand; other rows only fill up its width."""

    places: Index
    """(B,) the place of each row among the first W of the cache."""
    logits: Tensor
    """(B, V) the logits of each row's next token, on the device."""
    positions: Index
    """(B,) the position where that token will stand."""
    scratch: int
    """A column of the cache that no row uses: the rows that fill up the width write there."""
    uniforms: Float | None = None
    """(S, B) the numbers in [0, 1), or `LIKELIEST`, that tokens are sampled with, if they are."""


class Burst:
    """The device's side of generating: buffers of fixed place and size, and one step over them.

    Args:
        logits: (R, V) a tensor of the shape and on the device that the buffer of logits is to have.
        hidden: (R, D) the same for the buffer of last-layer states; D is 0 if nobody wants them.
        most: The most tokens S of a burst.
        captures: Whether steps are captured as CUDA graphs.
    """

    def __init__(self, logits: Tensor, hidden: Tensor, most: int, captures: bool) -> None:
        """Makes the buffers."""
        self._device, self._captures = logits.device, captures
        #: (R, V) the logits of what follows; the first W rows are the burst's.
        self.logits = torch.zeros_like(logits)
        #: (R, D) the last-layer states of the newest tokens.
        self.hidden = torch.zeros_like(hidden)
        new, num_rows = partial(torch.zeros, device=self._device), len(logits)
        self._tokens = new(most, num_rows, dtype=torch.int64)
        self._logprobs = new(most, num_rows, 1 + NUM_TOP)
        self._uniforms = new(most, num_rows)
        # (R, 1) each: the position and the column of the next token, and what is added to both
        # after it, which is 1 where a row moves on and 0 where it only fills up.
        self._positions, self._columns, self._pace = new(3, num_rows, 1, dtype=torch.int64)
        # The number of tokens so far, where the device can see it.
        self._num = new(1, dtype=torch.int64)
        self.forget()

    def forget(self) -> None:
        """Drops all graphs, since what they read and write has moved."""
        self._graphs: dict[BurstShape, DeviceWork] = {}
        self._pool: Any = None

    def run(
        self, forward: Forward, shape: BurstShape, start: BurstStart, num: int
    ) -> tuple[Index, Float]:
        """Generates `num` tokens of each row; `logits` and `hidden` are then of the last ones.

        Returns:
            The tokens (S, B), -1 where the logits were not numbers (what follows is void), and the
            log probabilities (S, B, num_logprobs): the only copy to the host.
        """
        step = self._graphs.get(shape) or self._prepare(forward, shape, start.scratch)
        self._load(shape.width, start)
        for _ in range(num):
            step()
        tokens, logprobs = copy_to_host(
            self._tokens[:num, : shape.width],
            self._logprobs[:num, : shape.width, : shape.num_logprobs],
        )
        return tokens[:, start.places].astype(np.int64), logprobs[:, start.places]

    def step(self, forward: Forward, shape: BurstShape) -> None:
        """Chooses a token of each row, keeps what it shows, and feeds it."""
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

    def _load(self, width: int, start: BurstStart) -> None:
        """Puts rows in their places. A row that fills up stands still, at its beginning."""
        places = torch.from_numpy(start.places).to(self._device)
        self.logits[places] = start.logits
        where = np.tile(np.array([[0], [start.scratch], [0]]), width)
        where[:, start.places] = start.positions, start.positions, np.ones_like(start.positions)
        loaded = torch.from_numpy(where).to(self._device)[:, :, None]
        self._positions[:width], self._columns[:width], self._pace[:width] = loaded
        if start.uniforms is not None:
            uniforms = torch.from_numpy(start.uniforms).to(self._device)
            self._uniforms[: len(uniforms), places] = uniforms
        self._num.zero_()

    def _prepare(self, forward: Forward, shape: BurstShape, scratch: int) -> DeviceWork:
        """Returns the step of some shape, as a graph if steps are captured.

        Should capturing fail, a person is told once, and no step is captured from then on.
        """
        step = partial(self.step, forward, shape)
        if not self._captures:
            return step
        # Capturing runs the step, to warm up: here it writes where nobody reads.
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
            reason = reason_of(error)
            warnings.warn(
                f"no CUDA graph of this LM, tokens take longer: {reason}", RuntimeWarning, 2
            )
            return step


def capture(work: DeviceWork, device: torch.device, pool: Any) -> DeviceWork:
    """Captures work as a CUDA graph, after doing it once.

    Args:
        work: What is captured.
        device: A CUDA device.
        pool: A pool of memory, shared by graphs that never run at the same time.

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
    """Chooses the next token of each row.

    Sampling inverts the cumulative distribution:

        token = the first whose cumulative probability exceeds the uniform number

    Args:
        logits: (B, V) float32, the logits of the tokens.
        temperature: The temperature of sampling; 0 takes the likeliest token.
        uniforms: (B,) numbers in [0, 1), or `LIKELIEST`; only sampling looks at them.

    Returns:
        The tokens (B,), and whether the logits made sense (B,).
    """
    if not temperature:
        largest, tokens = logits.max(dim=-1)
        return tokens, largest.isfinite()
    assert uniforms is not None
    cumulative = (logits / temperature).softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, uniforms[:, None] * total, right=True)[:, 0]
    drawn = drawn.clamp(max=logits.shape[1] - 1)
    tokens = torch.where(uniforms == LIKELIEST, logits.argmax(dim=-1), drawn)
    return tokens, total[:, 0].isfinite()
