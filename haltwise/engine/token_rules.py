"""How an LM's token ids are read: thoughts, forced answers, ends, and whose ids they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from haltwise import HaltHead, Halting, InputError
from haltwise.session.thought import PointRules

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

# What stands for bytes that are no character, or not yet; and how many bytes a character has.
_HALF = "\ufffd"
_MOST_BYTES = 4
# The size and the fingerprint of each tokenizer in use: reading a large vocabulary takes a tenth of
# a second, and every call of `generate` asks.
_known: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, str]] = WeakKeyDictionary()


class TokenRules(PointRules):
    """How thoughts are read from an LM's tokens, and how they are closed.

    Args:
        tokenizer: The LM's tokenizer.
        halting: It has the decision rule, the markers, the close text, and how answers end and are
            read.

    Raises:
        InputError: If the decision or confidence rule cannot be run, or a text that closes a
            thought has no tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, halting: Halting) -> None:
        """Encodes the texts that close a thought."""
        super().__init__(halting)
        halting.check_runnable()
        self.tokenizer = tokenizer
        self.close_ids = self._encode(halting.close_text)
        if not (self.think_end or tokenizer.eos_token):
            raise InputError(
                "the tokenizer has no eos_token: expected one, for an LM that reasons in the open"
            )
        #: The token with which the LM itself begins to close a thought.
        self.end_id = self._encode(self.think_end or tokenizer.eos_token or "")[0]
        self._texts: dict[int, str] = {}
        self._word: list[int] = tokenizer.encode("a", add_special_tokens=False)

    def text_added(self, half: list[int], token: int) -> str:
        """Returns the text that the next token id adds, also if the token is special.

        A character whose bytes are several tokens is added by the last of them.

        Args:
            half: The ids before it whose last character has not ended; it is kept up to date.
            token: The id.
        """
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self._decode_amid([token])
        if not half and not text.endswith(_HALF):
            return text
        before = self._decode_amid(half).rstrip(_HALF)
        half.append(token)
        found = self._decode_amid(half)
        settled = found.rstrip(_HALF)
        if settled == found or len(half) >= _MOST_BYTES:
            half.clear()
        return settled.removeprefix(before)

    def _decode_amid(self, tokens: list[int]) -> str:
        """Returns what some ids add to a text; many tokenizers drop the blank at its start."""
        before = self.decode(self._word, skip_special_tokens=False)
        text = self.decode([*self._word, *tokens], skip_special_tokens=False)
        if text.startswith(before):
            return text.removeprefix(before)
        return self.decode(tokens, skip_special_tokens=False)

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of some token ids."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))

    def spelt_close(self) -> str:
        """Returns what the tokens of the close text spell: another text if some are unknown."""
        return self.decode(self.close_ids, skip_special_tokens=False)

    def _encode(self, text: str) -> list[int]:
        """Returns the token ids of a text that closes a thought."""
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        if not tokens:
            raise InputError(f"close text {text!r} has no tokens: nothing to close")
        return tokens


def end_tokens(config: GenerationConfig, eos: int | list[int] | None = None) -> list[int]:
    """Returns the tokens that end what an LM generates.

    Args:
        config: The LM's generation config.
        eos: The end tokens of one call, if it names any.

    Raises:
        InputError: If there is none.
    """
    eos = config.eos_token_id if eos is None else eos
    if eos is None:
        raise InputError("the LM's generation config has no eos_token_id: nothing ends an answer")
    return list(eos) if isinstance(eos, list) else [eos]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns 16 hex digits of a SHA-256 of a tokenizer's vocabulary.

    They are equal for tokenizers that give every token the same id.
    """
    size, found = _known.get(tokenizer, (-1, ""))
    if size != len(tokenizer):
        vocabulary = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items())
        found = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]
        _known[tokenizer] = len(tokenizer), found
    return found


def check_tokenizer(head: HaltHead, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer that a head was not trained with.

    Raises:
        InputError: If the head names another tokenizer.
    """
    expected = head.config.tokenizer
    if expected and (found := tokenizer_fingerprint(tokenizer)) != expected:
        raise InputError(f"tokenizer is {found}, but the head was trained with {expected}")
