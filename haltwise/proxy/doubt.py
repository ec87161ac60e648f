"""What a user does says how content it is: one that asks again doubts the answer it got."""

import re
from collections import OrderedDict

from haltwise.control.draws import check_key
from haltwise.control.record import digest
from haltwise.proxy.completion_request import CompletionRequest

# What a person says who doubts the answer before; longer messages ask for something else.
_DOUBT = re.compile(
    r"\b(are you (really )?(sure|certain)|(double|re-?)[- ]?check|check (that|it|this) again|"
    r"try again|think again|that('s| is|s)? (not|in)[- ]?(correct|right)|that('s| is|s)? wrong)\b",
    re.IGNORECASE,
)
_LONGEST_DOUBT = 200
# Sessions of which it is remembered what they have asked last.
_MOST_SESSIONS = 10_000


class Doubts:
    """Sees whether a session doubts its last answer; nothing that was said is kept.

    Args:
        key: By which digests of questions are made.

    Raises:
        InputError: If the key is none.
    """

    def __init__(self, key: bytes) -> None:
        """Has seen nothing yet."""
        check_key(key)
        self._key = key
        # By session, the digest of what it has asked last.
        self._asked: OrderedDict[str, str] = OrderedDict()

    def sees(self, session: str, request: CompletionRequest) -> bool:
        """Returns whether a request doubts the answer before, and remembers what it asks.

        Args:
            session: Its name, which no other tenant's session has; empty if it has none.
            request: What is asked.
        """
        if not session:
            return False
        asked = digest(self._key, request.question)
        before = self._asked.pop(session, None)
        self._asked[session] = asked
        if len(self._asked) > _MOST_SESSIONS:
            self._asked.popitem(last=False)
        return asked == before or says_doubt(request)

    def forget(self, session: str) -> None:
        """Forgets what a session has asked: it has got no answer that asking again could doubt."""
        self._asked.pop(session, None)


def says_doubt(request: CompletionRequest) -> bool:
    """Returns whether the last message of a chat says that the answer before may be wrong."""
    messages = request.body.get("messages") or []
    if len(messages) < 2 or [one.get("role") for one in messages[-2:]] != ["assistant", "user"]:
        return False
    said = messages[-1].get("content")
    return isinstance(said, str) and len(said) <= _LONGEST_DOUBT and bool(_DOUBT.search(said))
