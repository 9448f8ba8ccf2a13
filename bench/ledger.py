"""The usage ledger: 10,000 sessions of one node that all moved bytes, against bare `executemany` of the same rows.

Ours is everything from the frame to the commit: decoding, counting, sessions, usage by the hour, the report's mark.
The ceiling is sqlite3 alone, given the finished rows of the two tables. Processor time, of all threads.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import sqlalchemy as sa
from prometheus_client import CollectorRegistry

from bench.harness import Goal, Ratio, Result, absolute, compared, interleaved
from controller.access.tables import CredentialRow
from controller.accounts.tables import UserRow
from controller.fleet.tables import NodeRow
from controller.secretbox import SecretBox
from controller.store.database import Database, open_database
from controller.store.schema import metadata
from controller.store.types import new_id, now
from controller.tunnels.live import LiveStates
from controller.tunnels.metrics import Metrics
from shared.protocol import Report, SessionStats, decode_from_agent, encode

ROW = "ledger"
_SESSIONS = 10_000
_INTERVAL = 10.0  # seconds between two reports of a node
_NODE = "0190a6e2-0000-7000-8000-000000000001"
_MOVE = "UPDATE vpn_sessions SET rx = ?, tx = ? WHERE node_id = ? AND id = ?"
_COUNT = """INSERT INTO usage (user_id, node_id, protocol, hour, rx, tx) VALUES (?, ?, 'openvpn', ?, ?, ?)
    ON CONFLICT (user_id, node_id, protocol, hour) DO UPDATE SET rx = rx + excluded.rx, tx = tx + excluded.tx"""


def measure(*, quick: bool) -> list[Result]:
    count, pairs = (1000, 3) if quick else (_SESSIONS, 9)
    with tempfile.TemporaryDirectory(prefix="bench-ledger-") as directory:
        found = asyncio.run(_pairs(Path(directory), count, pairs))
    share = statistics.median(ours for ours, _ in found) / 1000 / _INTERVAL * 100
    measure = f"usage ledger, {count:,} active sessions of one node every {_INTERVAL:.0f} s"
    return [
        absolute(ROW, f"{measure}, processor", "% of a core", share, goal=Goal(at_most=3)),
        compared(
            ROW,
            f"{measure}, one report",
            "ms",
            found,
            against="bare executemany of the changed rows",
            goal=Goal(at_least=0.5),
            kind=Ratio.FASTER,
        ),
    ]


async def _pairs(directory: Path, count: int, pairs: int) -> list[tuple[float, float]]:
    """Milliseconds of processor time; each side has its own file of the same content."""
    users = [new_id() for _ in range(count)]
    sessions = [secrets.token_hex(16) for _ in range(count)]
    ours, theirs = directory / "ours.db", directory / "theirs.db"
    for path in (ours, theirs):
        database = await _database(path, users)
        await _Ledger(database, sessions).report()
        await database.close()
    database = open_database(f"sqlite+aiosqlite:///{ours}", SecretBox({"k1": os.urandom(32)}, "k1"))
    ledger = _Ledger(database, sessions)
    await ledger.start()
    ceiling = _Ceiling(theirs, users, sessions)
    try:
        return await interleaved(ledger.report, ceiling.write, pairs)
    finally:
        ceiling.close()
        await database.close()


class _Ledger:
    def __init__(self, database: Database, sessions: Sequence[str]) -> None:
        self._live = LiveStates(database, Metrics(CollectorRegistry()), max_bytes_per_second=12_500_000_000)
        self._sessions = sessions
        self._began = int(time.time()) - 3600
        self._sequence = 0

    async def start(self) -> None:
        """As after a restart of the controller, with the first report of the link behind it."""
        await self._live.load()
        self._sequence = 1
        await self.report()

    async def report(self) -> float:
        self._sequence += 1
        moved = self._sequence * 1_000_000
        sessions = [
            SessionStats(
                name, "openvpn", number, f"u{number}", "", "203.0.113.9:4711", "10.70.0.2", self._began, moved, moved
            )
            for number, name in enumerate(self._sessions, 1)
        ]
        frame = encode(Report(sequence=self._sequence, boot_id="b", generation="g", sessions=sessions))
        began = time.process_time()
        report = decode_from_agent(frame)
        assert isinstance(report, Report)
        self._live.record(_NODE, report)
        await self._live.flush()
        return (time.process_time() - began) * 1000


class _Ceiling:
    def __init__(self, path: Path, users: Sequence[str], sessions: Sequence[str]) -> None:
        self._users, self._sessions = sorted(users), sorted(sessions)
        self._database = sqlite3.connect(path)
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):  # as ours
            self._database.execute(f"PRAGMA {pragma}")
        self._rounds = 1

    async def write(self) -> float:
        self._rounds += 1
        moved, hour = self._rounds * 1_000_000, int(time.time()) // 3600 * 3600 * 1_000_000
        moves = [(moved, moved, _NODE, name) for name in self._sessions]
        counts = [(user_id, _NODE, hour, 1_000_000, 1_000_000) for user_id in self._users]
        began = time.process_time()
        with self._database:
            self._database.executemany(_MOVE, moves)
            self._database.executemany(_COUNT, counts)
        return (time.process_time() - began) * 1000

    def close(self) -> None:
        self._database.close()


async def _database(path: Path, users: Sequence[str]) -> Database:
    """Accounts with a login each."""
    database = open_database(f"sqlite+aiosqlite:///{path}", SecretBox({"k1": os.urandom(32)}, "k1"))
    async with database.engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    accounts, credentials = [], []
    for number, user_id in enumerate(users, 1):
        name, moment = f"u{number}", now()
        accounts.append(
            {
                **{"number": number, "id": user_id, "role": "user", "plan": "pro", "password_hash": "-"},
                **dict.fromkeys(("username", "username_key", "email", "email_key"), name),
                **{"email_verified": True, "active": True, "created_at": moment, "updated_at": moment},
            }
        )
        credentials.append(
            {
                **{"id": new_id(), "user_id": user_id, "protocol": "openvpn", "username": name, "created_at": moment},
                **{"sealed_secret": b"", "public_keys": "", "fingerprint": b""},
            }
        )
    node = {
        **{"id": _NODE, "name": "n", "country": "DE", "city": "Berlin", "plan": "free", "status": "enabled"},
        **{"created_at": now(), "wireguard_port": 51820, "former_boot_ids": ""},
    }
    async with database.transaction() as tx:
        await tx.session.execute(sa.insert(NodeRow), [node])
        await tx.session.execute(sa.insert(UserRow), accounts)
        await tx.session.execute(sa.insert(CredentialRow), credentials)
    return database
