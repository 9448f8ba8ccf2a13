from __future__ import annotations

import asyncio
import sqlite3
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from controller.secretbox import SecretBox
from controller.store.database import Committed, Database, StoreUnavailable, Topic, open_database
from controller.store.tables import FactRow, TopicRow
from controller.store.types import new_id, now
from controller.store.watch import Watcher
from tests.support.postgresql import only


async def test_a_commit_is_told_once_with_what_it_changed(database: Database) -> None:
    told: list[Committed] = []
    database.listen(told.append)
    async with database.transaction() as tx:
        tx.touch(Topic.NODES)
        tx.poke("node:1")
        assert told == []
    assert told == [Committed(frozenset({Topic.NODES, Topic.DESIRED}), frozenset({"node:1"}))]


async def test_a_failed_use_case_changes_and_tells_nothing(database: Database) -> None:
    told: list[Committed] = []
    database.listen(told.append)
    with pytest.raises(RuntimeError):
        async with database.transaction() as tx:
            tx.session.add(FactRow(name="half", value="done"))
            await tx.session.flush()
            tx.touch(Topic.NODES)
            raise RuntimeError("half way")
    async with database.read() as session:
        assert await session.get(FactRow, "half") is None
        assert await session.get(TopicRow, Topic.NODES) is None
    assert told == []


async def test_parallel_writers_lose_nothing(database: Database) -> None:
    async def count() -> None:
        async with database.transaction() as tx:
            row = await tx.session.get(FactRow, "count")
            if row is None:
                tx.session.add(FactRow(name="count", value="1"))
            else:
                row.value = str(int(row.value) + 1)

    await asyncio.gather(*(count() for _ in range(40)))
    async with database.read() as session:
        row = await session.get(FactRow, "count")
    assert row is not None
    assert row.value == "40"


async def test_the_epoch_stays_until_the_database_is_another(database: Database, tmp_path: Path) -> None:
    assert await database.epoch() == await database.epoch()
    async with database.transaction() as tx:
        await tx.session.execute(sa.delete(FactRow))
    first = await database.epoch()
    assert first == await database.epoch()


async def test_what_another_process_commits_is_noticed(database: Database, database_url: str) -> None:
    told: asyncio.Queue[Committed] = asyncio.Queue()
    async with database.transaction() as tx:
        tx.touch(Topic.ACCOUNTS)
    watcher = asyncio.create_task(Watcher(database).run())
    database.listen(told.put_nowait)
    other = open_database(database_url, database.secrets)
    try:
        # The first look tells everything: what was read before it may be older.
        assert await asyncio.wait_for(told.get(), 20) == Committed(frozenset({Topic.ACCOUNTS}), None)
        async with other.transaction() as tx:
            tx.touch(Topic.NODES)
        assert await asyncio.wait_for(told.get(), 20) == Committed(frozenset({Topic.NODES}), None)
    finally:
        watcher.cancel()
        await other.close()


async def test_a_database_that_cannot_be_written_is_unavailable(tmp_path: Path, secrets: SecretBox) -> None:
    missing = open_database(f"sqlite+aiosqlite:///{tmp_path / 'nowhere' / 'controller.db'}", secrets)
    with pytest.raises(StoreUnavailable):
        async with missing.transaction() as tx:
            tx.touch(Topic.NODES)
    await missing.close()
    # The driver's thread tells the loop of its end; a loop that is closed before would raise in that thread.
    for thread in threading.enumerate():
        if "_connection_worker_thread" in thread.name:
            await asyncio.to_thread(thread.join)


async def test_a_database_that_is_overrun_is_unavailable(database: Database) -> None:
    engine = create_async_engine(database.engine.url, pool_size=1, max_overflow=0, pool_timeout=0.05)
    crowded = Database(engine, database.secrets)
    async with crowded.connect():
        with pytest.raises(StoreUnavailable):
            async with crowded.connect():
                raise AssertionError("there was a second connection")
    await crowded.close()


@only("sqlite")
async def test_a_full_disk_acknowledges_nothing(database: Database, database_url: str) -> None:
    """SQLite's own page limit stands for the disk's end; the error is the same SQLITE_FULL."""
    async with database.engine.connect() as connection:
        pages = (await connection.exec_driver_sql("PRAGMA page_count")).scalar_one()
    limited = open_database(database_url, database.secrets)

    def limit(connection: object, _record: object) -> None:
        assert hasattr(connection, "execute")
        cursor = connection.cursor()  # type: ignore[attr-defined]
        cursor.execute(f"PRAGMA max_page_count={pages}")
        cursor.close()

    sa.event.listen(limited.engine.sync_engine, "connect", limit)
    told: list[Committed] = []
    limited.listen(told.append)
    with pytest.raises(StoreUnavailable):
        async with limited.transaction() as tx:
            tx.touch(Topic.NODES)
            tx.session.add_all([FactRow(name=f"fact {i}", value="x" * 255) for i in range(2000)])
    assert told == []
    async with database.read() as session:
        assert await session.scalar(sa.select(sa.func.count()).select_from(FactRow)) == 0
    await limited.close()


def scribble(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.write(b"x" * 4096)


@only("sqlite")
async def test_a_damaged_file_is_an_unavailable_database(database: Database) -> None:
    assert database.engine.url.database is not None
    file = Path(database.engine.url.database)
    await database.close()
    scribble(file)
    with pytest.raises(StoreUnavailable) as refused:
        async with database.connect() as connection:
            await connection.execute(sa.select(FactRow.name))
    assert refused.value.explain() == f"the database is not available: {file}: file is not a database"


@only("sqlite")
async def test_sqlite_is_durable_and_checks_references(database: Database) -> None:
    async with database.engine.connect() as connection:
        for pragma, expected in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1)):
            assert (await connection.exec_driver_sql(f"PRAGMA {pragma}")).scalar_one() == expected


async def test_times_come_back_exactly(database: Database) -> None:
    from controller.store.types import Timestamp

    moment = now()
    stored = Timestamp().process_bind_param(moment, database.engine.dialect)
    assert Timestamp().process_result_value(stored, database.engine.dialect) == moment


def test_ids_are_version_7_and_grow() -> None:
    ids = [new_id() for _ in range(100)]
    assert len(set(ids)) == 100
    assert all(one[14] == "7" and one[19] in "89ab" for one in ids)
    assert [one[:13] for one in ids] == sorted(one[:13] for one in ids)


def test_sqlite_supports_what_we_rely_on() -> None:
    assert sqlite3.sqlite_version_info >= (3, 35), "RETURNING"
