"""Names on the Hugging Face Hub, told from names of files and folders."""

import re

_OWNED = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def is_hub_name(name: str) -> bool:
    """Returns whether a text can be OWNER/NAME of the hub.

    What cannot must not be looked up: where the hub cannot be reached, that takes a minute.
    """
    return _OWNED.fullmatch(name) is not None
