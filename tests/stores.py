"""The stores of the record and the books: a file, and a real PostgreSQL where there is one."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from haltwise.control.store import Store, store_of

#: What a store is named by; each name is a new one.
NewName = Callable[[], str]


def _programs() -> Path | None:
    """Where PostgreSQL's programs are; Debian keeps them off the path."""
    found = [Path(path).parent for path in [shutil.which("initdb")] if path]
    return next(iter([*found, *sorted(Path("/usr/lib/postgresql").glob("*/bin"))[::-1]]), None)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The address of a server without a database of anybody's."""
    psycopg = pytest.importorskip("psycopg")
    programs = _programs()
    if programs is None:
        pytest.skip("there is no PostgreSQL")
    owner = "postgres" if os.getuid() == 0 else None  # it refuses to be run by root
    with TemporaryDirectory(prefix="pg", ignore_cleanup_errors=True) as made:
        if owner is not None:
            shutil.chown(made, owner)

        def run(program: str, *options: str) -> None:
            command = [str(programs / program), "-D", f"{made}/data", *options]
            done = subprocess.run(command, user=owner, cwd="/", stdout=subprocess.DEVNULL)
            assert done.returncode == 0, command

        run("initdb", "--auth=trust", "--username=haltwise", "--no-sync")
        settings = f"-k {made} -c listen_addresses= -c fsync=off -c max_connections=200"
        run("pg_ctl", "start", "-w", "-t", "300", "-l", f"{made}/log", "-o", settings)
        try:
            address = f"postgresql://haltwise@/{{}}?host={made}"
            psycopg.connect(address.format("postgres")).close()
            yield address
        finally:
            with suppress(AssertionError):
                run("pg_ctl", "stop", "-m", "immediate")


@pytest.fixture(params=["sqlite", "postgresql"])
def new_name(request: pytest.FixtureRequest, tmp_path: Path) -> NewName:
    """Names of new stores of a kind."""
    numbers = itertools.count()
    if request.param == "sqlite":
        return lambda: str(tmp_path / f"store-{next(numbers)}")
    address: str = request.getfixturevalue("postgresql")

    def made() -> str:
        import psycopg

        name = f"test_{uuid.uuid4().hex}"
        with psycopg.connect(address.format("postgres"), autocommit=True) as server:
            server.execute(f"CREATE DATABASE {name}")
        return address.format(name)

    return made


@pytest.fixture
def store(new_name: NewName) -> Store:
    """A new store."""
    return store_of(new_name())
