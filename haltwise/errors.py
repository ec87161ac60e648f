"""The one error that means the input is at fault, not haltwise."""


class InputError(ValueError):
    """What a person passed cannot be used.

    The message is one line that says what was found and what was expected.
    """


# Characters of somebody else's message that fit into one line of ours.
_LONGEST_REASON = 300


def reason_of(error: BaseException) -> str:
    """Returns what another library says went wrong, in one line: whole, or cut where it is long.

    Many messages go on after their first line with the very thing that a person needs.
    """
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= _LONGEST_REASON else f"{said[:_LONGEST_REASON].rstrip()} ..."
