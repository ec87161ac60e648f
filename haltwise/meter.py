"""What an LM shows while it thinks, reduced on its device.

    reset  ->  add (every token)  ->  read (at a decision point)  ->  reset

Recording, the live environments and `generate` all measure with this code.

Shapes: R rows, B of them in a call, V vocabulary, D size of a hidden state.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haltwise.reflections import num_reflections
from haltwise.signals import Index, Signals, answer_keys
from haltwise.thought import Probe, Thought, ThoughtRules

_STEPWISE = ("entropy", "max_entropy", "logprob", "min_logprob", "margin")
#: The signals that are measured only if they are asked for.
MEASURED = (*_STEPWISE, "end_think_logprob", "num_reflections", "hidden")

# Nats. It stands for impossible tokens too: signals are finite.
_LOWEST_LOGPROB = -1e4
_LARGEST_HALF = 65504.0


class SignalMeter:
    """Measures R thoughts between their decision points.

    Probabilities are the LM's own, at temperature 1, however its tokens are chosen.

    Args:
        rules: Shared by the thoughts.
        signals: Names of the wanted signals. Position and forced answer need no measuring.
        num_rows: R.
        device: The LM's.
    """

    def __init__(
        self, rules: ThoughtRules, signals: Collection[str], num_rows: int, device: torch.device
    ) -> None:
        """Starts every row without a token."""
        self._rules = rules
        #: What is measured.
        self.signals = tuple(name for name in MEASURED if name in signals)
        self._steps = not set(_STEPWISE).isdisjoint(self.signals)
        self.needs_hidden = "hidden" in self.signals
        self.needs_logits = self._steps or "end_think_logprob" in self.signals
        self._device = device
        # (R,) tokens since the previous point; sum and smallest of their `_sureness` (R, 3).
        self._num_tokens: Index = np.zeros(num_rows, dtype=np.int64)
        self._sum = torch.zeros(num_rows, 3, device=device)
        self._smallest = torch.zeros(num_rows, 3, device=device)

    @torch.inference_mode()
    def reset(self, rows: Index) -> None:
        """Begins anew after a decision point of rows (B,), or with new thoughts."""
        self._num_tokens[rows] = 0
        if self._steps:
            index = self._index(rows)
            self._sum[index] = 0.0
            self._smallest[index] = torch.inf

    @torch.inference_mode()
    def add(self, rows: Index, logits: Tensor, tokens: Tensor) -> None:
        """Takes in a token (B,) of each of rows (B,), and the logits (B, V) that led to it."""
        self._num_tokens[rows] += 1
        if self._steps:
            index, values = self._index(rows), _sureness(logits, tokens)
            self._sum[index] += values
            self._smallest[index] = torch.minimum(self._smallest[index], values)

    @torch.inference_mode()
    def read(
        self,
        rows: Index,
        thoughts: Sequence[Thought],
        logits: Tensor,
        hidden: Tensor | None = None,
        probes: Sequence[Probe] | None = None,
    ) -> Signals:
        """What is seen of rows (B,) at their decision points.

        Args:
            rows: Each has had a token since it was reset.
            thoughts: Of those rows.
            logits: (B, V) of what would follow.
            hidden: (B, D) last-layer states of the newest tokens, if they are wanted.
            probes: Forced answers of those rows, if anybody looked.
        """
        seen = self._measured(rows, logits, hidden)
        if "num_reflections" in self.signals:
            numbers = [
                num_reflections(thought.tokens, num, self._rules.decode)
                for thought, num in zip(thoughts, self._num_tokens[rows].tolist(), strict=True)
            ]
            seen["num_reflections"] = np.array(numbers, dtype=np.float32)
        if probes is not None:
            seen |= _of_answers(probes)
        if self._rules.max_points is not None:
            num_points = np.array([thought.num_points for thought in thoughts], dtype=np.int64)
            seen["points_left"] = self._rules.max_points - num_points
        position = np.array([thought.position for thought in thoughts], dtype=np.int64)
        return Signals(position, **seen)

    def _measured(self, rows: Index, logits: Tensor, hidden: Tensor | None) -> dict[str, Any]:
        """The wanted signals that are on the device: one copy to the host."""
        seen: dict[str, Tensor] = {}
        if self._steps:
            index = self._index(rows)
            mean = self._sum[index] / self._index(self._num_tokens[rows])[:, None]
            smallest = self._smallest[index]
            seen = {"entropy": -mean[:, 0], "logprob": mean[:, 1], "margin": mean[:, 2]}
            seen |= {"max_entropy": -smallest[:, 0], "min_logprob": smallest[:, 1]}
        if "end_think_logprob" in self.signals:
            seen["end_think_logprob"] = log_probabilities(logits)[:, self._rules.end_id]
        names = list(seen)
        if self.needs_hidden:
            assert hidden is not None
            # As precise as a recording.
            bounded = hidden.to(self._device, torch.float32).clamp(-_LARGEST_HALF, _LARGEST_HALF)
            seen["hidden"] = bounded.half().float()
        if not seen:
            return {}
        table = torch.column_stack(tuple(seen.values())).cpu().numpy()
        found = {name: table[:, i] for i, name in enumerate(names) if name in self.signals}
        return found | ({"hidden": table[:, len(names) :]} if self.needs_hidden else {})

    def _index(self, values: Index) -> Tensor:
        return torch.from_numpy(values).to(self._device)


def _of_answers(probes: Sequence[Probe]) -> dict[str, Any]:
    """Signals (B,) of forced answers."""
    return {
        "confidence": np.array([probe.confidence for probe in probes], dtype=np.float32),
        "answer": answer_keys([probe.answer for probe in probes]),
        "worst_logprob": np.array([probe.worst_logprob for probe in probes], dtype=np.float32),
        "probe_tokens": np.array([probe.num_tokens for probe in probes], dtype=np.int64),
    }


def log_probabilities(logits: Tensor) -> Tensor:
    """Of every token at temperature 1, (B, V), nats; at least -10,000, also if impossible."""
    return logits.log_softmax(dim=-1).clamp(min=_LOWEST_LOGPROB)


def _sureness(logits: Tensor, tokens: Tensor) -> Tensor:
    """Negative entropy, log probability and margin (B, 3) of tokens (B,): each large if sure."""
    logprobs = log_probabilities(logits)
    likeliest = logprobs.topk(2).values.exp()
    return torch.stack(
        [
            (logprobs.exp() * logprobs).sum(dim=-1),
            logprobs.gather(1, tokens[:, None])[:, 0],
            likeliest[:, 0] - likeliest[:, 1],
        ],
        dim=1,
    )
