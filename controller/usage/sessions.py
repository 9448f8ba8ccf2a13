"""Use cases of sessions: who is on now, who was, and out with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
import structlog

from controller.desired import service as desired
from controller.events.service import EventKind, emit
from controller.store.bulk import batched
from controller.store.database import Committed, Database, Topic, Transaction
from controller.usage import errors
from controller.usage.book import Book
from controller.usage.entries import Entry
from controller.usage.entries import Session as Session
from controller.usage.records import Written, session_from_row
from controller.usage.tables import SessionRow, UsageRow
from shared.access import SessionEnd
from shared.desired import Kind

log = structlog.get_logger()

EndConnections = Callable[[Transaction, Collection[str], str], Awaitable[object]]
"""Ends WireGuard connections, which have no sessions: (tx, connection ids, reason)."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of an account in one hour."""

    node_id: str
    protocol: str
    hour: datetime
    rx: int
    tx: int


class Sessions:
    """`load` before the first kick; `tidy` after what was reported is written."""

    def __init__(self, database: Database, book: Book, end_connections: EndConnections) -> None:
        self._database = database
        self._book = book
        self._end_connections = end_connections
        self._asked: set[tuple[str, str]] = set()  # node id, session id of those that nodes were told to end
        self._over: set[tuple[str, str]] = set()  # of those, the ones that have ended
        self._stale = False  # another process may have told nodes, too
        database.listen(self._committed)

    async def load(self) -> None:
        """Read which sessions nodes were told to end."""
        async with self._database.connect() as connection:
            told = await desired.names(connection, Kind.SESSION_END)
        found = {(scope.removeprefix(desired.node_scope("")), key) for scope, key in told}
        self._asked |= found
        self._over |= {asked for asked in found if self._book.get(*asked) is None}

    def live(self, user_id: str | None = None, node_id: str | None = None) -> list[Session]:
        """Oldest first."""
        entries = sorted(self._entries(user_id, node_id), key=lambda entry: (entry.since, entry.id))
        return [entry.shown() for entry in entries]

    def find(self, session_id: str) -> Session:
        """The live one with this id; raise SessionNotFound."""
        for entry in self._book:
            if entry.id == session_id:
                return entry.shown()
        raise errors.SessionNotFound(id=session_id)

    def users_by_protocol(self, node_id: str | None = None) -> dict[str, int]:
        """How many accounts are on by each protocol that anybody is on by."""
        users: defaultdict[str, set[str]] = defaultdict(set)
        for entry in self._entries(None, node_id):
            users[entry.protocol].add(entry.user_id)
        return {protocol: len(found) for protocol, found in sorted(users.items())}

    async def history(
        self,
        user_id: str | None = None,
        node_id: str | None = None,
        *,
        before: datetime | None = None,
        limit: int = 100,
    ) -> list[Session]:
        """Sessions that began before then, newest first; those that live are as of now."""
        query = sa.select(*SessionRow.__table__.columns).order_by(SessionRow.started_at.desc(), SessionRow.id)
        if user_id is not None:
            query = query.where(SessionRow.user_id == user_id)
        if node_id is not None:
            query = query.where(SessionRow.node_id == node_id)
        if before is not None:
            query = query.where(SessionRow.started_at < before)
        async with self._database.connect() as connection:
            rows = (await connection.execute(query.limit(limit))).all()
        live = [self._book.get(row.node_id, row.id) for row in rows]
        return [entry.shown() if entry else session_from_row(row) for row, entry in zip(rows, live, strict=True)]

    async def usage(self, user_id: str, since: datetime, until: datetime) -> list[Usage]:
        """By node, protocol and hour, oldest first."""
        columns = (UsageRow.node_id, UsageRow.protocol, UsageRow.hour, UsageRow.rx, UsageRow.tx)
        query = (
            sa.select(*columns)
            .where(UsageRow.user_id == user_id, UsageRow.hour >= since, UsageRow.hour < until)
            .order_by(UsageRow.hour, UsageRow.node_id, UsageRow.protocol)
        )
        async with self._database.connect() as connection:
            return [Usage(*row) for row in await connection.execute(query)]

    async def kick(self, user_id: str | None = None, session: Session | None = None, *, reason: str = "kicked") -> int:
        """End one session, or all of an account that live now; how many there were.

        It is committed at the return, and under way to the nodes. A WireGuard client would be back at once: its
        connection ends.
        """
        if session is not None:
            entry = self._book.get(session.node_id, session.id)
            entries = [entry] if entry is not None else []
        else:
            entries = list(self._book.of_user(user_id)) if user_id is not None else []
        if entries:
            async with self._database.transaction() as tx:
                await self.end(tx, entries, reason)
        return len(entries)

    async def end(self, tx: Transaction, entries: Collection[Entry], reason: str) -> None:
        ends: defaultdict[str, list[SessionEnd]] = defaultdict(list)
        for entry in entries:
            if entry.exact:
                ends[entry.node_id].append(SessionEnd(session=entry.id))
        connections = {entry.connection_id for entry in entries if not entry.exact and entry.connection_id}
        if connections:
            await self._end_connections(tx, connections, reason)
        for node_id, wanted in sorted(ends.items()):
            await desired.put(tx, desired.node_scope(node_id), wanted)
            self._asked |= {(node_id, end.session) for end in wanted}
        for entry in entries:
            data = {"session": entry.id, "node": entry.node_id, "protocol": entry.protocol, "reason": reason}
            await emit(tx, EventKind.SESSION_KICKED, entry.user_id, data)

    def asked(self, entry: Entry) -> bool:
        """Whether its node was told to end it."""
        return entry.key in self._asked

    def on_written(self, written: Written) -> None:
        ended = {(session.node_id, session.id) for session in written.ended}
        self._over |= ended & self._asked

    @property
    def untidy(self) -> bool:
        return self._stale or bool(self._over)

    async def tidy(self) -> None:
        """Take back what nodes were told of sessions that have ended."""
        if self._stale:
            await self.load()
            self._stale = False
        over = sorted(self._over)
        for chunk in batched(over):
            nodes: defaultdict[str, list[str]] = defaultdict(list)
            for node_id, session_id in chunk:
                nodes[node_id].append(session_id)
            async with self._database.transaction() as tx:
                for node_id, session_ids in nodes.items():
                    await desired.remove(tx, desired.node_scope(node_id), Kind.SESSION_END, session_ids)
            self._over.difference_update(chunk)
            self._asked.difference_update(chunk)

    async def purge(self, sessions_before: datetime, usage_before: datetime) -> int:
        """Drop the history that nobody keeps any more; how many rows there were."""
        count = 0
        for statement in (
            sa.delete(SessionRow).where(SessionRow.ended_at < sessions_before),
            sa.delete(UsageRow).where(UsageRow.hour < usage_before),
        ):
            async with self._database.transaction() as tx:
                purged = await tx.session.execute(statement)
            count += purged.rowcount  # type: ignore[attr-defined]
        if count:
            log.info("usage.purged", rows=count)
        return count

    def _committed(self, committed: Committed) -> None:
        if committed.scopes is None and Topic.EVENTS in committed.topics:  # each kick is one
            self._stale = True

    def _entries(self, user_id: str | None, node_id: str | None) -> Iterable[Entry]:
        if user_id is not None:
            return [entry for entry in self._book.of_user(user_id) if node_id in (None, entry.node_id)]
        return self._book if node_id is None else self._book.of_node(node_id)
