from haltwise.errors import reason_of


def test_a_reason_is_one_line_and_whole() -> None:
    assert reason_of(ValueError("cannot load:\n  (1) sentencepiece\n\n  (2) tiktoken ")) == (
        "cannot load: (1) sentencepiece (2) tiktoken"
    )
    assert reason_of(KeyError()) == "KeyError"
    assert reason_of(ValueError("ab " * 200)) == "ab " * 99 + "ab ..."
