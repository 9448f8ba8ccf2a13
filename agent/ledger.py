"""The node's own records on disk: what accounts have used, and the sessions that are not over and acknowledged.

A file beside the desired state: it is written every second, and must not delay a change of peers. Both the sum and
the counter that it was made from are of one transaction, so a killed agent neither loses a byte nor counts it twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog

from agent import files
from agent.databases import open_to_read
from agent.sessionlog import Entry
from shared.protocol import SessionStats

_APPLICATION_ID = 0x534B594C
_VERSION = 1
_BUSY_MS = 5000
_SCHEMA = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
CREATE TABLE usage (account INTEGER PRIMARY KEY, used INTEGER NOT NULL);
CREATE TABLE meters (public_key BLOB PRIMARY KEY, generation TEXT NOT NULL, bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE sessions (id TEXT PRIMARY KEY, stats BLOB NOT NULL, raw_rx INTEGER NOT NULL, raw_tx INTEGER NOT NULL);
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_VERSION};
"""
T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Records:
    """What the disk knows. `ledger` is the identity of these records; a fresh one has just begun at 0, and "" is not
    on any disk: no lease is valid for it."""

    ledger: str = ""
    fresh: bool = True
    used: dict[int, int] = field(default_factory=dict)
    meters: dict[bytes, tuple[str, int]] = field(default_factory=dict)
    sessions: list[Entry] = field(default_factory=list)


class _Damaged(Exception):
    """The file is not whole records of this version."""


class Ledger:
    """One file, one connection, one thread. What could not be written is written with what comes next."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "ledger.db"
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._connection: sqlite3.Connection | None = None
        self._only_read = False  # when they were opened; they are to be written once they can be
        self._used: dict[int, int] = {}
        self._meters: dict[bytes, tuple[str, int] | None] = {}
        self._sessions: dict[str, Entry | None] = {}
        self._failing = False
        self._writing = asyncio.Lock()  # an older batch never comes after a newer one

    def open(self) -> Records:
        """Open the records; damaged ones are put aside, and new ones begun. It blocks for a moment.

        Those that can only be read, as on a full disk, hold.
        """
        try:
            return self._open()
        except (sqlite3.Error, OSError) as error:
            log.error("ledger_unavailable", path=str(self.path), error=str(error))
            return Records()

    def put(
        self,
        *,
        used: Mapping[int, int] | None = None,
        meters: Mapping[bytes, tuple[str, int]] | None = None,
        gone: Sequence[bytes] = (),
        sessions: Sequence[Entry] = (),
        forgotten: Sequence[str] = (),
    ) -> None:
        """Have the next flush record the sums of accounts together with the counters that they come from."""
        self._used |= used or {}
        self._meters |= meters or {}
        self._meters |= dict.fromkeys(gone)
        self._sessions |= {entry.stats.id: entry for entry in sessions}
        self._sessions |= dict.fromkeys(forgotten)

    async def flush(self) -> None:
        async with self._writing:
            await self._flush()

    async def _flush(self) -> None:
        batch = self._used, self._meters, self._sessions
        if (self._connection is None and not self._only_read) or not any(batch):
            return
        self._used, self._meters, self._sessions = {}, {}, {}
        try:
            await self._run(self._write, *batch)
        except (sqlite3.Error, OSError) as error:
            self._used = batch[0] | self._used
            self._meters = batch[1] | self._meters
            self._sessions = batch[2] | self._sessions
            if not self._failing:
                log.error("ledger_not_written", path=str(self.path), error=str(error))
            self._failing = True
            return
        if self._failing:
            log.info("ledger_written_again", path=str(self.path))
        self._failing = False

    async def close(self) -> None:
        await self.flush()
        await self._run(self._close)
        self._executor.shutdown(wait=False)

    async def _run(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    def _open(self) -> Records:
        if self.path.exists():
            try:
                return self._read()
            except (_Damaged, sqlite3.DatabaseError, msgspec.DecodeError) as error:
                self._close()
                log.error("ledger_lost", path=str(self.path), reason=str(error))
                for suffix in ("", "-wal", "-shm"):
                    with contextlib.suppress(FileNotFoundError):
                        Path(f"{self.path}{suffix}").replace(f"{self.path}.damaged{suffix}")
        self.path.touch(mode=0o600)
        ledger = secrets.token_hex(16)
        self._connection = _connect(self.path)
        self._connection.executescript(_SCHEMA)
        self._connection.execute("INSERT INTO meta VALUES ('ledger', ?)", (ledger,))
        return Records(ledger)

    def _read(self) -> Records:
        if files.exposed(self.path):
            raise _Damaged("it can be read by others")
        try:
            self._connection = _connect(self.path)
            return _records(self._connection)
        except sqlite3.OperationalError as error:
            self._close()
            if error.sqlite_errorcode == sqlite3.SQLITE_ERROR:
                raise  # it is no disk that fails, it has not the tables
        with contextlib.closing(open_to_read(self.path)) as connection:
            records = _records(connection)
        log.error("ledger_only_readable", path=str(self.path))
        self._only_read = True
        return records

    def _write(
        self,
        used: Mapping[int, int],
        meters: Mapping[bytes, tuple[str, int] | None],
        sessions: Mapping[str, Entry | None],
    ) -> None:
        if self._connection is None:
            self._connection = _connect(self.path)
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.executemany("INSERT OR REPLACE INTO usage VALUES (?, ?)", used.items())
            connection.executemany(
                "INSERT OR REPLACE INTO meters VALUES (?, ?, ?)",
                [(key, *meter) for key, meter in meters.items() if meter is not None],
            )
            connection.executemany(
                "DELETE FROM meters WHERE public_key = ?", [(key,) for key, meter in meters.items() if meter is None]
            )
            connection.executemany(
                "INSERT INTO sessions VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                "stats = excluded.stats, raw_rx = excluded.raw_rx, raw_tx = excluded.raw_tx",
                [
                    (key, _encoder.encode(entry.stats), entry.raw_rx, entry.raw_tx)
                    for key, entry in sessions.items()
                    if entry is not None
                ],
            )
            connection.executemany(
                "DELETE FROM sessions WHERE id = ?", [(key,) for key, entry in sessions.items() if entry is None]
            )
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=_BUSY_MS / 1000)
    # NORMAL: a killed agent loses nothing; a power cut may lose the last seconds, and all sessions with them.
    connection.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA cache_size = -500;")
    return connection


def _records(connection: sqlite3.Connection) -> Records:
    """Raises _Damaged, sqlite3.DatabaseError and msgspec.DecodeError for what are no records."""
    for pragma, wanted in (("application_id", _APPLICATION_ID), ("user_version", _VERSION), ("quick_check", "ok")):
        if (found := connection.execute(f"PRAGMA {pragma}").fetchone()[0]) != wanted:
            raise _Damaged(f"{pragma} is {found}")
    row = connection.execute("SELECT value FROM meta WHERE key = 'ledger'").fetchone()
    if row is None:
        raise _Damaged("it has no identity")
    sessions = connection.execute("SELECT stats, raw_rx, raw_tx FROM sessions ORDER BY rowid")
    decoder = msgspec.msgpack.Decoder(SessionStats)
    return Records(
        row[0],
        False,
        dict(connection.execute("SELECT account, used FROM usage")),
        {key: (generation, count) for key, generation, count in connection.execute("SELECT * FROM meters")},
        [Entry(decoder.decode(stats), raw_rx, raw_tx) for stats, raw_rx, raw_tx in sessions],
    )
