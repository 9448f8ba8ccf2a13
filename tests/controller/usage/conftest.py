"""Two nodes, two accounts with a login for everything, and a clock that stands until a test moves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from prometheus_client import CollectorRegistry

from controller.access.tables import CredentialRow
from controller.accounts.errors import UserNotFound
from controller.accounts.tables import UserRow
from controller.desired import service as desired
from controller.events.service import Events
from controller.fleet.tables import NodeRow
from controller.store.database import Database, Transaction
from controller.store.types import new_id
from controller.tunnels.ending import end_by_ids
from controller.tunnels.live import LiveStates
from controller.tunnels.metrics import Metrics
from controller.tunnels.tables import ConnectionRow
from controller.usage.enforcement import Enforcement
from controller.usage.granting import rebalance
from controller.usage.limits import Limits
from controller.usage.sessions import Sessions
from controller.usage.tables import LimitsRow, SessionRow, UsageRow
from shared import desired as resources
from shared.access import Lease
from shared.desired import Payload
from shared.protocol import AccountUsage, PeerStats, Report, SessionStats

START = datetime(2026, 3, 10, 12, 0, tzinfo=UTC)
BORN = datetime(2026, 1, 31, 9, 30, tzinfo=UTC)
NODES = ("node-1", "node-2")
RATE = 1_000_000_000  # bytes per second that are believed


@dataclass
class World:
    database: Database
    now: datetime = START
    sequence: int = 0
    refreshed: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)  # users who cannot be refreshed
    acknowledged: list[tuple[str, int]] = field(default_factory=list)
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        self.live = self.new_live()
        self.events = Events(self.database)
        self.sessions = Sessions(self.database, self.live.book, end_by_ids)
        self.limits = Limits(self.refresh, clock=self.clock)
        self.enforcement = Enforcement(
            self.database, self.live.book, self.sessions, self.events, self.refresh, clock=self.clock
        )
        self.live.on_written(self.sessions.on_written)
        self.live.on_written(self.enforcement.on_written)

    def clock(self) -> datetime:
        return self.now

    def pass_(self, **time: float) -> None:
        self.now += timedelta(**time)

    @property
    def seconds(self) -> int:
        return int(self.now.timestamp())

    def new_live(self) -> LiveStates:
        """As another process has it, or the next one."""
        self.registry = CollectorRegistry()
        live = LiveStates(self.database, Metrics(self.registry), max_bytes_per_second=RATE, clock=self.clock)
        live.on_stored(lambda node_id, sequence: self.acknowledged.append((node_id, sequence)))
        return live

    async def refresh(self, tx: Transaction, user_id: str) -> None:
        if user_id in self.broken:
            raise UserNotFound
        await rebalance(tx, user_id)
        self.refreshed.append(user_id)

    def stats(self, session: str, account: int = 1, rx: int = 0, tx: int = 0, **changes: Any) -> SessionStats:
        values: dict[str, Any] = {
            "id": session,
            "protocol": "openvpn",
            "account": account,
            "username": {1: "alice", 2: "bob"}.get(account, "nobody"),
            "connection": "",
            "remote": "203.0.113.9:4711",
            "address": "10.70.0.2",
            "since": self.seconds,
            "rx": rx,
            "tx": tx,
        }
        return SessionStats(**(values | changes))

    def report(
        self,
        *sessions: SessionStats,
        node: int = 0,
        complete: bool = False,
        used: dict[int, int] | None = None,
        peers: Sequence[PeerStats] = (),
        live: LiveStates | None = None,
    ) -> Report:
        self.sequence += 1
        report = Report(
            sequence=self.sequence,
            boot_id="b1",
            generation="g1",
            peers=list(peers),
            sessions=list(sessions),
            complete=complete,
            usage=[AccountUsage(account, count) for account, count in (used or {}).items()],
        )
        (live or self.live).record(NODES[node], report)
        return report

    async def store(self, *sessions: SessionStats, **report: Any) -> None:
        self.report(*sessions, **report)
        await self.live.flush()

    async def change(self, user_id: str, **changes: Any) -> None:
        async with self.database.transaction() as tx:
            await self.limits.change(tx, user_id, **changes)

    async def session(self, session_id: str, node: int = 0) -> SessionRow | None:
        async with self.database.read() as session:
            row: SessionRow | None = await session.get(SessionRow, (NODES[node], session_id))
        return row

    async def used(self, user_id: str) -> int:
        async with self.database.read() as session:
            row = await session.get(LimitsRow, user_id)
        assert row is not None
        return row.used_bytes

    async def usage(self, user_id: str) -> dict[tuple[str, str], tuple[int, int]]:
        """Bytes by node and protocol."""
        columns = (UsageRow.node_id, UsageRow.protocol, sa.func.sum(UsageRow.rx), sa.func.sum(UsageRow.tx))
        query = sa.select(*columns).where(UsageRow.user_id == user_id).group_by(UsageRow.node_id, UsageRow.protocol)
        async with self.database.connect() as connection:
            return {(row[0], row[1]): (row[2], row[3]) for row in await connection.execute(query)}

    async def wanted(self, node: int = 0) -> dict[str, Payload]:
        """What the node has to run, by key."""
        async with self.database.connect() as connection:
            state = await desired.state(connection, self.database.secrets, desired.node_scope(NODES[node]))
        return {item.key: resources.decode(item.kind, item.key, item.payload) for item in state.resources}

    async def lease(self, user: int, node: int = 0) -> Lease | None:
        found = (await self.wanted(node)).get(str(user))
        assert found is None or isinstance(found, Lease)
        return found

    async def told(self) -> list[tuple[str, str | None]]:
        return [(event.kind.value, event.user_id) for event in await self.events.after("")]


def user(number: int, name: str) -> UserRow:
    return UserRow(
        number=number, id=name, username=name, username_key=name, email=name, email_key=name, email_verified=True,
        password_hash="-", role="user", plan="pro", active=True, created_at=BORN, updated_at=BORN,
    )  # fmt: skip


def node(name: str) -> NodeRow:
    return NodeRow(
        id=name, name=name, country="DE", city="x", plan="free", status="enabled", created_at=BORN, enrolled_at=BORN,
        wireguard_public_key=name.encode().ljust(32), wireguard_port=1, former_boot_ids="", ledger=f"ledger of {name}",
    )  # fmt: skip


def credential(name: str, protocol: str, node_id: str | None = None) -> CredentialRow:
    return CredentialRow(
        id=new_id(), user_id=name, protocol=protocol, username=name, node_id=node_id, sealed_secret=b"",
        public_keys="", fingerprint=b"", created_at=BORN,
    )  # fmt: skip


def connection(name: str, user_id: str, key: bytes, protocol: str = "wireguard") -> ConnectionRow:
    return ConnectionRow(
        id=name, user_id=user_id, node_id=NODES[0], contract="skynet", protocol=protocol, created_at=START,
        public_key=key, last_rx=0, last_tx=0, last_handshake=0, rx=0, tx=0,
    )  # fmt: skip


@pytest.fixture
async def world(database: Database) -> World:
    async with database.transaction() as tx:
        tx.session.add_all([user(1, "alice"), user(2, "bob"), *(node(name) for name in NODES)])
        await tx.session.flush()
        tx.session.add_all(
            [credential(name, protocol) for name in ("alice", "bob") for protocol in ("openvpn", "ssh", "l2tp")]
        )
    return World(database)
