"""How requests are sampled, beside how the head's traces were: sampled otherwise, LMs think so."""

import json
import math
from collections.abc import Mapping

from haltwise.proxy.metrics import Metrics, log
from haltwise.proxy.wire import Json

# Samplers beside the temperature, and what each is at or beyond where it does nothing.
_IDLE = {"top_k": 0.0, "top_p": 1.0, "min_p": 0.0}
#: What requests and servers tell of sampling.
SAMPLING = ("temperature", *_IDLE)
# Relative difference of two temperatures that are one, told in 32 bits.
_OF_FLOATS = 1e-6


class SamplingWatch:
    """Notes requests that are sampled otherwise than the head's traces, and warns of the first.

    Args:
        metrics: Where temperatures are counted.
    """

    def __init__(self, metrics: Metrics) -> None:
        """Has not warned of anything yet."""
        self._metrics = metrics
        self._told: set[str] = set()

    def note(self, own: Mapping[str, float], body: Json, recorded: object) -> Json:
        """Returns what is other than in the head's traces, for the request's line of the log.

        Args:
            own: How the server samples requests that name nothing, as far as it tells.
            body: The request's.
            recorded: The temperature of the traces, if their recorder has told it: it samples by
                nothing else.
        """
        named = numbers_in(body)
        asked = {**own, **named}
        temperature = asked.get("temperature")
        if temperature is None or not isinstance(recorded, int | float):
            return {}
        found: Json = {}
        if not math.isclose(temperature, recorded, rel_tol=_OF_FLOATS):
            self._metrics.other_temperatures.inc()
            found["temperature"] = float(f"{temperature:g}")
            whose = "a client's" if "temperature" in named else "the server's own"
            self._tell_once(
                "temperature",
                f"a request of temperature {temperature:g}, {whose}; the head's traces have "
                f"{recorded:g}: saving and loss are others at another one",
            )
        if beside := _beside(asked) if temperature else {}:
            found |= beside
            self._tell_once(
                "samplers",
                "a request is sampled by "
                f"{', '.join(f'{name} {value:g}' for name, value in beside.items())} beside the "
                "temperature, the head's traces were by that alone: saving and loss may be others. "
                "Expected requests with top_k 0, top_p 1 and min_p 0, or a server that has these "
                "by itself (llama-server --samplers temperature)",
            )
        return found

    def _tell_once(self, what: str, told: str) -> None:
        if what not in self._told:
            self._told.add(what)
            log.warning(json.dumps({"warning": told}))


def numbers_in(told: object) -> dict[str, float]:
    """Returns what a request's body, or a server's settings, tell of sampling."""
    found = {name: told.get(name) for name in SAMPLING} if isinstance(told, dict) else {}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def _beside(sampling: Mapping[str, float]) -> Json:
    """Returns the samplers beside the temperature that do something."""
    limits = {name: sampling.get(name, idle) for name, idle in _IDLE.items()}
    does = {name: value < 1 if name == "top_p" else value > 0 for name, value in limits.items()}
    return {name: float(f"{limits[name]:g}") for name in limits if does[name]}
