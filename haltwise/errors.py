"""The one error that means the input is at fault, not haltwise."""


class InputError(ValueError):
    """What a person passed cannot be used.

    The message is one line that says what was found and what was expected.
    """
