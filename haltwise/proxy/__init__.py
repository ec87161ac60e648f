"""A proxy that halts thoughts: between OpenAI clients and the server of an LM."""

from haltwise.errors import from_clone, needing

with needing("haltwise.proxy", from_clone("proxy")):
    from haltwise.proxy.app import create_app
    from haltwise.proxy.config import ServeConfig
    from haltwise.proxy.metrics import JsonLines
    from haltwise.proxy.server import create_server

__all__ = ["JsonLines", "ServeConfig", "create_app", "create_server"]
