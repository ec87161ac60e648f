"""Names on the Hugging Face Hub, told from names of files and folders, and asked for in time."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from haltwise import InputError
from haltwise.errors import reason_of

_OWNED = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
# Seconds that the hub has to answer before it counts as out of reach.
_PATIENCE = 5.0
# Names that a person is told of.
_MOST_NAMED = 5


def is_hub_name(name: str) -> bool:
    """Returns whether a text can only be OWNER/NAME of the hub, and no path on this machine.

    What cannot must not be looked up: where the hub cannot be reached, that takes seconds.
    """
    return _OWNED.fullmatch(name) is not None and not Path(name).parent.is_dir()


def nearby(name: str) -> str:
    """Returns, for the end of a message, what is where a path leads that is not there itself.

    The names most like its own come first; it is empty if the path leads nowhere.
    """
    path = Path(name)
    if "/" not in name or not path.parent.is_dir():
        return ""
    there = sorted(one.name for one in path.parent.iterdir() if not one.name.startswith("."))
    likely = get_close_matches(path.name, there, _MOST_NAMED) or there[:_MOST_NAMED]
    others = " ..." if len(likely) < len(there) else ""
    return f"; {path.parent} has {', '.join(likely) or 'nothing'}{others}"


def ask_hub(name: str, kind: Literal["model", "dataset"]) -> str:
    """Asks the hub, once and for a few seconds, whether it has an LM or a data set.

    If it cannot be asked, the packages that load from it are made to look into their caches alone,
    which is what they do in the end: each file would be asked for six times before.

    Args:
        name: OWNER/NAME.
        kind: What it is, in the hub's own word.

    Returns:
        Why the hub cannot be asked; empty if it has what is asked for.

    Raises:
        InputError: If it has nothing of that name that may be seen.
    """
    from huggingface_hub import HfApi, constants, is_offline_mode
    from huggingface_hub.errors import RepositoryNotFoundError

    if is_offline_mode():
        return "the hub is not asked, as HF_HUB_OFFLINE is set"
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=_PATIENCE)
    except RepositoryNotFoundError:
        raise InputError(
            f"the hub has no {kind} {name}, or shows it to others alone: expected OWNER/NAME as "
            "the hub spells it, and HF_TOKEN if it is private"
        ) from None
    except Exception as error:  # its own HTTP library's, another one in each version
        os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that are yet to start
        constants.HF_HUB_OFFLINE = True
        return f"the hub cannot be reached ({reason_of(error)})"
    return ""
