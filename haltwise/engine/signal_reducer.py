"""What an LM shows while it thinks, reduced on its device.

    reset  ->  add (every token), or take (a burst of them)  ->  read (at a decision point)

Recording, the live environments, `generate` and vLLM all measure with this code. A token
costs one log-softmax and one top-k, on a GPU over many tokens at once; what these give is copied
to the host once for each decision point.

Shapes: R rows, B of them in a call, V vocabulary, D size of a hidden state.
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from haltwise import Signals
from haltwise.engine.token_rules import TokenRules
from haltwise.policy.signals import MEASURED_FROM, Float, Index, signals_from
from haltwise.session.signal_collector import LOWEST_LOGPROB, NUM_TOP, SignalCollector
from haltwise.session.thought import Probe, Thought

#: The signals that are measured only if they are asked for.
MEASURED = signals_from(*MEASURED_FROM)

_LARGEST_HALF = 65504.0
# How many numbers of logits wait at most before they are reduced: many small works keep a GPU
# waiting (these are 32 MB), and what its caches do not hold keeps a CPU waiting.
_MOST_LOGITS, _MOST_LOGITS_ON_CPU = 2**23, 2**16
# How many passes of the LM wait at most before the host sees what they gave.
_MOST_PASSES = 512


class SignalReducer:
    """Reduces the logits of R thoughts to the signals of their decision points.

    Probabilities are the LM's own, at temperature 1, however its tokens are chosen.

    Args:
        rules: The rules by which all the thoughts are read.
        signals: Names of the wanted signals. Position and forced answers are always given.
        num_rows: R.
        device: The LM's device.
    """

    def __init__(
        self, rules: TokenRules, signals: Collection[str], num_rows: int, device: torch.device
    ) -> None:
        """Starts every row without a token."""
        self._rules = rules
        #: The names of what is measured.
        self.signals = tuple(name for name in MEASURED if name in signals)
        self._collector = SignalCollector(rules, self.signals, num_rows)
        reduces = self._collector.wants_logprobs
        #: How many log probabilities of a token `take` wants.
        self.num_logprobs = 1 + NUM_TOP if reduces else 0
        #: Whether the last-layer states are wanted.
        self.needs_hidden = "hidden" in self.signals
        #: Whether any logits are wanted.
        self.needs_logits = reduces or "end_think_logprob" in self.signals
        self._device = device
        self._most_logits = _MOST_LOGITS_ON_CPU if device.type == "cpu" else _MOST_LOGITS
        # What the collector has not seen yet: rows (B,) of each pass; the passes' logits (B, V)
        # and tokens (B,); and, in their place once reduced, log probabilities (N, 1 + NUM_TOP).
        self._rows: list[Index] = []
        self._passes: list[tuple[Tensor, Tensor]] = []
        self._reduced: list[Tensor] = []

    def reset(self, rows: Index) -> None:
        """Gives rows (B,) to new thoughts."""
        self._pass_on()
        self._collector.reset(rows)

    def add(self, rows: Index, logits: Tensor, tokens: Tensor) -> None:
        """Takes in a token of each of some rows.

        Args:
            rows: (B,) the rows, each at most once.
            logits: (B, V) the logits that led to the tokens; they are kept, so nobody may write
                into them.
            tokens: (B,) the tokens.
        """
        if not self.num_logprobs:
            return
        self._rows.append(rows.copy())
        self._passes.append((logits, tokens))
        if len(self._passes) * logits.numel() >= self._most_logits:
            self._reduce()
        if len(self._rows) == _MOST_PASSES:
            self._pass_on()

    def take(self, rows: Index, logprobs: Float) -> None:
        """Takes in tokens that have been reduced already.

        Args:
            rows: (N,) the row of each token, in the order of the tokens; a row may have several.
            logprobs: (N, num_logprobs) what `logprobs_of` gives of the tokens.
        """
        if self.num_logprobs:
            self._pass_on()
            self._collector.add(rows, logprobs[:, 0], logprobs[:, 1:])

    @torch.inference_mode()
    def read(
        self,
        rows: Index,
        thoughts: Sequence[Thought],
        logits: Tensor,
        hidden: Tensor | None = None,
        probes: Sequence[Probe] | None = None,
    ) -> Signals:
        """Returns what is seen of rows (B,) at their decision points, and begins anew.

        Args:
            rows: Each has had a token since its previous point.
            thoughts: The thoughts of the rows.
            logits: (B, V) the logits of what would follow.
            hidden: (B, D) last-layer states of the newest tokens, if they are wanted.
            probes: Forced answers of the rows, if anybody looked.
        """
        measured: dict[str, Tensor] = {}
        if "end_think_logprob" in self.signals:
            logprob = logits[:, self._rules.end_id] - logits.logsumexp(-1)
            measured["end_think_logprob"] = logprob.clamp(min=LOWEST_LOGPROB)
        if self.needs_hidden and hidden is not None:
            # As precise as a recording.
            bounded = hidden.to(self._device, torch.float32).clamp(-_LARGEST_HALF, _LARGEST_HALF)
            measured["hidden"] = bounded.half()
        seen = dict(zip(measured, self._pass_on(*measured.values()), strict=True))
        return self._collector.collect(rows, thoughts, probes, seen)

    @torch.inference_mode()
    def _reduce(self) -> None:
        """Reduces what has been added, on the device."""
        if self._passes:
            logits, tokens = map(torch.cat, zip(*self._passes, strict=True))
            self._reduced.append(logprobs_of(logits, tokens))
            self._passes.clear()

    @torch.inference_mode()
    def _pass_on(self, *others: Tensor) -> list[Float]:
        """Gives the collector what has waited; returns other tensors from the same copy."""
        if not self._rows and not others:
            return []
        self._reduce()
        tables = copy_to_host(*self._reduced, *others)
        num_reduced = len(self._reduced)
        if num_reduced:
            table = np.concatenate(tables[:num_reduced])
            self._collector.add(np.concatenate(self._rows), table[:, 0], table[:, 1:])
            self._rows.clear()
            self._reduced.clear()
        return tables[num_reduced:]


def logprobs_of(logits: Tensor, tokens: Tensor, num_top: int = NUM_TOP) -> Tensor:
    """Returns log probabilities (N, 1 + num_top) of tokens and of the likeliest in their places.

    Args:
        logits: (N, V) the logits that led to the tokens.
        tokens: (N,) the tokens.
        num_top: How many of the likeliest tokens to look at; if the vocabulary is smaller, it is
            filled up with -inf.
    """
    num = min(num_top, logits.shape[1])
    logprobs = logits.log_softmax(dim=-1)
    found = torch.cat([logprobs.gather(1, tokens[:, None]), logprobs.topk(num).values], dim=1)
    if num < num_top:
        found = torch.nn.functional.pad(found, (0, num_top - num), value=-torch.inf)
    return found


def copy_to_host(*tensors: Tensor) -> list[Float]:
    """Returns tensors of one device as float32 arrays on the host, which waits for the device once.

    A float32 number holds a token id exactly.
    """
    flat = torch.cat([tensor.flatten().float() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.reshape(t.shape).numpy() for part, t in zip(parts, tensors, strict=True)]
