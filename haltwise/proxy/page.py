"""The live page, which shows a person what `/v1/haltwise/control` tells."""

from __future__ import annotations

import re
from base64 import b64encode
from functools import cache
from hashlib import sha256
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse


async def live_page(request: Request) -> HTMLResponse:
    """Answers with the page, which holds nothing that is to be kept from anybody."""
    content = _content()
    # Nothing but what stands in the file runs there, and it asks nobody but the proxy.
    rules = [
        "default-src 'none'",
        f"script-src {_digest('script', content)}",
        f"style-src {_digest('style', content)}",
        "connect-src 'self'",
        "img-src data:",
        *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
    ]
    headers = {
        "content-security-policy": "; ".join(rules),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return HTMLResponse(content, headers=headers)


@cache
def _content() -> str:
    return (files("haltwise.proxy") / "page.html").read_text(encoding="utf-8")


def _digest(tag: str, content: str) -> str:
    """The digest of the page's one script or sheet, as a policy names it."""
    (block,) = re.findall(f"<{tag}>(.*?)</{tag}>", content, re.DOTALL)
    return f"'sha256-{b64encode(sha256(block.encode()).digest()).decode()}'"
