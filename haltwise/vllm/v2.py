"""The requests of vLLM's V2 model runner, which gives them slots itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haltwise.vllm.step import Span, StepRows, on_device


class V2Slots:
    """The slots that V2 itself gives to requests."""

    def __init__(self, req_states: Any) -> None:
        """Reads where requests are kept."""
        self.num_slots: int = req_states.max_num_reqs
        self.device: torch.device = req_states.device
        self._states = req_states

    def rows(self, ctx: Any) -> StepRows:
        """The rows of this step."""
        slots = ctx.idx_mapping_np.astype(np.int64)
        length = ctx.seq_lens_upper_bound_np[: len(slots)].astype(np.int64)
        prompt = self._states.prompt_len.np[slots]
        # vLLM throws away what a prompt's earlier chunks give, and warms up without prompts.
        counts = (length >= self._states.prefill_len.np[slots]) & (prompt > 0)
        everyone = np.arange(len(slots))
        rows = StepRows(everyone, slots, length - prompt, everyone >= 0, ctx.input_ids)
        return rows.only(counts)

    def prompt(self, slot: int) -> list[int]:
        """A prompt's tokens."""
        tokens: list[int] = self._tokens[slot, : self._states.prompt_len.np[slot]].tolist()
        return tokens

    def generated(self, spans: Sequence[Span]) -> list[list[int]]:
        """Generated tokens in each of some spans: one copy."""
        lengths = [stop - start for _, start, stop in spans]
        slots = np.repeat([slot for slot, *_ in spans], lengths)
        places = np.concatenate([np.arange(start, stop) for _, start, stop in spans])
        places += self._states.prompt_len.np[slots]
        found = self._tokens[on_device(self.device, slots), on_device(self.device, places)].cpu()
        return [part.tolist() for part in found.split(lengths)]

    @property
    def _tokens(self) -> Tensor:
        """(slots, places) of prompts and what was generated."""
        tokens: Tensor = self._states.all_token_ids.gpu
        return tokens
