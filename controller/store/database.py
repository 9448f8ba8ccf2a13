"""The engine and the unit of work: one transaction per use case, its consequences told after the commit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolExhausted
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine

from controller.errors import DomainError, ErrorKind
from controller.secretbox import SecretBox
from controller.store.tables import FactRow, TopicRow
from controller.store.types import new_id

BUSY_TIMEOUT = 5.0  # seconds that a writer waits for another process's transaction


class Topic(StrEnum):
    """What a cached snapshot may depend on. A change of the topic makes the snapshot stale in every process."""

    ACCOUNTS = "accounts"  # users, roles, plans; ended login sessions
    NODES = "nodes"
    DESIRED = "desired"
    CONNECTIONS = "connections"
    LIMITS = "limits"  # what accounts may use
    EVENTS = "events"


class StoreUnavailable(DomainError):
    """The database cannot be reached or written; nothing was changed."""

    kind = ErrorKind.UNAVAILABLE
    code = "store_unavailable"
    message = "the database is not available; try again later"


@dataclass(frozen=True, slots=True)
class Committed:
    """What a transaction changed. `scopes` are of desired state; None = unknown (another process did it).

    `notes` are what rooms said of the change, in order, so that a listener that knows them need not read it again.
    """

    topics: frozenset[Topic]
    scopes: frozenset[str] | None
    notes: tuple[object, ...] = ()


Listener = Callable[[Committed], None]


@dataclass(slots=True)
class Transaction:
    """A unit of work. Leaving the `async with` commits; an exception rolls back and tells nobody."""

    session: AsyncSession
    secrets: SecretBox
    topics: set[Topic] = field(default_factory=set)
    scopes: set[str] = field(default_factory=set)
    notes: list[object] = field(default_factory=list)

    def touch(self, topic: Topic) -> None:
        self.topics.add(topic)

    def poke(self, scope: str) -> None:
        """The desired state of the scope changed."""
        self.topics.add(Topic.DESIRED)
        self.scopes.add(scope)

    def note(self, change: object) -> None:
        """Say what changed, as a hint: inside a savepoint, which may be undone, nothing is said."""
        if not self.session.in_nested_transaction():
            self.notes.append(change)

    def committed(self) -> Committed:
        return Committed(frozenset(self.topics), frozenset(self.scopes), tuple(self.notes))


class Database:
    """One database, and the box for the secrets that rest in it.

    Readers run side by side; on SQLite one writer at a time, queued fairly in this process.
    """

    def __init__(self, engine: AsyncEngine, secrets: SecretBox) -> None:
        self.engine = engine
        self.secrets = secrets
        self._writer = engine.execution_options(write=True)
        self._turn = asyncio.Lock() if engine.dialect.name == "sqlite" else None
        self._listeners: list[Listener] = []

    def listen(self, listener: Listener) -> None:
        """Call `listener` after every commit, in this process or (topics only) another; it must not block."""
        self._listeners.append(listener)

    def tell(self, committed: Committed) -> None:
        for listener in self._listeners:
            listener(committed)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        async with AsyncExitStack() as stack:
            if self._turn is not None:
                await stack.enter_async_context(self._turn)
            try:
                async with AsyncSession(self._writer, expire_on_commit=False) as session:
                    transaction = Transaction(session, self.secrets)
                    yield transaction
                    if transaction.topics:
                        await _bump(session, transaction.topics)
                    await session.commit()
                    if transaction.topics:
                        self.tell(transaction.committed())
            except (DBAPIError, PoolExhausted) as error:
                raise translate(error) from error

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        try:
            async with AsyncSession(self.engine, expire_on_commit=False) as session:
                yield session
        except (DBAPIError, PoolExhausted) as error:
            raise translate(error) from error

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[AsyncConnection]:
        """A bare connection for the hot reads that use Core."""
        try:
            async with self.engine.connect() as connection:
                yield connection
        except (DBAPIError, PoolExhausted) as error:
            raise translate(error) from error

    async def epoch(self) -> str:
        """The identity of this database's history; it changes when a backup is restored."""
        async with self.transaction() as tx:
            row = await tx.session.get(FactRow, "epoch")
            if row is None:
                row = FactRow(name="epoch", value=new_id())
                tx.session.add(row)
            return row.value

    async def close(self) -> None:
        await self.engine.dispose()


def open_database(url: str, secrets: SecretBox) -> Database:
    """Open `sqlite+aiosqlite:///path` or `postgresql+asyncpg://…`; nothing is connected yet."""
    if url.startswith("sqlite"):
        engine = create_async_engine(url, connect_args={"timeout": BUSY_TIMEOUT}, pool_size=8, max_overflow=0)
        sa.event.listen(engine.sync_engine, "connect", _prepare_sqlite)
        sa.event.listen(engine.sync_engine, "begin", _begin_sqlite)
    else:
        engine = create_async_engine(url, pool_pre_ping=True)
    return Database(engine, secrets)


def translate(error: DBAPIError | PoolExhausted) -> Exception:
    """A lost, locked, full or overrun database becomes StoreUnavailable; a broken rule stays what it is."""
    if isinstance(error, PoolExhausted | OperationalError) or error.connection_invalidated:
        return StoreUnavailable()
    return error


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver's own BEGIN comes too late; _begin_sqlite sends ours
    cursor = connection.cursor()
    # secure_delete: what was deleted or overwritten is so in the file too, and not only forgotten by its tables.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    # A writer takes its lock at once: upgrading a read lock later fails without waiting when another process wrote.
    write = connection.get_execution_options().get("write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


async def _bump(session: AsyncSession, topics: set[Topic]) -> None:
    for topic in sorted(topics):
        changed = await session.execute(
            sa.update(TopicRow).where(TopicRow.name == topic).values(revision=TopicRow.revision + 1)
        )
        if changed.rowcount == 0:  # type: ignore[attr-defined]
            session.add(TopicRow(name=topic, revision=1))
            await session.flush()
