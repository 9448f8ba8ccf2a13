"""The engine and the unit of work: one transaction per use case, its consequences told after the commit."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolExhausted
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine

from controller.errors import DomainError, ErrorKind
from controller.secretbox import SecretBox
from controller.store.tables import FactRow, TopicRow
from controller.store.types import new_id

BUSY_TIMEOUT = 5.0  # seconds that a writer waits for another process's transaction
_CONNECT_TIMEOUT = 5.0
_SILENCE = 15  # seconds without a sign of life from PostgreSQL's machine
_ABANDONED = 30.0  # seconds after which PostgreSQL ends a transaction that asks nothing: its process has stopped
_POOL = 8
_WRITER = 0x736B796E6574  # the advisory lock of whoever writes
_ASK_AGAIN = 0.25  # seconds

# Conditions of PostgreSQL that pass, by SQLSTATE or its class: the connection lost, rolled back for another
# transaction, no room, ended by an operator, the machine's error; a lock not had in time, a standby, a transaction that
# took too long; a table that is not there or not ours yet (a backup is being restored), or changed (an upgrade).
_PASSING = ("08", "40", "53", "57", "58", "55P03", "25006", "25P03", "42P01", "42501", "0A000")

log = structlog.get_logger()


class Topic(StrEnum):
    """What a cached snapshot may depend on. A change of the topic makes the snapshot stale in every process."""

    ACCOUNTS = "accounts"  # users, roles, plans; ended login sessions
    NODES = "nodes"
    DESIRED = "desired"
    CONNECTIONS = "connections"
    LIMITS = "limits"  # what accounts may use
    EVENTS = "events"


class StoreUnavailable(DomainError):
    """The database cannot be reached or written; nothing was changed, unless PostgreSQL left its commit unanswered."""

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

    Readers run side by side, and see one moment of it; one writer at a time, queued fairly in this process, so that
    a unit of work never meets half of another, cannot deadlock, and need not be repeated.
    """

    def __init__(self, engine: AsyncEngine, secrets: SecretBox) -> None:
        self.engine = engine
        self.secrets = secrets
        self._writer = engine.execution_options(write=True)
        self._reader = engine
        if engine.dialect.name == "postgresql":
            self._reader = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self._turn = asyncio.Lock()
        self._certain = asyncio.Lock()
        self._mark = f"written by {new_id()}"  # the row that tells this process's last certain transaction
        self._listeners: list[Listener] = []

    def listen(self, listener: Listener) -> None:
        """Call `listener` after every commit, in this process or (topics only) another; it must not block."""
        self._listeners.append(listener)

    def tell(self, committed: Committed) -> None:
        for listener in self._listeners:
            listener(committed)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        async with self._turn:
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
    async def certain_transaction(self) -> AsyncIterator[Transaction]:
        """For what must not be written twice: where PostgreSQL goes away and its answer to the commit with it, this
        waits until it is back and tells whether it was committed. StoreUnavailable then means that it was not.

        SQLite answers in this process: there a failed commit is none."""
        if self.engine.dialect.name == "sqlite":
            async with self.transaction() as tx:
                yield tx
            return
        async with self._certain:
            mark, complete = new_id(), False
            try:
                async with self.transaction() as tx:
                    yield tx
                    await tx.session.merge(FactRow(name=self._mark, value=mark))
                    await tx.session.flush()
                    complete = True
            except StoreUnavailable:
                if not complete or await self._marked() != mark:
                    raise

    async def _marked(self) -> str | None:
        while True:
            try:
                async with self.transaction() as tx:  # a writer: whatever became of the one before, it has ended
                    return await tx.session.scalar(sa.select(FactRow.value).where(FactRow.name == self._mark))
            except StoreUnavailable:
                await asyncio.sleep(_ASK_AGAIN)

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        try:
            async with AsyncSession(self._reader, expire_on_commit=False) as session:
                yield session
        except (DBAPIError, PoolExhausted) as error:
            raise translate(error) from error

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[AsyncConnection]:
        """A bare connection for the hot reads that use Core."""
        try:
            async with self._reader.connect() as connection:
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
        engine = create_async_engine(url, connect_args={"timeout": BUSY_TIMEOUT}, pool_size=_POOL, max_overflow=0)
        sa.event.listen(engine.sync_engine, "connect", _prepare_sqlite)
        sa.event.listen(engine.sync_engine, "begin", _begin_sqlite)
    else:
        server_settings = {
            "application_name": "skynetvpn-controller",
            "lock_timeout": f"{BUSY_TIMEOUT:.0f}s",
            "idle_in_transaction_session_timeout": f"{_ABANDONED:.0f}s",
        }
        engine = create_async_engine(
            url,
            connect_args={"timeout": _CONNECT_TIMEOUT, "server_settings": server_settings},
            pool_size=_POOL,
            max_overflow=0,
            pool_pre_ping=True,  # what a restarted server has closed is replaced before it is used
        )
        sa.event.listen(engine.sync_engine, "do_connect", _Connecting())
        sa.event.listen(engine.sync_engine, "begin", _begin_postgresql)
    return Database(engine, secrets)


def translate(error: DBAPIError | PoolExhausted) -> Exception:
    """A lost, locked, full or overrun database becomes StoreUnavailable; a broken rule stays what it is."""
    if isinstance(error, PoolExhausted | OperationalError) or error.connection_invalidated:
        return StoreUnavailable()
    if str(getattr(error.orig, "sqlstate", None) or "").startswith(_PASSING):
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


class _Connecting:
    """Makes PostgreSQL's connections; what keeps it from that is logged once, and is an error of the driver's kind."""

    def __init__(self) -> None:
        self._failing = False

    def __call__(self, dialect: Any, _record: object, arguments: list[Any], options: dict[str, Any]) -> Any:
        try:
            connection = dialect.loaded_dbapi.connect(*arguments, **options)
            _notice_silence(connection.driver_connection._transport.get_extra_info("socket"))
        except Exception as error:
            # The driver raises what the socket or the server said, before the engine's own translation begins.
            reason = str(error) or type(error).__name__
            if not self._failing:
                log.warning("store.connect_failed", reason=reason)
            self._failing = True
            raise dialect.loaded_dbapi.OperationalError(reason) from error
        if self._failing:
            log.info("store.connect_restored")
        self._failing = False
        return connection


def _notice_silence(line: socket.socket) -> None:
    """A server that vanished without a word shall be an error soon, not after the kernel's quarter of an hour."""
    if line.family == socket.AF_UNIX:
        return
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENCE // 3)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _SILENCE // 3)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE * 1000)


def _begin_postgresql(connection: sa.Connection) -> None:
    # The server's default isolation, READ COMMITTED, is what a writer needs: each statement sees all that the writers
    # before have committed, which a snapshot taken before the lock would not.
    if connection.get_execution_options().get("write", False):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITER})")


async def _bump(session: AsyncSession, topics: set[Topic]) -> None:
    for topic in sorted(topics):
        changed = await session.execute(
            sa.update(TopicRow).where(TopicRow.name == topic).values(revision=TopicRow.revision + 1)
        )
        if changed.rowcount == 0:  # type: ignore[attr-defined]
            session.add(TopicRow(name=topic, revision=1))
            await session.flush()
