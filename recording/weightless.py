"""An LM without its weights: all that is asked of it while another program runs it."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from haltwise import InputError
from lms.embedded import EMBEDDED
from lms.gguf_file import folder_of, is_gguf
from lms.language_model import LanguageModel, LMConfig

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


class WeightlessLM(LanguageModel):
    """Name, tokenizer, chat and configuration of an LM; its model has shapes but no numbers."""

    @cached_property
    def revision(self) -> str:
        """The hub's commit; for an LM from a folder the SHA-256 of its files of weights."""
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


def source_of(name: str) -> str:
    """The hub name or folder behind an LM's name.

    Raises:
        InputError: If it is a GGUF file that cannot be read.
    """
    if name == "embedded":
        return str(EMBEDDED)
    return str(folder_of(Path(name))) if is_gguf(name) else name


def load_weightless(config: LMConfig) -> WeightlessLM:
    """Loads all of an LM but its weights, in the type that they would have.

    Raises:
        InputError: If there is no such LM, or its chat makes no sense.
    """
    source = source_of(config.lm)
    dtype = torch.float32 if torch.device(config.device).type == "cpu" else torch.bfloat16
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        with torch.device("meta"):
            lm_config = AutoConfig.from_pretrained(source)
            model = AutoModelForCausalLM.from_config(lm_config, dtype=dtype)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"cannot load an LM from {config.lm!r}: {reason}") from None
    with suppress(OSError):  # few LMs have none; then it follows from their config
        model.generation_config = GenerationConfig.from_pretrained(source)
    if is_gguf(config.lm):
        name = Path(config.lm).stem
    else:
        name = Path(source).resolve().name if Path(source).is_dir() else config.lm
    lm = WeightlessLM(name, model, tokenizer, config)
    lm._set_end_tokens()
    return lm
