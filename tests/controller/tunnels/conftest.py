"""A small fleet in a real database: two nodes that are online, two accounts, and all that connections need."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from controller.access.logins import Logins
from controller.accounts.passwords import Passwords
from controller.accounts.principal import Plan, Principal, Role
from controller.accounts.service import hold_account
from controller.accounts.tables import UserRow
from controller.config import Passwords as PasswordSettings
from controller.desired import service as desired
from controller.fleet.directory import Directory
from controller.fleet.metrics import FleetMetrics
from controller.fleet.nodes import NodeStatus
from controller.fleet.protocols import Protocols
from controller.fleet.settings import FleetSettings
from controller.fleet.tables import NodeRow
from controller.fleet.vpnkeys import load_keys
from controller.store.database import Database
from controller.store.types import new_id, now
from controller.tunnels.addresses import Pool
from controller.tunnels.live import LiveStates
from controller.tunnels.metrics import Metrics
from controller.tunnels.service import Tunnels, TunnelSettings
from shared import desired as resources
from shared.access import Credential
from shared.desired import Payload, Peer
from shared.keys import PrivateKey, decode_key
from shared.protocol import PeerStats, Report, SessionStats

SETTINGS = TunnelSettings(
    pool=Pool.parse("10.66.0.0/24", "fd66::/112"), dns=("9.9.9.9", "2620:fe::9"), cool_down=timedelta(minutes=10)
)


FLEET = FleetSettings("controller.example.com:8443", SETTINGS.pool.ipv4, SETTINGS.pool.ipv6, dns=SETTINGS.dns)
CHEAP = PasswordSettings(memory_kib=64, time_cost=1, parallelism=1, workers=1, queue=8)
HOST_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPl2u3b3cJ7sU2y7m0uK4m8Qm2dG9v0o3w5sX1pQwZkE"


@dataclass
class World:
    database: Database
    directory: Directory
    live: LiveStates
    registry: CollectorRegistry
    nodes: list[str]  # the last one offers all protocols
    passwords: Passwords
    logins: Logins
    protocols: Protocols
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
            self.logins,
            replace(SETTINGS, **changes),
            max_connections=lambda plan: self.limits[plan],
            hold_account=hold_account,
            server_of=self.protocols.server_of,
            mtu_of=self.protocols.mtu_of,
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

    def session(self, credential: Credential, *, ended: bool = False, rx: int = 0, tx: int = 0) -> None:
        """The last node reports the session of a connection's login."""
        self.sequence += 1
        now = self.ago()
        told = SessionStats(
            "s1",
            credential.protocol,
            credential.account,
            credential.username,
            credential.connection,
            "198.51.100.7:4711",
            "10.67.0.2",
            now - 5,
            rx,
            tx,
            now if ended else 0,
        )
        self.live.record(self.nodes[-1], Report(sequence=self.sequence, boot_id="b1", generation="g1", sessions=[told]))

    async def wanted(self, node: int = 0) -> list[Payload]:
        """What the node has to run, by its own scope."""
        return await self.wanted_of(desired.node_scope(self.nodes[node]))

    async def wanted_of(self, scope: str) -> list[Payload]:
        async with self.database.connect() as connection:
            state = await desired.state(connection, self.database.secrets, scope)
        return [resources.decode(item.kind, item.key, item.payload) for item in state.resources]

    async def peers(self, node: int = 0) -> dict[str, Peer]:
        return {found.key: found for found in await self.wanted(node) if isinstance(found, Peer)}

    async def credentials(self, node: int = -1) -> list[Credential]:
        return [found for found in await self.wanted(node) if isinstance(found, Credential)]


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
        for name in ("fra1", "nyc1", "lon1"):
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
                protocols="wireguard openvpn ssh l2tp" if name == "lon1" else "wireguard",
                ssh_host_keys=HOST_KEY if name == "lon1" else "",
            )
            tx.session.add(node)
            nodes.append(node.id)
    registry = CollectorRegistry()
    directory = Directory(database, FleetMetrics(CollectorRegistry()))
    await directory.refresh()
    for node_id in nodes:
        directory.set_online(node_id, True)
    live = LiveStates(database, Metrics(registry), max_bytes_per_second=1_000_000_000, interval=0.02)
    keys = await load_keys(database)
    protocols = Protocols(database, FLEET, keys)
    await protocols.refresh()
    passwords = Passwords(CHEAP)
    logins = Logins(passwords, keys)
    yield World(database, directory, live, registry, nodes, passwords, logins, protocols, people[0], people[1])
    passwords.close()
