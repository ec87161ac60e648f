"""The command `haltwise`."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from haltwise import InputError, __version__
from haltwise.control.experiment import compare
from haltwise.control.experiment import table_of as comparison_table
from haltwise.control.mixing import mix
from haltwise.control.off_policy import spending_of
from haltwise.control.off_policy import table_of as spending_table
from haltwise.control.status import begin_experiment, promote, read_library, roll_back, table_of
from haltwise.errors import NUMBER_WORDS, from_clone, needing, printing, what_failed

if TYPE_CHECKING:
    from haltwise.proxy import ServeConfig


# What argparse says of a number that it cannot read.
_UNREADABLE = re.compile(r"argument (?P<option>\S+): invalid (?P<type>int|float) value: ")


class _Parser(argparse.ArgumentParser):
    """Tells in one line what is wrong with a command line, as `haltwise serve` does."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        if found := _UNREADABLE.match(message):
            word = NUMBER_WORDS[{"int": int, "float": float}[found["type"]]]
            value = message[found.end() :]
            message = f"{found['option']}: found {value}, expected a {word}"
        _fail(f"{message}; For full helptext, run {self.prog} --help")


def main() -> None:
    """Runs one of haltwise's commands, or tells the version.

    What a person got wrong is told in one line on stderr, with status 2.
    """
    # Only `serve` needs more packages than haltwise itself: help and version do without.
    parser = _Parser(prog="haltwise", description="Halts the thoughts of an LM.")
    parser.add_argument("--version", action="version", version=f"haltwise {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    about = "halt thoughts between OpenAI clients and the server of an LM (serve --help: how)"
    commands.add_parser("serve", help=about, add_help=False)
    about = "tell what a control knows: what every group loses, saves and is served"
    status = commands.add_parser("status", help=about, description=about)
    about = "let a challenger that is known to be better serve, step by step until all"
    promoting = commands.add_parser("promote", help=about, description=about)
    promoting.add_argument("--anyway", action="store_true", help="all at once, whatever is known")
    told = "as much of its digest as tells it from others"
    promoting.add_argument("--head", required=True, help=told)
    about = "tell how two heads compare of which one served a share of all requests, or begin that"
    comparing = commands.add_parser("experiment", help=about, description=about)
    comparing.add_argument("--head", help=f"begin, until a rollback, with this one: {told}")
    told = "of sessions, users, requests, with --head; 0.5 by default"
    comparing.add_argument("--share", type=float, help=told)
    comparing.add_argument("--budget", type=int, help="of these, after which nobody has won")
    told = "tell instead what other prices would have spent, of serve --replay-all"
    comparing.add_argument("--prices", action="store_true", help=told)
    comparing.add_argument("--html", type=Path, help="a file for the comparison as a page")
    about = "take back the newest step: of the challenger that serves, else of the champion"
    rolling = commands.add_parser("rollback", help=about, description=about)
    about = "make one head of several, weighed by what audits tell of them"
    mixing = commands.add_parser("mix", help=about, description=about)
    mixing.add_argument("--heads", required=True, nargs="+", type=Path, help="two folders or more")
    mixing.add_argument("--out", required=True, type=Path, help="a folder that is not there")
    mixing.add_argument("--price", type=float, help="at which they are weighed; the first's own")
    for one in (status, promoting, comparing, rolling, mixing):
        one.add_argument("--state", required=True, help="that of haltwise serve")
    try:
        with printing():
            known, settings = parser.parse_known_args()
            if known.command is None:
                parser.error(f"found no command, expected one of {', '.join(commands.choices)}")
            if known.command != "serve" and settings:
                parser.error(f"unrecognized arguments: {' '.join(settings)}")
            _obey(known, settings)
    except (InputError, OSError) as error:
        _fail(what_failed(error))


def _obey(known: argparse.Namespace, settings: Sequence[str]) -> None:
    """Runs the command that a command line names.

    Args:
        known: What all commands but `serve` are told.
        settings: What that one is told.

    Raises:
        InputError: If what it is told or what it reads cannot be used.
        OSError: If a file or the port cannot be had.
    """
    if known.command == "status":
        print(table_of(read_library(known.state)))
    elif known.command == "promote":
        print(promote(known.state, known.head, known.anyway))
    elif known.command == "experiment":
        print(_experiment(known))
    elif known.command == "mix":
        print(mix(known.state, known.heads, known.price, known.out))
    elif known.command == "rollback":
        print(roll_back(known.state))
    else:
        serve(_serve_config(settings))


def _experiment(known: argparse.Namespace) -> str:
    """Begins a randomised comparison, or tells what it has told until now.

    Raises:
        InputError: If a setting, the state or what it holds cannot be used.
        OSError: If the page cannot be written.
    """
    if known.head is not None:
        if known.budget is not None or known.html is not None or known.prices:
            raise InputError(
                "--head begins a comparison: expected --budget, --html and --prices without it"
            )
        share = 0.5 if known.share is None else known.share
        return begin_experiment(known.state, known.head, share)
    if known.prices:
        if known.share is not None or known.budget is not None or known.html is not None:
            raise InputError("--prices tells of one head: expected no other option but --state")
        return spending_table(spending_of(known.state, read_library(known.state)))
    if known.share is not None:
        raise InputError("--share is of a comparison that begins: expected --head with it")
    found = compare(known.state, read_library(known.state), known.budget)
    if known.html is not None:
        with needing("haltwise experiment --html", from_clone("proxy")):
            from haltwise.proxy.experiment_page import experiment_page
        known.html.write_text(experiment_page(found), encoding="utf-8")
    return comparison_table(found)


def _serve_config(settings: Sequence[str]) -> ServeConfig:
    """Returns the settings of `haltwise serve` from its command line.

    Raises:
        InputError: If they cannot be read.
    """
    try:
        with needing("haltwise serve", from_clone("proxy")):
            from haltwise.command_line import parsed
            from haltwise.proxy import ServeConfig
    except ModuleNotFoundError as error:
        _fail(str(error))
    return parsed(ServeConfig, settings, "haltwise serve")


def serve(config: ServeConfig) -> None:
    """Listens until the process is told to end.

    Raises:
        InputError: If a setting, the head or the file of keys cannot be used.
        OSError: If the port cannot be had.
    """
    from haltwise.proxy import JsonLines, create_server

    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(JsonLines())
    logging.basicConfig(handlers=[lines])
    logging.captureWarnings(True)
    logging.getLogger("haltwise").setLevel(logging.INFO)
    config.check()
    with _bound(config.host, config.port, config.share_port) as listener:
        running = create_server(config)  # which makes a state: what cannot listen makes none
        with _told_of(config.host, config.port):
            listener.listen(4096)
        host, port = listener.getsockname()[:2]
        logging.getLogger("haltwise").info(json.dumps({"listening": host, "port": port}))
        running.run(sockets=[listener])


def _bound(host: str, port: int, shares: bool) -> socket.socket:
    """Returns a socket that may listen at a port, which others that want to share it may too.

    Raises:
        OSError: If the port cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named, asyncio sends small pieces at once.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shares:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with _told_of(host, port):
            listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener


@contextmanager
def _told_of(host: str, port: int) -> Iterator[None]:
    """Tells which port cannot be had.

    Raises:
        OSError: If it cannot.
    """
    try:
        yield
    except OSError as error:
        told = f"cannot listen at {host}, port {port}: {error.strerror}"
        if error.errno == errno.EADDRINUSE:
            told += "; end what listens there, or name another --port"
        raise OSError(told) from None


def _fail(message: str) -> NoReturn:
    """Tells a message in one line on stderr, and ends the process with status 2."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
