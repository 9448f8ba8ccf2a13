"""What happened that somebody outside may want to know: emitted in the transaction that it tells of, kept a while."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
import structlog

from controller.events.tables import EventRow
from controller.store.database import Committed, Database, Topic, Transaction
from controller.store.types import new_id
from controller.store.types import now as utc_now

log = structlog.get_logger()


class EventKind(StrEnum):
    """Sessions that begin and end are not among them: they are too many, and have their own history."""

    QUOTA_80 = "quota.80"
    QUOTA_100 = "quota.100"
    EXPIRY_3D = "expiry.3d"
    EXPIRED = "expired"
    LIMITS_RESET = "limits.reset"
    SESSION_KICKED = "session.kicked"


@dataclass(frozen=True, slots=True)
class Event:
    id: str
    at: datetime
    kind: EventKind
    user_id: str | None
    data: Mapping[str, Any]


Listener = Callable[[Event], None]


async def emit(tx: Transaction, kind: EventKind, user_id: str | None, data: Mapping[str, Any]) -> None:
    """It is told after the commit, and not at all without one."""
    event = Event(new_id(), utc_now(), kind, user_id, dict(data))
    tx.session.add(EventRow(id=event.id, at=event.at, kind=kind, user_id=user_id, data=json.dumps(event.data)))
    tx.touch(Topic.EVENTS)
    tx.note(event)
    log.info("events.emitted", kind=kind, user_id=user_id, **event.data)


class Events:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._listeners: list[Listener] = []
        database.listen(self._committed)

    def listen(self, listener: Listener) -> None:
        """Call `listener` for every event of this process after its commit; it must not block."""
        self._listeners.append(listener)

    async def after(self, event_id: str, limit: int = 500) -> list[Event]:
        """The outbox from there on, oldest first; "" begins at its start."""
        async with self._database.read() as session:
            rows = await session.scalars(
                sa.select(EventRow).where(EventRow.id > event_id).order_by(EventRow.id).limit(limit)
            )
            return [Event(row.id, row.at, EventKind(row.kind), row.user_id, json.loads(row.data)) for row in rows]

    async def purge(self, before: datetime) -> int:
        """Drop what is older; how many there were."""
        async with self._database.transaction() as tx:
            purged = await tx.session.execute(sa.delete(EventRow).where(EventRow.at < before))
        count: int = purged.rowcount  # type: ignore[attr-defined]
        return count

    def _committed(self, committed: Committed) -> None:
        for note in committed.notes:
            if isinstance(note, Event):
                for listener in self._listeners:
                    listener(note)
