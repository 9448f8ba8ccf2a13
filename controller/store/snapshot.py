"""Keeps what a room read of the database in memory, and reads it again after the commits that change it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from controller.store.database import Committed, Database, StoreUnavailable, Topic

_RETRY = 1.0  # seconds

log = structlog.get_logger()


class Snapshot:
    """`read` replaces what its room remembers, or raises and leaves it; `event` is logged when that starts to fail."""

    def __init__(self, database: Database, topic: Topic, read: Callable[[], Awaitable[None]], *, event: str) -> None:
        self._topic = topic
        self._read = read
        self._event = event
        self._stale = asyncio.Event()
        database.listen(self._committed)

    async def refresh(self) -> None:
        """Read now. Where that fails, `run` goes on trying."""
        self._stale.clear()
        try:
            await self._read()
        except BaseException:
            self._stale.set()
            raise

    async def run(self) -> None:
        failing = False
        while True:
            await self._stale.wait()
            try:
                await self.refresh()
            except StoreUnavailable:
                if not failing:
                    log.warning(self._event)
                failing = True
                await asyncio.sleep(_RETRY)
            else:
                failing = False

    def _committed(self, committed: Committed) -> None:
        if self._topic in committed.topics:
            self._stale.set()
