"""A language model and its tokenizer, by hub name or from a folder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from haltwise import InputError
from haltwise.hf import tokenizer_fingerprint
from lms.chat import Chat, ChatConfig, detect_chat
from lms.embedded import EMBEDDED

# Parameters; below it threads wait for each other more than they work.
_SMALL = 20_000_000


@dataclass(frozen=True, kw_only=True)
class LMConfig(ChatConfig):
    """Which LM, where it runs, and what is known about it."""

    lm: str = "embedded"
    """Hub name, local folder or GGUF file of the LM; embedded is the one of this repository."""
    device: str = "cpu"
    """Where the LM runs, as PyTorch names it."""


@dataclass(frozen=True)
class LanguageModel:
    """An LM that is ready to run."""

    name: str
    """Hub name, or the name of its folder."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat_config: ChatConfig = field(default_factory=ChatConfig)

    @classmethod
    def load(
        cls, name: str | Path, device: str = "cpu", chat: ChatConfig | None = None
    ) -> LanguageModel:
        """Loads whatever AutoModelForCausalLM loads; bfloat16 on a GPU, float32 on a CPU.

        A small LM makes PyTorch use one thread from then on, which is several times faster.

        Args:
            name: Hub name or local folder; "embedded" is the one of this repository.
            device: As PyTorch names it.
            chat: What is known about its chat.

        Raises:
            InputError: If there is no such LM or device, or the LM is damaged.
        """
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"cannot use device {device!r}: {reason}") from None
        disable_progress_bar()  # it is shown for the smallest LM, amid an error's one line
        name = EMBEDDED if str(name) == "embedded" else name
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise InputError(f"cannot load an LM from {str(name)!r}: {reason}") from None
        if model.num_parameters() < _SMALL:
            torch.set_num_threads(1)
        is_local = Path(name).is_dir()
        model.eval().to(device)
        name = Path(name).resolve().name if is_local else str(name)
        return cls(name, model, tokenizer, chat or ChatConfig())

    @cached_property
    def chat(self) -> Chat:
        """How it is asked and how it thinks."""
        return detect_chat(self.tokenizer, self.chat_config)

    def prompt(self, text: str) -> str:
        """The LM's whole input for what a user asks."""
        return self.chat.prompt(text)

    @property
    def temperature(self) -> float:
        """The LM's own sampling temperature; 0 if it prefers the likeliest token."""
        config = self.model.generation_config
        return float(config.temperature or 1.0) if config.do_sample else 0.0

    @cached_property
    def fingerprint(self) -> str:
        """Of the tokenizer."""
        return tokenizer_fingerprint(self.tokenizer)

    @cached_property
    def revision(self) -> str:
        """The hub's commit; for an LM from a folder the SHA-256 of its weights."""
        commit = getattr(self.model.config, "_commit_hash", None)
        if commit:
            return str(commit)
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy())
        return digest.hexdigest()
