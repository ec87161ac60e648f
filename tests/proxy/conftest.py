"""No test of the proxy depends on how fast it is: what is given up early is given up late here."""

from collections.abc import Iterator

import pytest

from haltwise.proxy import app, second_leg, upstream
from tests.proxy.proxies import PATIENCE


@pytest.fixture(scope="session", autouse=True)
def patient() -> Iterator[None]:
    """A busy machine makes no proxy of this process give up what comes for sure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upstream, "_CALL_TIMEOUT", PATIENCE)
        patch.setattr(second_leg, "_SOON", PATIENCE)
        patch.setattr(app, "_CHECK_LASTS", PATIENCE)
        yield
