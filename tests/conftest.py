"""What tests share: signals as in a terminal, and a real database file."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from controller.secretbox import SecretBox
from controller.store.database import Database, open_database
from controller.store.schema import metadata
from tests.support.postgresql import Cluster, programs


def pytest_configure() -> None:
    # A shell that starts us in the background has SIGINT ignored, and our children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Hosts and their programs first, which take long and mostly wait: what only computes fills the gaps at the end."""
    items.sort(key=lambda item: item.get_closest_marker("netns") is None)


@pytest.fixture
def secret_key() -> bytes:
    return os.urandom(32)


@pytest.fixture
def secrets(secret_key: bytes) -> SecretBox:
    return SecretBox({"k1": secret_key}, "k1")


@pytest.fixture
def engine() -> str:
    """SQLite; below tests/controller, where SQL decides what is right, each test runs on PostgreSQL as well."""
    return "sqlite"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """One server for each process of tests. `make` installs it: there its absence is a failure."""
    binaries = programs()
    if binaries is None:
        if os.environ.get("SKYNETVPN_POSTGRESQL_TESTS") == "1":
            pytest.fail("PostgreSQL's server is not installed")
        pytest.skip("PostgreSQL's server is not installed: apt-get install postgresql")
    with Cluster(binaries) as running:
        yield running


@pytest.fixture(scope="session")
def template_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SQLite's with our tables, to be copied for each test: to make them takes a hundred times as long."""
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    tables = sa.create_engine(f"sqlite:///{path}")
    metadata.create_all(tables)
    tables.dispose()
    return path


@pytest.fixture(scope="session")
def template(cluster: Cluster) -> str:
    """The name of a database with our tables, to be copied for each test."""

    async def make_tables(url: str) -> None:
        engine = create_async_engine(url)
        async with engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
        await engine.dispose()

    name = cluster.create()
    asyncio.run(make_tables(cluster.url(name)))
    return name


@pytest.fixture
def empty_url(request: pytest.FixtureRequest, engine: str, tmp_path: Path) -> Iterator[str]:
    """Of a database without tables."""
    if engine == "sqlite":
        yield f"sqlite+aiosqlite:///{tmp_path / 'controller.db'}"
        return
    cluster: Cluster = request.getfixturevalue("cluster")
    name = cluster.create()
    yield cluster.url(name)
    cluster.drop(name)


@pytest.fixture
def database_url(request: pytest.FixtureRequest, engine: str, tmp_path: Path, template_file: Path) -> Iterator[str]:
    """Of a database with our tables."""
    if engine == "sqlite":
        path = shutil.copyfile(template_file, tmp_path / "controller.db")
        yield f"sqlite+aiosqlite:///{path}"
        return
    cluster: Cluster = request.getfixturevalue("cluster")
    name = cluster.create(request.getfixturevalue("template"))
    yield cluster.url(name)
    cluster.drop(name)


@pytest.fixture
async def database(database_url: str, secrets: SecretBox) -> AsyncIterator[Database]:
    opened = open_database(database_url, secrets)
    yield opened
    await opened.close()
