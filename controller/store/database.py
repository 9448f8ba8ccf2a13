"""The database and the unit of work: one transaction per use case, its consequences told after the commit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolExhausted
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from controller.errors import DomainError, ErrorKind
from controller.secretbox import SecretBox
from controller.store import postgresql, sqlite
from controller.store.tables import FactRow, TopicRow
from controller.store.types import new_id

BUSY_TIMEOUT = 5.0  # seconds that a writer waits for another process's transaction
_POOL = 8
_ASK_AGAIN = 0.25  # seconds


class Topic(StrEnum):
    """What a cached snapshot may depend on. A change of the topic makes the snapshot stale in every process."""

    ACCOUNTS = "accounts"  # users, roles, plans; ended login sessions
    NODES = "nodes"
    DESIRED = "desired"
    CONNECTIONS = "connections"
    LIMITS = "limits"  # what accounts may use
    EVENTS = "events"


class StoreUnavailable(DomainError):
    """The database cannot be reached or used; nothing was changed, unless PostgreSQL left its commit unanswered."""

    kind = ErrorKind.UNAVAILABLE
    code = "store_unavailable"
    message = "the database is not available; try again later"

    def __init__(self, reason: str = "") -> None:
        self.reason = reason
        super().__init__()

    def explain(self) -> str:
        return f"the database is not available: {self.reason}" if self.reason else str(self)


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
        self._reader = postgresql.reader(engine) if engine.dialect.name == "postgresql" else engine
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
                raise translate(error, self.engine.url) from error

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
            raise translate(error, self.engine.url) from error

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[AsyncConnection]:
        """A bare connection for the hot reads that use Core."""
        try:
            async with self._reader.connect() as connection:
                yield connection
        except (DBAPIError, PoolExhausted) as error:
            raise translate(error, self.engine.url) from error

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
    kind = sqlite if url.startswith("sqlite") else postgresql
    return Database(kind.make_engine(url, _POOL, BUSY_TIMEOUT), secrets)


def translate(error: DBAPIError | PoolExhausted, url: sa.URL) -> Exception:
    """A lost, locked, full, damaged or overrun database becomes StoreUnavailable; a broken rule stays what it is."""
    if isinstance(error, PoolExhausted):
        return StoreUnavailable("all its connections are in use")
    away = isinstance(error, OperationalError) or error.connection_invalidated
    away = away or postgresql.passes(error.orig) or sqlite.is_damage(error.orig)
    return StoreUnavailable(_reason(error, url)) if away else error


def _reason(error: DBAPIError, url: sa.URL) -> str:
    """The driver's own words, in one line."""
    said = error.orig.__cause__ if error.orig is not None and error.orig.__cause__ is not None else error.orig
    words = " ".join(str(said).split()) or type(said).__name__
    return f"{url.database}: {words}" if url.get_backend_name() == "sqlite" else words


async def _bump(session: AsyncSession, topics: set[Topic]) -> None:
    for topic in sorted(topics):
        changed = await session.execute(
            sa.update(TopicRow).where(TopicRow.name == topic).values(revision=TopicRow.revision + 1)
        )
        if changed.rowcount == 0:  # type: ignore[attr-defined]
            session.add(TopicRow(name=topic, revision=1))
            await session.flush()
