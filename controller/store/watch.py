"""Notices what other processes committed, so that a command line beside a running controller takes effect at once."""

from __future__ import annotations

import asyncio

import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from controller.store.database import Committed, Database, StoreUnavailable, Topic
from controller.store.tables import TopicRow

INTERVAL = 0.25  # seconds; revocation has to be seen within one

_TOPICS = frozenset(Topic)

log = structlog.get_logger()


class Watcher:
    """Compares the topics' revisions with those seen before, and tells the database's listeners what moved."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._seen: dict[str, int] = {}
        self._data_version: int | None = None

    async def run(self) -> None:
        failing = False
        while True:
            try:
                async with self._database.connect() as connection:
                    while True:
                        await self._look(connection)
                        if failing:
                            log.info("store.watch_restored")
                            failing = False
                        await asyncio.sleep(INTERVAL)
            except StoreUnavailable:
                if not failing:
                    log.warning("store.watch_lost")
                    failing = True
                await asyncio.sleep(INTERVAL)

    async def _look(self, connection: AsyncConnection) -> None:
        if self._database.engine.dialect.name == "sqlite":
            version = (await connection.exec_driver_sql("PRAGMA data_version")).scalar_one()
            await connection.rollback()
            if version == self._data_version:
                return
            self._data_version = version
        rows = (await connection.execute(sa.select(TopicRow.name, TopicRow.revision))).all()
        await connection.rollback()
        moved = frozenset(
            Topic(name) for name, revision in rows if self._seen.get(name) != revision and name in _TOPICS
        )
        self._seen = {row.name: row.revision for row in rows}
        if moved:  # at the first look all of them: what was read before it may be older
            self._database.tell(Committed(moved, None))
