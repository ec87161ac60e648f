"""An LM without its weights: all that the recorder needs of it while vLLM runs it."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from haltwise import InputError
from haltwise.errors import reason_of
from lms.language_model import (
    LOAD_ERRORS,
    LanguageModel,
    LMConfig,
    check_settings,
    load_tokenizer,
    short_name,
    source_of,
)

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


class WeightlessLM(LanguageModel):
    """An LM's name, tokenizer, chat and configuration; its model has shapes but no numbers."""

    @cached_property
    def revision(self) -> str:
        """The hub's commit of the LM, or the SHA-256 of its weights' files if it is in a folder."""
        commit = getattr(self.model.config, "_commit_hash", None)
        if commit:
            return str(commit)
        digest = hashlib.sha256()
        folder = Path(str(self.model.config.name_or_path))
        for path in sorted(path for kind in _WEIGHTS for path in folder.glob(kind)):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def load_weightless(config: LMConfig) -> WeightlessLM:
    """Loads all of an LM but its weights; shapes have the type that the weights would have.

    Raises:
        InputError: If there is no such LM, or its chat makes no sense.
    """
    source = source_of(config.lm)
    dtype = torch.float32 if torch.device(config.device).type == "cpu" else torch.bfloat16
    try:
        tokenizer = load_tokenizer(source)
        with torch.device("meta"):
            lm_config = AutoConfig.from_pretrained(source)
            model = AutoModelForCausalLM.from_config(lm_config, dtype=dtype)
        check_settings(source)
    except LOAD_ERRORS as error:
        reason = reason_of(error)
        raise InputError(f"cannot load an LM from {config.lm!r}: {reason}") from None
    with suppress(OSError):  # few LMs have none; then it follows from their config
        model.generation_config = GenerationConfig.from_pretrained(source)
    lm = WeightlessLM(short_name(config.lm, source), model, tokenizer, config)
    lm.set_end_tokens()
    return lm
