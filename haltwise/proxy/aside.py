"""Work on large bodies beside the event loop, which all streams wait for."""

import json
from collections.abc import Callable
from json.scanner import py_make_scanner  # type: ignore[attr-defined]
from typing import Any, TypeVar

import anyio.to_thread

from haltwise.proxy.wire import Json, json_object

T = TypeVar("T")

# Bytes, or so, that are read or written in less time than a token takes.
_LARGE = 256 * 1024


class _Decoder(json.JSONDecoder):
    """Reads in Python alone: C code would hold the interpreter until it is through."""

    def __init__(self) -> None:
        super().__init__()
        self.parse_object = json.decoder.JSONObject  # type: ignore[attr-defined]
        self.parse_array = json.decoder.JSONArray  # type: ignore[attr-defined]
        self.scan_once = py_make_scanner(self)


async def read_object(data: bytes) -> Json | None:
    """As `json_object`."""
    return await run(len(data) > _LARGE, json_object, data, *[_Decoder] * (len(data) > _LARGE))


async def encoded(body: Json) -> bytes:
    """The bytes of a JSON object."""
    if not is_large(body):
        return json.dumps(body).encode()
    return await run(True, lambda: b"".join(map(str.encode, json.JSONEncoder().iterencode(body))))


async def run(is_large: bool, work: Callable[..., T], *arguments: Any) -> T:
    """What some work gives, done in a thread of its own if it is about something large."""
    if is_large:
        return await anyio.to_thread.run_sync(work, *arguments)
    return work(*arguments)


def is_large(value: Any) -> bool:
    """Whether a JSON value is large; no more of it is looked at than has to be."""
    left, size = [value], 0
    while left and size <= _LARGE:
        item = left.pop()
        size += len(item) if isinstance(item, str | list | dict) else 1
        if isinstance(item, list | dict):
            left.extend(item.values() if isinstance(item, dict) else item)
    return size > _LARGE
