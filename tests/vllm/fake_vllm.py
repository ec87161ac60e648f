"""What of vLLM is needed here: the two interfaces of its logits processors, engines that drive one
as vLLM does, and an engine that takes requests as `vllm.LLM` does.

The real ones run in tests/vllm_engine.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from importlib import import_module
from random import Random
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

Lm = Callable[["Request"], Tensor]

PLACEHOLDER = -1


class MoveDirectionality(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


@dataclass(frozen=True)
class BatchUpdate:
    batch_size: int
    removed: list[int]
    added: list[Any]
    moved: list[tuple[int, int, MoveDirectionality]]


class V1Processor(ABC):
    @abstractmethod
    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None: ...

    @abstractmethod
    def apply(self, logits: Tensor) -> Tensor: ...

    @abstractmethod
    def is_argmax_invariant(self) -> bool: ...

    @abstractmethod
    def update_state(self, batch_update: BatchUpdate | None) -> None: ...


class V2Processor(ABC):  # noqa: B024
    def apply_staged_writes(self) -> None:  # noqa: B027
        pass


@contextmanager
def plugin(has_v2: bool = True) -> Iterator[Any]:
    """The module haltwise.vllm, imported beside these interfaces."""
    interfaces: dict[str, dict[str, Any]] = {
        "vllm.v1.sample.logits_processor": {
            "LogitsProcessor": V1Processor,
            "MoveDirectionality": MoveDirectionality,
        },
        "vllm.tokenizers": {"cached_tokenizer_from_config": lambda config: config.tokenizer},
        "vllm": {"SamplingParams": SimpleNamespace},
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(DELTA=1)},
    }
    of_v2 = "vllm.v1.worker.gpu.sample.logits_processor"
    if has_v2:
        interfaces[of_v2] = {"LogitsProcessor": V2Processor}
    with pytest.MonkeyPatch.context() as patch:
        for name, content in interfaces.items():
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                part = ".".join(parts[:end])
                if part not in sys.modules:
                    patch.setitem(sys.modules, part, ModuleType(part))
            vars(sys.modules[name]).update(content)
        if not has_v2:
            patch.setitem(sys.modules, of_v2, None)
        forget_plugin()
        yield import_module("haltwise.vllm")
        forget_plugin()


def forget_plugin() -> None:
    """Lets the next import of haltwise.vllm, and of what is in it, be the first."""
    for name in [name for name in sys.modules if name.startswith("haltwise.vllm")]:
        del sys.modules[name]


def config(folder: str | None, tokenizer: Any, **changes: Any) -> Any:
    """A vLLM config, as far as processors read it; more of `haltwise` by keyword."""
    stated = {} if folder is None else {"head": folder}
    return SimpleNamespace(
        additional_config={"haltwise": stated | changes},
        speculative_config=None,
        model_config=SimpleNamespace(
            tokenizer=tokenizer,
            logits_processors=["haltwise.vllm:HaltProcessor"],
            get_vocab_size=lambda: len(tokenizer),
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=4, async_scheduling=True),
        parallel_config=SimpleNamespace(rank=0, tensor_parallel_size=1),
    )


def params(
    asked: dict[str, Any] | None,
    max_tokens: int | None = None,
    ends: tuple[int, ...] = (),
    temperature: float = 0.0,
) -> Any:
    """Sampling parameters, as far as processors read them."""
    return SimpleNamespace(
        extra_args=asked if asked is None else dict(asked),
        max_tokens=max_tokens,
        ignore_eos=False,
        stop_token_ids=[],
        all_stop_token_ids=set(ends),
        temperature=temperature,
    )


@dataclass
class Request:
    """One request and what was generated for it."""

    name: int
    prompt: list[int]
    num_tokens: int
    asked: dict[str, Any] = field(default_factory=dict)
    output: list[int] = field(default_factory=list)
    num_chunks: int = 1
    """Steps that prefill takes."""
    ends: tuple[int, ...] = ()
    """Tokens that end it."""
    temperature: float = 0.0

    def __post_init__(self) -> None:
        self.params = params(self.asked, self.num_tokens, self.ends, self.temperature)

    @property
    def is_done(self) -> bool:
        return len(self.output) >= self.num_tokens or self.output[-1:] in [[t] for t in self.ends]

    def take(self, logits: Tensor) -> None:
        """Takes a token, or throws it away in prefill."""
        self.num_chunks -= 1
        if self.num_chunks < 1:
            self.output.append(self.choose(logits))

    def choose(self, logits: Tensor) -> int:
        """Samples the next token: the draws hang on the request and its place in it alone."""
        if not self.temperature:
            return int(logits.argmax())
        noise = np.random.default_rng([self.name, len(self.output), 1]).gumbel(size=len(logits))
        return int((logits / self.temperature + torch.from_numpy(noise)).argmax())


class V1Engine:
    """Batches requests as the V1 model runner does, in an order drawn at random.

    Requests are preempted and come back, rows are condensed and swapped.
    """

    def __init__(self, processor: Any, lm: Lm, order: Random, is_async: bool = False) -> None:
        self.processor, self.lm, self.order, self.is_async = processor, lm, order, is_async
        self.rows: list[Request] = []
        # What the processor was given: vLLM makes a new list when a request comes back.
        self.shown: dict[int, list[int]] = {}

    def run(self, requests: list[Request], max_num_reqs: int = 4) -> None:
        waiting = list(requests)
        while waiting or self.rows:
            self.processor.update_state(self.schedule(waiting, max_num_reqs))
            if self.rows:
                self.step()

    def schedule(self, waiting: list[Request], max_num_reqs: int) -> BatchUpdate | None:
        rows: list[Request | None] = list(self.rows)
        for row, request in enumerate(self.rows):
            if request.is_done or self.order.random() < 0.05:
                rows[row] = None
                if not request.is_done:
                    waiting.insert(0, request)
        removed = [row for row, request in enumerate(rows) if request is None]
        added: list[Any] = []
        moved: list[Any] = []
        while waiting and len(rows) - len(removed) < max_num_reqs and self.order.random() < 0.7:
            if not removed:
                rows.append(None)
            row = removed.pop(0) if removed else len(rows) - 1
            rows[row] = request = waiting.pop(0)
            added.append((row, request.params, request.prompt, self.show(request)))
        while None in rows:
            last = rows.pop()
            if last is not None:
                hole = rows.index(None)
                rows[hole] = last
                removed.remove(hole)
                moved.append((len(rows), hole, MoveDirectionality.UNIDIRECTIONAL))
        self.rows = [request for request in rows if request is not None]
        if len(self.rows) > 1 and self.order.random() < 0.3:
            one, other = self.order.sample(range(len(self.rows)), 2)
            self.rows[one], self.rows[other] = self.rows[other], self.rows[one]
            moved.append((one, other, MoveDirectionality.SWAP))
        if not (removed or added or moved):
            return None
        return BatchUpdate(len(self.rows), removed, added, moved)

    def show(self, request: Request) -> list[int]:
        request.num_chunks = self.order.choice([1, 1, 2, 3])
        self.shown[request.name] = list(request.output) if self.is_async else request.output
        return self.shown[request.name]

    def step(self) -> None:
        logits = torch.stack([self.lm(request) for request in self.rows])
        for request, row in zip(self.rows, self.processor.apply(logits), strict=True):
            request.take(row)
            self.shown[request.name][:] = request.output


class V2Engine:
    """Gives requests slots as the V2 model runner does, in an order drawn at random."""

    def __init__(self, processor: Callable[[Any], Any], lm: Lm, order: Random) -> None:
        self.lm, self.order = lm, order
        self.tokens = torch.zeros(4, 256, dtype=torch.int32)
        self.states = SimpleNamespace(
            device=torch.device("cpu"),
            max_num_reqs=4,
            all_token_ids=SimpleNamespace(gpu=self.tokens),
            prompt_len=SimpleNamespace(np=np.zeros(4, dtype=np.int32)),
            prefill_len=SimpleNamespace(np=np.zeros(4, dtype=np.int32)),
        )
        self.processor = processor(self.states)
        self.slots: dict[int, Request] = {}
        self.staged: dict[int, list[int]] = {}

    def run(self, requests: list[Request]) -> None:
        waiting = list(requests)
        while waiting or self.slots:
            self.slots = {s: r for s, r in self.slots.items() if not r.is_done}
            while waiting and len(self.slots) < 4 and self.order.random() < 0.7:
                self.add(waiting.pop(0))
            for slot, known in self.staged.items():
                self.tokens[slot, : len(known)] = torch.tensor(known)
            self.staged.clear()
            self.processor.apply_staged_writes()
            if self.slots:
                self.step()

    def add(self, request: Request) -> None:
        slot = self.order.choice(sorted(set(range(4)) - set(self.slots)))
        self.slots[slot] = request
        known = [*request.prompt, *request.output]
        self.states.prompt_len.np[slot] = len(request.prompt)
        self.states.prefill_len.np[slot] = len(known)
        self.staged[slot] = known
        request.num_chunks = min(self.order.choice([1, 1, 2]), len(request.prompt))
        self.processor.add_request(slot, request.params)

    def step(self) -> None:
        slots = self.order.sample(sorted(self.slots), self.order.randint(1, len(self.slots)))
        batch = [self.slots[slot] for slot in slots]
        lengths = [len(r.prompt) + len(r.output) - max(r.num_chunks - 1, 0) for r in batch]
        newest = [int(self.tokens[s, n - 1]) for s, n in zip(slots, lengths, strict=True)]
        ctx = SimpleNamespace(
            idx_mapping_np=np.array(slots, dtype=np.int32),
            seq_lens_upper_bound_np=np.array([*lengths, 0], dtype=np.int32),
            input_ids=torch.tensor(newest, dtype=torch.int32),
        )
        logits = torch.stack([self.lm(request) for request in batch])
        for slot, request, row in zip(slots, batch, self.processor.apply(logits, ctx), strict=True):
            request.take(row)
            if request.output:
                place = len(request.prompt) + len(request.output) - 1
                self.tokens[slot, place] = request.output[-1]


class FakeLLM:
    """As much of `vllm.LLM` as a batch job uses, around a model of transformers.

    A step takes some of its requests, drawn at random, a token further.
    """

    def __init__(self, model: Any, tokenizer: Any, order: Random, **of_model: Any) -> None:
        self.model, self.tokenizer, self.order = model, tokenizer, order
        self.llm_engine = self
        facts = {"max_logprobs": 20, "logprobs_mode": "raw_logprobs", "max_model_len": 2048}
        self.model_config = SimpleNamespace(
            try_get_generation_config=model.generation_config.to_dict,
            get_vocab_size=lambda: model.config.vocab_size,
            **facts | of_model,
        )
        self.vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=3),
            cache_config=SimpleNamespace(enable_prefix_caching=True),
        )
        self.requests: dict[str, tuple[list[int], Any, list[int], Any]] = {}
        self.num_generated = self.most_at_once = 0
        self.seeds: list[int] = []

    def get_tokenizer(self) -> Any:
        return self.tokenizer

    def get_num_unfinished_requests(self) -> int:
        return len(self.requests)

    def add_request(self, name: str, prompt: dict[str, list[int]], params: Any) -> None:
        assert params.max_tokens > 0 and params.ignore_eos and params.output_kind == 1
        draws = None
        if params.temperature:
            self.seeds.append(params.seed)
            draws = torch.Generator().manual_seed(params.seed)
        self.requests[name] = list(prompt["prompt_token_ids"]), params, [], draws
        self.most_at_once = max(self.most_at_once, len(self.requests))

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            del self.requests[name]

    def step(self) -> list[Any]:
        names = self.order.sample(sorted(self.requests), self.order.randint(1, len(self.requests)))
        return [self.extend(name) for name in names]

    @torch.inference_mode()
    def extend(self, name: str) -> Any:
        prompt, params, tokens, draws = self.requests[name]
        self.num_generated += 1
        ids = torch.tensor([[*prompt, *tokens]])
        out = self.model(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None])
        logits = out.logits[0, -1].float()
        logprobs = logits.log_softmax(-1)
        if only := getattr(params, "allowed_token_ids", None):
            logits[[token for token in range(len(logits)) if token not in only]] = -torch.inf
        token = int(logits.argmax())
        if draws is not None:
            chances = (logits / params.temperature).softmax(-1)
            token = int(chances.multinomial(1, generator=draws))
        tokens.append(token)
        table = [float(logprobs[token]), *logprobs.topk(params.logprobs).values.tolist()]
        stops = token in params.stop_token_ids
        is_last = stops or len(tokens) == params.max_tokens
        if is_last:
            del self.requests[name]
        new = SimpleNamespace(
            token_ids=[token],
            logprobs=SimpleNamespace(logprobs=table),
            finish_reason=("stop" if stops else "length") if is_last else None,
        )
        return SimpleNamespace(request_id=name, finished=is_last, outputs=[new])
