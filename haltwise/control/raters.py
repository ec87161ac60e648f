"""Who may say how content they were with an answer, and what that moves."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from haltwise.control.group_names import OF_TASK, TENANT, tenant_group
from haltwise.control.groups import Complained, Groups, Rated
from haltwise.control.record import Record, Whose, digest
from haltwise.errors import InputError

# Newest requests whose rows may not be written yet.
_MOST_RECENT = 10_000


@dataclass(frozen=True)
class Rater:
    """Who rates a request."""

    group: str
    """Its tenant's group; empty if it has none."""
    user: str = ""
    """The name of its user's dial; empty if it has none."""
    head: str | None = None
    """The head that has served it, where that was drawn; None is unknown."""
    probability: float | None = None
    """With which that was drawn."""

    def says(self, score: float) -> Rated | Complained:
        """Returns what a score says: a user moves its own dial alone."""
        return Rated(self.user, score) if self.user else Complained(self.group, 1.0 - score)


class Raters:
    """Knows of every request who rates it, and that nobody does so twice.

    Args:
        key: Of the installation, by which users and sessions are told apart.
        record: Has the requests of long ago, and those of other processes.
    """

    def __init__(self, key: bytes, record: Record) -> None:
        """Remembers nothing yet."""
        self._key, self._record = key, record
        # By newest request who rates it; None if nobody does, or somebody has.
        self._recent: OrderedDict[str, Rater | None] = OrderedDict()

    def rater_of(self, about: Mapping[str, Any]) -> Rater:
        """Returns whose feedback on a request counts, and for what.

        Args:
            about: What is known of the request.
        """
        tenant, user = (str(about.get(name) or "") for name in ("tenant", "user"))
        served = about.get("head"), about.get("head_probability")
        if not user:
            return Rater(tenant_group(about), "", *served)
        dial = self._dial(digest(self._key, tenant), digest(self._key, user))
        return Rater(tenant_group(about), dial, *served)

    def session_dial(self, about: Mapping[str, Any]) -> str:
        """Returns the name of the dial of a request's session; empty if it has none."""
        tenant, session = (str(about.get(name) or "") for name in ("tenant", "session"))
        if not session:
            return ""
        return f"{self._dial(digest(self._key, tenant), digest(self._key, session))} session"

    def unit_of(self, about: Mapping[str, Any]) -> str:
        """Returns the session of a request, else its user; empty if it has neither."""
        return self.session_dial(about) or self.rater_of(about).user

    def who_rates(self, request: str, groups: Groups) -> Rater:
        """Returns who rates a request that nobody has rated.

        Args:
            request: Its id.
            groups: Those that there are.

        Raises:
            InputError: If nobody can.
        """
        known = request in self._recent
        rater = self._recent[request] if known else self._of_record(request, groups)
        if rater is None or not (rater.user or rater.group):
            raise InputError(
                f"request {request!r:.80} is unknown, without user and tenant or rated already, "
                "expected an X-Haltwise-Request"
            )
        if not rater.user and not groups.takes(rater.group):
            raise InputError("there are too many groups, the tenant has none of its own")
        return rater

    def remember(self, request: str, rater: Rater | None) -> None:
        """Remembers who rates a request; None that somebody has."""
        self._recent[request] = rater
        if len(self._recent) > _MOST_RECENT:
            self._recent.popitem(last=False)

    def _of_record(self, request: str, groups: Groups) -> Rater | None:
        """Returns who rates a request that was long ago, or another process's."""
        whose = self._record.whose(request)
        if whose is None or whose.is_rated:
            return None
        served = whose.head, whose.head_probability
        if whose.user is not None:
            return Rater("", self._dial(whose.tenant, whose.user), *served)
        group = self._group_of(whose, groups)
        return None if group is None else Rater(group, "", *served)

    def _group_of(self, whose: Whose, groups: Groups) -> str | None:
        """Returns the group of a tenant whose digest alone is known."""
        for name in groups.groups if whose.tenant is not None else ():
            of_tenant, _, of_task = name.removeprefix(TENANT).partition(OF_TASK)
            told = [digest(self._key, one) if one else None for one in (of_tenant, of_task)]
            if name.startswith(TENANT) and told == [whose.tenant, whose.task]:
                return name
        return None

    def _dial(self, tenant: str | None, user: str) -> str:
        """Returns the name of a user's dial; digests, as tenants may call users the same."""
        return f"{tenant or digest(self._key, '')} {user}"
