"""A small fleet in a real database: two nodes that are online, two accounts, and all that connections need."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from prometheus_client import CollectorRegistry

from controller.accounts.principal import Plan, Principal, Role
from controller.accounts.tables import UserRow
from controller.desired import service as desired
from controller.errors import DomainError, ErrorKind
from controller.fleet.directory import Directory
from controller.fleet.metrics import FleetMetrics
from controller.fleet.nodes import NodeStatus
from controller.fleet.tables import NodeRow
from controller.store.database import Database, Transaction
from controller.store.types import new_id, now
from controller.tunnels.addresses import Pool
from controller.tunnels.live import LiveStates
from controller.tunnels.metrics import Metrics
from controller.tunnels.service import Tunnels, TunnelSettings
from shared import desired as resources
from shared.desired import Peer
from shared.keys import PrivateKey, decode_key
from shared.protocol import PeerStats, Report

SETTINGS = TunnelSettings(
    pool=Pool.parse("10.66.0.0/24", "fd66::/112"), dns=("9.9.9.9", "2620:fe::9"), cool_down=timedelta(minutes=10)
)


class AccountGone(DomainError):
    kind = ErrorKind.UNAUTHENTICATED
    code = "account_gone"
    message = "the account is not active"


async def hold_account(tx: Transaction, user_id: str) -> None:
    active = await tx.session.scalar(sa.select(UserRow.active).where(UserRow.id == user_id).with_for_update())
    if not active:
        raise AccountGone


@dataclass
class World:
    database: Database
    directory: Directory
    live: LiveStates
    registry: CollectorRegistry
    nodes: list[str]
    alice: Principal
    bob: Principal
    limits: dict[Plan, int] = field(default_factory=lambda: {Plan.FREE: 1, Plan.PRO: 5, Plan.ENTERPRISE: 1000})
    waits: list[tuple[str, str, int, float]] = field(default_factory=list)
    sequence: int = 0

    def tunnels(self, live: LiveStates | None = None, **changes: Any) -> Tunnels:
        """With the settings that the test changes."""
        return Tunnels(
            self.database,
            self.directory,
            live or self.live,
            replace(SETTINGS, **changes),
            max_connections=lambda plan: self.limits[plan],
            hold_account=hold_account,
            wait_applied=self.wait_applied,
        )

    @staticmethod
    def key() -> str:
        return str(PrivateKey.generate().public())

    @staticmethod
    def ago(seconds: int = 0) -> int:
        """A handshake's time as nodes report it."""
        return int(datetime.now(UTC).timestamp()) - seconds

    async def wait_applied(self, node_id: str, scope: str, revision: int, timeout: float) -> bool:
        self.waits.append((node_id, scope, revision, timeout))
        return True

    def new_live(self, interval: float = 0.02) -> LiveStates:
        """As another process has it, or the next one."""
        return LiveStates(
            self.database, Metrics(CollectorRegistry()), max_bytes_per_second=1_000_000_000, interval=interval
        )

    def report(
        self,
        public_key: str,
        rx: int = 0,
        tx: int = 0,
        handshake: int = 0,
        *,
        node: int = 0,
        generation: str = "g1",
        boot: str = "b1",
        live: LiveStates | None = None,
    ) -> None:
        self.sequence += 1
        stats = PeerStats(decode_key(public_key), rx, tx, handshake)
        report = Report(sequence=self.sequence, boot_id=boot, generation=generation, peers=[stats])
        (live or self.live).record(self.nodes[node], report)

    async def peers(self, node: int = 0) -> dict[str, Peer]:
        """What the node has to run."""
        async with self.database.connect() as connection:
            state = await desired.state(connection, self.database.secrets, desired.node_scope(self.nodes[node]))
        found = [resources.decode(item.kind, item.key, item.payload) for item in state.resources]
        return {peer.key: peer for peer in found if isinstance(peer, Peer)}


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    people = []
    nodes = []
    async with database.transaction() as tx:
        for name in ("alice", "bob"):
            user = UserRow(
                id=new_id(),
                username=name,
                username_key=name,
                email=f"{name}@example.com",
                email_key=f"{name}@example.com",
                email_verified=True,
                password_hash="-",
                role=Role.USER,
                plan=Plan.PRO,
                active=True,
                created_at=now(),
                updated_at=now(),
            )
            tx.session.add(user)
            await tx.session.flush()
            people.append(
                Principal(user.id, user.number, name, Role.USER, Plan.PRO, new_id(), "skynet", logged_in_at=now())
            )
        for name in ("fra1", "nyc1"):
            node = NodeRow(
                id=new_id(),
                name=name,
                country="DE",
                city="Frankfurt",
                endpoint="2001:db8::7" if name == "nyc1" else "vpn.example.com",
                plan=Plan.FREE,
                status=NodeStatus.ENABLED,
                created_at=now(),
                enrolled_at=now(),
                wireguard_public_key=PrivateKey.generate().public().raw,
                wireguard_port=51820,
                former_boot_ids="",
            )
            tx.session.add(node)
            nodes.append(node.id)
    registry = CollectorRegistry()
    directory = Directory(database, FleetMetrics(CollectorRegistry()))
    await directory.refresh()
    for node_id in nodes:
        directory.set_online(node_id, True)
    live = LiveStates(database, Metrics(registry), max_bytes_per_second=1_000_000_000, interval=0.02)
    yield World(database, directory, live, registry, nodes, people[0], people[1])
