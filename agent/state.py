"""The last good desired state on disk, written before anything is applied; a damaged file is never "no peers"."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import structlog

from agent import files
from agent.databases import open_to_read
from agent.errors import AgentError
from shared.protocol import Resource, ResourceName

T = TypeVar("T")

_APPLICATION_ID = 0x534B594E
_VERSION = 1
_SEQUENCE_BLOCK = 10_000
_AT_ONCE = 16  # resources that are written on the event loop: 0.1 ms, less than a thread takes to wake up
_LOG = 256  # resources in SQLite's log before it is written back to the file, which waits for the disk
_BUSY_MS = 5000  # of another process that has the file open
_SCHEMA = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
CREATE TABLE scopes (scope TEXT PRIMARY KEY, epoch TEXT NOT NULL, revision INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE resources (
  scope TEXT NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL, payload BLOB NOT NULL, UNIQUE (scope, kind, key)
);
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_VERSION};
"""

log = structlog.get_logger()


class StateError(Exception):
    """The state could not be stored (disk full, read-only, I/O error); what was stored before still is."""


class _Damaged(Exception):
    """The file is not a whole state of this version; the text says why."""


@dataclass(frozen=True, slots=True)
class StoredScope:
    epoch: str
    revision: int
    resources: list[Resource]


@dataclass(frozen=True, slots=True)
class Stored:
    """What the disk knows. Without `trusted` it is absent or from a backup: enough to serve peers from, not enough to
    remove any from the host."""

    scopes: dict[str, StoredScope] = field(default_factory=dict)
    epoch: str = ""
    trusted: bool = False


class State:
    """One file, one connection, one writer: the thread, or the event loop while the thread has nothing to do."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "state.db"
        self.backup_path = directory / "state.backup.db"
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="state")
        self._connection: sqlite3.Connection | None = None
        self._in_use = threading.Lock()  # guards the connection
        self._logged = 0
        self._changed = False
        self._sequence = self._reserved = 0

    async def open(self) -> Stored:
        """Open the file, or the backup where it is damaged, or start empty; raise StateError where none can be.

        What can only be read, as on a full disk, is served all the same.
        """
        stored = await self._run(self._open, True)
        if self._connection is None:
            log.error("state_only_readable", path=str(self.path))
        return stored

    async def change(
        self, scope: str, revision: int, upserts: Sequence[Resource], removals: Sequence[ResourceName]
    ) -> None:
        """Store a delta of a scope that is stored already."""
        if not self._change_at_once(scope, revision, upserts, removals):
            await self._run(self._change, scope, revision, upserts, removals)

    async def replace(self, scope: str, epoch: str, revision: int, resources: Sequence[Resource]) -> None:
        """Store a whole scope in place of what is there, all or nothing."""
        await self._run(self._replace, scope, epoch, revision, resources)
        with contextlib.suppress(StateError):  # the state itself is stored; the next backup tries again
            await self.backup()

    async def drop(self, scopes: Iterable[str]) -> None:
        await self._run(self._drop, list(scopes))

    async def next_sequence(self) -> int:
        """A number greater than any before, also after a crash; it is written ahead in blocks."""
        if self._sequence >= self._reserved:
            self._reserved = await self._run(self._reserve)
        self._sequence += 1
        return self._sequence

    async def backup(self) -> None:
        """Write a second whole copy, where anything changed since the last one."""
        if self._changed:
            await self._run(self._backup)

    async def close(self) -> None:
        await self._run(self._close)
        self._executor.shutdown(wait=False)

    async def _run(self, function: Callable[..., T], *arguments: object) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, self._alone, function, *arguments)
        except (sqlite3.Error, OSError, AgentError) as error:
            raise StateError(f"{self.path}: {error}") from error

    def _alone(self, function: Callable[..., T], *arguments: object) -> T:
        with self._in_use:
            return function(*arguments)

    def _change_at_once(
        self, scope: str, revision: int, upserts: Sequence[Resource], removals: Sequence[ResourceName]
    ) -> bool:
        """Store a small change without the thread; False where that could wait for anything, or failed."""
        count = len(upserts) + len(removals)
        if count > _AT_ONCE or self._logged + count > _LOG or not self._in_use.acquire(blocking=False):
            return False
        try:
            if self._connection is None:
                return False
            self._change(scope, revision, upserts, removals, wait=False)
        except sqlite3.Error:
            return False  # nothing of it is stored; the thread tries again, and waits or tells why not
        finally:
            self._in_use.release()
        return True

    def _open(self, only_to_read: bool = False) -> Stored:
        trusted = True
        try:
            self._connection, stored = _read(self.path, only_to_read=only_to_read)
        except sqlite3.OperationalError:  # no space, no right: nothing that a backup would cure
            raise
        except FileNotFoundError:
            trusted = False
            self._connection, stored = self._restore("missing")
        except (_Damaged, sqlite3.DatabaseError) as error:
            trusted = False
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    damaged = Path(f"{self.path}{suffix}")
                    damaged.chmod(0o600)
                    damaged.replace(f"{self.path}.damaged{suffix}")
            self._connection, stored = self._restore(str(error))
        if self._connection is None:
            return Stored(stored.scopes, stored.epoch, bool(stored.epoch))
        (sequence,) = self._connection.execute("SELECT max(value) FROM meta WHERE key = 'sequence'").fetchone()
        self._sequence = self._reserved = sequence if trusted and sequence else int(time.time() * 1000)
        self._changed = not self.backup_path.exists()
        return Stored(stored.scopes, stored.epoch, trusted and bool(stored.epoch))

    def _restore(self, reason: str) -> tuple[sqlite3.Connection, Stored]:
        """Take the backup as the state, else begin an empty one."""
        try:
            connection, stored = _read(self.backup_path)
            assert connection is not None
            connection.close()
            files.write_private(self.path, self.backup_path.read_bytes())
            log.warning("state_restored_from_backup", path=str(self.path), reason=reason)
            return _connect(self.path), stored
        except FileNotFoundError:
            if reason != "missing":
                log.error("state_lost", path=str(self.path), reason=reason)
        except (_Damaged, sqlite3.DatabaseError) as error:
            log.error("state_lost", path=str(self.path), reason=reason, backup=str(error))
        connection = _connect(self.path, create=True)
        connection.executescript(_SCHEMA)
        return connection, Stored()

    def _change(
        self,
        scope: str,
        revision: int,
        upserts: Sequence[Resource],
        removals: Sequence[ResourceName],
        *,
        wait: bool = True,
    ) -> None:
        with self._transaction(len(upserts) + len(removals), wait=wait) as connection:
            connection.executemany(
                "DELETE FROM resources WHERE scope = ? AND kind = ? AND key = ?",
                [(scope, name.kind, name.key) for name in removals],
            )
            _insert(connection, scope, upserts)
            connection.execute("UPDATE scopes SET revision = ? WHERE scope = ?", (revision, scope))

    def _replace(self, scope: str, epoch: str, revision: int, resources: Sequence[Resource]) -> None:
        with self._transaction(len(resources)) as connection:
            connection.execute("DELETE FROM resources WHERE scope = ?", (scope,))
            _insert(connection, scope, resources)
            connection.execute("INSERT OR REPLACE INTO scopes VALUES (?, ?, ?)", (scope, epoch, revision))
            if epoch:
                connection.execute("INSERT OR REPLACE INTO meta VALUES ('epoch', ?)", (epoch,))

    def _drop(self, scopes: list[str]) -> None:
        with self._transaction() as connection:
            for table in ("resources", "scopes"):
                statement = f"DELETE FROM {table} WHERE scope = ?"  # noqa: S608  the table is one of two words
                connection.executemany(statement, [(scope,) for scope in scopes])

    def _reserve(self) -> int:
        with self._transaction() as connection:
            reserved = self._sequence + _SEQUENCE_BLOCK  # not before: where it opens the file, that tells it
            connection.execute("INSERT OR REPLACE INTO meta VALUES ('sequence', ?)", (reserved,))
        return reserved

    def _backup(self) -> None:
        temporary = self.backup_path.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        target = _connect(temporary, create=True)
        try:
            self._database().backup(target)
            target.execute("PRAGMA journal_mode = DELETE")
        finally:
            target.close()
        files.sync(temporary)
        temporary.replace(self.backup_path)
        files.sync_directory(self.backup_path.parent)
        self._changed = False

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextlib.contextmanager
    def _transaction(self, resources: int = 1, *, wait: bool = True) -> Iterator[sqlite3.Connection]:
        """Without `wait` it waits for no other process, and not for the disk."""
        connection = self._database()
        connection.execute(f"PRAGMA busy_timeout = {_BUSY_MS if wait else 0}")
        if wait and self._logged + resources > _LOG:
            # Before the transaction: the first one after it waits for the disk too.
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
            self._logged = 0
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self._changed = True
        self._logged += resources

    def _database(self) -> sqlite3.Connection:
        if self._connection is None:  # it could not be opened at the start; perhaps the disk is well again
            self._open()
        assert self._connection is not None
        return self._connection


def _connect(path: Path, *, create: bool = False) -> sqlite3.Connection:
    if create:
        path.touch(mode=0o600)
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=_BUSY_MS / 1000)
    # NORMAL: a power cut may lose the last commits, never the file; the controller then sends them again.
    # The log is written back by the thread, when it is due, and not by whoever commits.
    connection.executescript(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;"
        "PRAGMA wal_autocheckpoint = 0; PRAGMA cache_size = -1000;"
    )
    return connection


def _read(path: Path, *, only_to_read: bool = False) -> tuple[sqlite3.Connection | None, Stored]:
    """With `only_to_read` there is no connection where the file cannot be written; else that raises OperationalError.

    Raises FileNotFoundError, _Damaged and sqlite3.DatabaseError for what is no state.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    if files.exposed(path):
        raise _Damaged("it can be read by others")
    try:
        connection = _connect(path)
        try:
            return connection, _stored(connection)
        except BaseException:
            connection.close()
            raise
    except sqlite3.OperationalError:
        if not only_to_read:
            raise
    with contextlib.closing(open_to_read(path)) as connection:
        try:
            return None, _stored(connection)
        except sqlite3.OperationalError as error:
            raise _Damaged(str(error)) from error


def _stored(connection: sqlite3.Connection) -> Stored:
    """Raises _Damaged, and OperationalError for what is not the file's fault."""
    try:
        identity = (_pragma(connection, "application_id"), _pragma(connection, "user_version"))
        if identity != (_APPLICATION_ID, _VERSION):
            raise _Damaged(f"it is not a state of version {_VERSION}")
        if (check := _pragma(connection, "quick_check(1)")) != "ok":
            raise _Damaged(str(check))
        scopes = {
            scope: StoredScope(epoch, revision, [])
            for scope, epoch, revision in connection.execute("SELECT scope, epoch, revision FROM scopes")
        }
        # In the order of arrival: of two resources that exclude each other, the one that was there first stays.
        for scope, *resource in connection.execute("SELECT scope, kind, key, payload FROM resources ORDER BY rowid"):
            scopes[scope].resources.append(Resource(*resource))
        row = connection.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()
    except (KeyError, sqlite3.DatabaseError) as error:
        if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode != sqlite3.SQLITE_ERROR:
            raise  # no space, or a disk that does not answer
        raise _Damaged(str(error)) from error
    return Stored(scopes, row[0] if row else "")


def _pragma(connection: sqlite3.Connection, name: str) -> object:
    (value,) = connection.execute(f"PRAGMA {name}").fetchone()
    return value


def _insert(connection: sqlite3.Connection, scope: str, resources: Sequence[Resource]) -> None:
    connection.executemany(
        "INSERT INTO resources VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET payload = excluded.payload",
        [(scope, resource.kind, resource.key, resource.payload) for resource in resources],
    )
