"""Reads sessions back, and writes what the book has: sessions, usage by the hour, quotas and leases in one go."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from controller.accounts import rows as accounts
from controller.fleet import census
from controller.store.bulk import MICROSECONDS, Bulk, batched
from controller.store.database import Committed, Database, Topic
from controller.usage.book import LONGEST, Book
from controller.usage.entries import Batch, Entry, Session
from controller.usage.tables import LeaseRow, LimitsRow, SessionRow, UsageRow


@dataclass(frozen=True, slots=True)
class Written:
    """What was committed together."""

    began: list[Session] = field(default_factory=list)
    ended: list[Session] = field(default_factory=list)
    metered: list[str] = field(default_factory=list)  # users with a quota, who used some of it
    leases: list[tuple[str, str]] = field(default_factory=list)  # node id, user id: the node told what it has used


class Changes:
    """The rows of a batch, all of one moment: the book goes on counting while they are written."""

    def __init__(self, batch: Batch) -> None:
        entries = [sessions[name] for _, sessions in sorted(batch.sessions.items()) for name in sorted(sessions)]
        began = [entry for entry in entries if not entry.stored]
        ended = [entry for entry in entries if entry.ended]
        self.batch = batch
        self.began = [entry.shown() for entry in began]
        self.ended = [entry.shown() for entry in ended]
        self.inserts = [_row(entry) for entry in began]
        self.moves: list[tuple[Any, ...]] = []
        self.changes: list[tuple[Any, ...]] = []
        for entry in entries:
            if not entry.stored:
                continue
            if entry.ended or entry.reopened:
                end = _micros(entry.ended), entry.reason or None
                self.changes.append((*end, entry.rx, entry.tx, entry.node_id, entry.id))
            else:
                self.moves.append((entry.rx, entry.tx, entry.node_id, entry.id))
        self.usage = [
            (user_id, node_id, protocol, hour * MICROSECONDS, *moved[user_id])
            for (node_id, protocol, hour), moved in sorted(batch.moved.items())
            for user_id in sorted(moved)
        ]


class Records:
    """`metered` is read anew when limits change: whoever has no quota costs no statement."""

    def __init__(self, database: Database) -> None:
        self._metered: set[str] | None = None
        self._users: dict[int, str] = {}  # by account number; it never changes hands
        database.listen(self._committed)

    async def load(self, connection: AsyncConnection, book: Book, now: float) -> None:
        """Take the sessions that are open into the book."""
        for row in await connection.execute(_OPEN):
            book.add(_entry_from_row(row, now))

    async def find(
        self, connection: AsyncConnection, node_id: str, session_ids: Collection[str], *, all_open: bool, now: float
    ) -> list[Entry]:
        """What is stored of the node's sessions, and all that are open where they are wanted."""
        found: dict[str, Entry] = {}
        if all_open:
            rows = await connection.execute(_OPEN.where(SessionRow.node_id == node_id))
            found = {row.id: _entry_from_row(row, now) for row in rows}
        for chunk in batched([session_id for session_id in session_ids if session_id not in found]):
            rows = await connection.execute(_ALL.where(SessionRow.node_id == node_id, SessionRow.id.in_(chunk)))
            found |= {row.id: _entry_from_row(row, now) for row in rows}
        return list(found.values())

    def forget(self) -> None:
        """Accounts were deleted: look anew at who is metered, and who has which number."""
        self._metered = None
        self._users.clear()

    async def users(self, connection: AsyncConnection, numbers: Collection[int]) -> dict[int, str]:
        """The accounts' ids, where there are such accounts."""
        unknown = {number for number in numbers if number not in self._users}
        if unknown:
            self._users |= await accounts.ids_of(connection, unknown)
        return {number: self._users[number] for number in numbers if number in self._users}

    async def write(self, connection: AsyncConnection, changes: Changes) -> Written:
        await _INSERT.run(connection, changes.inserts)
        await _MOVE.run(connection, changes.moves)
        await _CHANGE.run(connection, changes.changes)
        await _ADD_USAGE.run(connection, changes.usage)
        metered = await self._count_quotas(connection, changes.batch)
        leases = await self._note_leases(connection, changes.batch, self._metered or set())
        return Written(changes.began, changes.ended, metered, leases)

    async def _count_quotas(self, connection: AsyncConnection, batch: Batch) -> list[str]:
        if self._metered is None:
            self._metered = set(
                await connection.scalars(sa.select(LimitsRow.user_id).where(LimitsRow.quota_bytes.is_not(None)))
            )
        used: defaultdict[str, int] = defaultdict(int)
        for moved in batch.moved.values():
            for user_id in self._metered & moved.keys():
                used[user_id] += sum(moved[user_id])
        await _USE_QUOTA.run(connection, [(count, user_id) for user_id, count in sorted(used.items())])
        return sorted(used)

    async def _note_leases(
        self, connection: AsyncConnection, batch: Batch, metered: Collection[str]
    ) -> list[tuple[str, str]]:
        """Nodes tell all that they know when a link begins: only what has grown, or is of a new ledger, is news."""
        if not batch.used:
            return []
        users = await self.users(connection, {number for _, number in batch.used})
        ledgers = await census.ledgers(connection, {node_id for node_id, _ in batch.used})
        told: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for (node_id, number), used in batch.used.items():
            if users.get(number) in metered and ledgers.get(node_id):
                told[node_id][users[number]] = used
        rows: list[tuple[Any, ...]] = []
        for node_id, counts in sorted(told.items()):
            known = await _leases(connection, node_id, sorted(counts))
            for user_id, used in sorted(counts.items()):
                ledger, before = known.get(user_id, (ledgers[node_id], 0))
                if used > before or ledger != ledgers[node_id]:
                    rows.append((node_id, user_id, ledgers[node_id], 0, 0, used))
        await _NOTE_LEASE.run(connection, rows)
        return [(node_id, user_id) for node_id, user_id, *_, used in rows if used]

    def _committed(self, committed: Committed) -> None:
        if Topic.LIMITS in committed.topics:
            self._metered = None


_COLUMNS = [column.name for column in SessionRow.__table__.columns]
_ALL = sa.select(*SessionRow.__table__.columns)
_OPEN = _ALL.where(SessionRow.ended_at.is_(None))
_THIS = sa.and_(SessionRow.node_id == sa.bindparam("of_node"), SessionRow.id == sa.bindparam("of_id"))


def _insert_session(insert: Any) -> Any:
    statement = insert(SessionRow.__table__).values({name: sa.bindparam(name) for name in _COLUMNS})
    news = {name: statement.excluded[name] for name in ("ended_at", "end_reason", "rx", "tx")}
    return statement.on_conflict_do_update(index_elements=["node_id", "id"], set_=news)


def _add_usage(insert: Any) -> Any:
    table = UsageRow.__table__
    statement = insert(table).values({column.name: sa.bindparam(column.name) for column in table.columns})
    sums = {name: table.c[name] + statement.excluded[name] for name in ("rx", "tx")}
    return statement.on_conflict_do_update(index_elements=["user_id", "node_id", "protocol", "hour"], set_=sums)


def _note_lease(insert: Any) -> Any:
    """A new ledger of the node voids the lease; a count of the same one never falls."""
    table = LeaseRow.__table__
    statement = insert(table).values({column.name: sa.bindparam(column.name) for column in table.columns})
    new, same = statement.excluded, table.c.ledger == statement.excluded.ledger
    return statement.on_conflict_do_update(
        index_elements=["node_id", "user_id"],
        set_={
            "ledger": new.ledger,
            "allowance": sa.case((same, table.c.allowance), else_=new.allowance),
            "reserved": sa.case((same, table.c.reserved), else_=new.reserved),
            "used": sa.case((sa.and_(same, table.c.used > new.used), table.c.used), else_=new.used),
        },
    )


_INSERT = Bulk(_insert_session, _COLUMNS)
_MOVE = Bulk(
    lambda _: sa.update(SessionRow.__table__).where(_THIS).values(rx=sa.bindparam("new_rx"), tx=sa.bindparam("new_tx")),  # type: ignore[arg-type]
    ["new_rx", "new_tx", "of_node", "of_id"],
)
_CHANGE = Bulk(
    lambda _: (
        sa.update(SessionRow.__table__)  # type: ignore[arg-type]
        .where(_THIS)
        .values({name: sa.bindparam(f"new_{name}") for name in ("ended_at", "end_reason", "rx", "tx")})
    ),
    ["new_ended_at", "new_end_reason", "new_rx", "new_tx", "of_node", "of_id"],
)
_ADD_USAGE = Bulk(_add_usage, ["user_id", "node_id", "protocol", "hour", "rx", "tx"])
_USE_QUOTA = Bulk(
    lambda _: (
        sa.update(LimitsRow.__table__)  # type: ignore[arg-type]
        .where(LimitsRow.user_id == sa.bindparam("of_user"), LimitsRow.quota_bytes.is_not(None))
        .values(used_bytes=LimitsRow.used_bytes + sa.bindparam("moved"))
    ),
    ["moved", "of_user"],
)
_NOTE_LEASE = Bulk(_note_lease, ["node_id", "user_id", "ledger", "allowance", "reserved", "used"])


async def _leases(connection: AsyncConnection, node_id: str, user_ids: Sequence[str]) -> dict[str, tuple[str, int]]:
    """The ledger and the count that each of the node's leases goes by."""
    found: dict[str, tuple[str, int]] = {}
    for chunk in batched(user_ids):
        rows = await connection.execute(
            sa.select(LeaseRow.user_id, LeaseRow.ledger, LeaseRow.used).where(
                LeaseRow.node_id == node_id, LeaseRow.user_id.in_(chunk)
            )
        )
        found |= {row.user_id: (row.ledger, row.used) for row in rows}
    return found


def _row(entry: Entry) -> tuple[Any, ...]:
    """In the order of the columns."""
    return (
        entry.node_id,
        entry.id,
        entry.user_id,
        entry.protocol,
        entry.username,
        entry.connection_id,
        entry.remote,
        entry.address,
        entry.since * MICROSECONDS,
        _micros(entry.ended),
        entry.reason or None,
        entry.rx,
        entry.tx,
        entry.exact,
    )


def _micros(seconds: int) -> int | None:
    return seconds * MICROSECONDS if seconds else None


def _entry_from_row(row: Any, now: float) -> Entry:
    return Entry(
        row.node_id,
        row.id,
        row.user_id,
        row.protocol,
        row.username,
        row.connection_id,
        row.remote,
        row.address,
        int(row.started_at.timestamp()),
        row.exact,
        row.rx,
        row.tx,
        int(row.ended_at.timestamp()) if row.ended_at is not None else 0,
        row.end_reason or "",
        heard=max(row.started_at.timestamp(), now - LONGEST) if row.exact else now,
        stored=True,
    )


def session_from_row(row: Any) -> Session:
    return Session(
        row.id, row.node_id, row.user_id, row.protocol, row.username, row.connection_id, row.remote, row.address,
        row.started_at, row.ended_at, row.end_reason, row.rx, row.tx, row.exact,
    )  # fmt: skip
