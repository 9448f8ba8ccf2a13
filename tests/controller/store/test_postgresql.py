"""What only PostgreSQL can do to a controller: writers in several processes, and a server that goes and comes back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from controller.secretbox import SecretBox
from controller.store.database import Database, StoreUnavailable, Topic, open_database
from controller.store.migrate import migrate
from controller.store.tables import FactRow, TopicRow
from tests.support.netns import Namespace
from tests.support.node_port import until
from tests.support.postgresql import Cluster

SECONDS = 30 * int(os.environ.get("SKYNETVPN_TEST_SLOWDOWN", "1"))


@pytest.fixture
def engine() -> str:
    return "postgresql"


@pytest.fixture
async def beside(database_url: str, secrets: SecretBox) -> AsyncIterator[Database]:
    """As another controller has it."""
    opened = open_database(database_url, secrets)
    yield opened
    await opened.close()


async def count(database: Database, *, certain: bool = False) -> None:
    async with database.certain_transaction() if certain else database.transaction() as tx:
        row = await tx.session.get(FactRow, "count")
        if row is None:
            tx.session.add(FactRow(name="count", value="1"))
        else:
            row.value = str(int(row.value) + 1)
        tx.touch(Topic.NODES)


async def counted(database: Database) -> int:
    async with database.read() as session:
        row = await session.get(FactRow, "count")
    return int(row.value) if row is not None else 0


async def test_writers_of_two_processes_lose_nothing(database: Database, beside: Database) -> None:
    await asyncio.gather(*(count(writer) for _ in range(20) for writer in (database, beside)))
    assert await counted(database) == 40


async def test_writers_that_take_rows_in_opposite_orders_do_not_deadlock(database: Database, beside: Database) -> None:
    async with database.transaction() as tx:
        tx.session.add_all([FactRow(name="a", value=""), FactRow(name="b", value="")])

    async def write(writer: Database, *names: str) -> None:
        for _ in range(20):
            async with writer.transaction() as tx:
                for name in names:
                    await tx.session.execute(sa.update(FactRow).where(FactRow.name == name).values(value="x"))

    await asyncio.gather(write(database, "a", "b"), write(beside, "b", "a"))


async def test_a_reader_sees_one_moment_and_writes_nothing(database: Database, beside: Database) -> None:
    async with database.read() as session:
        assert await session.scalar(sa.select(sa.func.count()).select_from(FactRow)) == 0
        await count(beside)
        assert await session.scalar(sa.select(sa.func.count()).select_from(FactRow)) == 0
    with pytest.raises(StoreUnavailable):  # as on a standby
        async with database.connect() as connection:
            await connection.execute(sa.delete(FactRow))
    assert await counted(database) == 1


async def test_a_writer_waits_only_so_long_for_another_one(database: Database, beside: Database) -> None:
    async with database.transaction() as tx:
        await tx.session.scalar(sa.select(TopicRow.revision))
        with pytest.raises(StoreUnavailable):
            await count(beside)
    await count(beside)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["stopped", "crashed"])
async def test_a_server_that_is_away_is_unavailable_until_it_is_back(
    cluster: Cluster, database: Database, how: signal.Signals
) -> None:
    done = 0
    away = asyncio.Event()

    async def write() -> None:
        """Until the server has been away and back; nothing but StoreUnavailable may come of it."""
        nonlocal done
        while True:
            with contextlib.suppress(StoreUnavailable):
                await count(database, certain=True)
                done += 1
                if away.is_set():
                    return
            await asyncio.sleep(0.005)

    async def read() -> None:
        while not away.is_set():
            with contextlib.suppress(StoreUnavailable):
                await counted(database)
            await asyncio.sleep(0.005)

    async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as tasks:
        for _ in range(4):
            tasks.create_task(write())
            tasks.create_task(read())
        await until(lambda: done)
        await asyncio.to_thread(cluster.stop, how)
        try:
            with pytest.raises(StoreUnavailable):
                await counted(database)
        finally:
            cluster.start()
        away.set()
    assert await counted(database) == done


class Proxy:
    """Passes bytes on between a driver and the server. While `deaf`, a COMMIT reaches the server and no answer comes
    back: the connection ends."""

    def __init__(self, server: Path, address: Path | str) -> None:
        self._server = server
        self._address = address
        self._serving: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self.deaf = False
        self.lost = 0

    async def __aenter__(self) -> Proxy:
        if isinstance(self._address, Path):
            self._listening = await asyncio.start_unix_server(self._accept, self._address)
        else:
            self._listening = await asyncio.start_server(self._accept, self._address, 5432)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listening.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*self._serving)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._serving.add(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, asks = await asyncio.open_unix_connection(self._server)
        self._writers += [writer, asks]
        lost = asyncio.Event()

        async def answer() -> None:
            with contextlib.suppress(ConnectionError):
                while (data := await answers.read(65536)) and not lost.is_set():
                    writer.write(data)
            writer.close()

        answering = asyncio.create_task(answer())
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if self.deaf and b"COMMIT" in data:
                    self.deaf = False
                    self.lost += 1
                    lost.set()
                asks.write(data)
        asks.close()
        await answering


async def test_a_commit_without_an_answer_is_found_out(
    cluster: Cluster, database_url: str, secrets: SecretBox, database: Database, tmp_path: Path
) -> None:
    """It was committed: to say that nothing was changed would let the caller count the same bytes again."""
    async with Proxy(cluster.socket, tmp_path / cluster.socket.name) as proxy:
        behind = open_database(database_url.replace(str(cluster.directory), str(tmp_path)), secrets)
        await count(behind, certain=True)
        proxy.deaf = True
        await count(behind, certain=True)
        assert proxy.lost == 1
        assert await counted(database) == 2
        proxy.deaf = True
        with pytest.raises(StoreUnavailable):
            await count(behind)
        assert proxy.lost == 2
        assert await counted(database) == 3
        await behind.close()


async def test_a_commit_that_never_came_is_unavailable(cluster: Cluster, database: Database) -> None:
    with pytest.raises(StoreUnavailable):
        async with database.certain_transaction() as tx:
            process = await tx.session.scalar(sa.text("SELECT pg_backend_pid()"))
            tx.session.add(FactRow(name="count", value="1"))
            await tx.session.flush()
            await asyncio.to_thread(cluster.sql, f"SELECT pg_terminate_backend({process})")
    assert await counted(database) == 0


async def test_a_server_that_was_never_there_is_unavailable(tmp_path: Path, secrets: SecretBox) -> None:
    missing = open_database(f"postgresql+asyncpg://u:s3cr3t@/d?host={tmp_path}", secrets)
    assert "s3cr3t" not in repr(missing.engine)
    with pytest.raises(StoreUnavailable):
        await migrate(missing)
    for opening in (missing.transaction, missing.read, missing.connect):
        with pytest.raises(StoreUnavailable):
            async with opening() as opened:
                session = getattr(opened, "session", opened)
                await session.execute(sa.text("SELECT 1"))
    await missing.close()


VANISHING = """
import asyncio, subprocess, sys
from controller.secretbox import SecretBox
from controller.store import postgresql
from controller.store.database import StoreUnavailable, Topic, open_database

async def use(url):
    postgresql._SILENCE = 3
    database = open_database(url, SecretBox({"k1": b"k" * 32}, "k1"))
    async def write():
        async with database.transaction() as tx:
            tx.touch(Topic.NODES)
    await write()
    filter = "add table inet gone; add chain inet gone in { type filter hook input priority 0; policy drop; }"
    subprocess.run(["nft", filter], check=True)
    async with asyncio.timeout(float(sys.argv[2])):
        try:
            await write()
        except StoreUnavailable:
            print("unavailable")
    subprocess.run(["nft", "delete table inet gone"], check=True)
    await write()
    print("back")
    await database.close()

asyncio.run(use(sys.argv[1]))
"""


@pytest.mark.netns
async def test_a_server_that_vanishes_without_a_word_is_unavailable_soon(cluster: Cluster, database_url: str) -> None:
    over_tcp = database_url.replace("@/", "@192.0.2.1/").partition("?")[0]
    listening, done = threading.Event(), threading.Event()

    async def serve() -> None:
        async with Proxy(cluster.socket, "192.0.2.1"):
            listening.set()
            await asyncio.to_thread(done.wait)

    with Namespace("database") as server, Namespace("controller") as client:
        server.connect(client, "192.0.2.1/24", "192.0.2.2/24")
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(asyncio.to_thread(server.call, serve))
            try:
                assert await asyncio.to_thread(listening.wait, SECONDS)
                use = (sys.executable, "-c", VANISHING, over_tcp, str(SECONDS))
                told = await asyncio.to_thread(client.run, *use, timeout=3 * SECONDS)
            finally:
                done.set()
    assert [line for line in told.splitlines() if " " not in line] == ["unavailable", "back"]  # the others are logged
