"""How token ids are read that are no texts of their own."""

from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from haltwise import MEAN_LOGPROB, Halting, InputError
from haltwise.engine.token_rules import TokenRules
from haltwise.session.thought import Thought

START, END = "\u25c1think\u25b7", "\u25c1/think\u25b7"


def of_bytes() -> Any:
    """A byte-level tokenizer whose tokens are the bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!")


def of_pieces() -> Any:
    """A tokenizer with SentencePiece's blanks, letters, and bytes for all else."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *"\u2581abcdefghijklmnopqrstuvwxyz/"]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "\u2581so", "\u2581the"])}
    merges = [("\u2581", "so"), ("s", "o"), ("\u2581", "the"), ("t", "h"), ("th", "e")]
    for piece in ("so", "th", "the"):
        vocabulary[piece] = len(vocabulary)
    order = [merges[1], merges[0], merges[3], merges[4], merges[2]]
    model = models.BPE(vocabulary, order, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<unk>")


@pytest.mark.parametrize("tokenizer", [of_bytes(), of_pieces()], ids=["bytes", "pieces"])
@pytest.mark.parametrize("after", ["\u7b49", " so the", "e\u0301\u00e9 so", "\U0001f914"])
def test_markers_and_texts_of_points_may_be_split_inside_of_characters(
    tokenizer: Any, after: str
) -> None:
    close = f"{END}\n"
    halting = Halting(
        "at_halt", f"after {after}", close, MEAN_LOGPROB, think_start=START, think_end=END
    )
    thought = Thought(TokenRules(tokenizer, halting))
    thinking = f"\u25c1 hm \u2661{after} a{after}b so{after} \u25c1/thin "
    text = START + thinking + END + after
    tokens = tokenizer.encode(text)
    sizes = [1 if p[:3] == "<0x" else len(p) for p in tokenizer.convert_ids_to_tokens(tokens)]
    num_blanks = sum(sizes) - len(text.encode())  # that the tokenizer puts before a text
    said, points, num_bytes = "", [], -num_blanks
    for token, size in zip(tokens, sizes, strict=True):
        thought.add(token)
        num_bytes += size
        said = text.encode()[: max(num_bytes, 0)].decode(errors="ignore")
        assert thought.begun == (START in said) and thought.closed == (END in said)
        points += [said] * thought.at_point
    assert said.endswith(END + after) and thought.closed
    assert [point.removeprefix(START).count(after) for point in points] == [1, 2, 3]
    assert all(point.endswith(after) for point in points)


def test_bytes_that_are_no_character_are_let_go() -> None:
    tokenizer = of_bytes()
    rules = TokenRules(tokenizer, Halting("at_halt", "after so", "</think>", MEAN_LOGPROB))
    (half,), half_of = tokenizer.encode("\u00e9")[:1], list[int]()
    texts = [rules.text_added(half_of, token) for token in [half] * 9 + tokenizer.encode("so")]
    assert "".join(texts).endswith("so") and half_of == []


def test_a_head_that_sees_no_answers_needs_no_confidence() -> None:
    tokenizer, halting = of_bytes(), Halting("at_halt", "every 4 tokens", "</think>", "")
    assert TokenRules(tokenizer, halting).every == 4
    with pytest.raises(InputError, match="confidence rule '' is none that can be run"):
        TokenRules(tokenizer, replace(halting, probing="always"))
