"""Which tokenizer a head was trained with."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from haltwise.errors import InputError
from haltwise.head import HaltHead

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers that give every token the same id: 16 hex digits of a SHA-256."""
    vocabulary = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def check_tokenizer(head: HaltHead, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer that a head was not trained with.

    Raises:
        InputError: If the head names another one.
    """
    expected = head.config.tokenizer
    if expected and (found := tokenizer_fingerprint(tokenizer)) != expected:
        raise InputError(f"tokenizer is {found}, but the head was trained with {expected}")
