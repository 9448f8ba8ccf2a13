"""The whole API on a real HTTP server with a real database; two nodes that are online, and people with accounts."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import aiohttp
import orjson
from aiohttp import web
from prometheus_client import CollectorRegistry

from controller.access.logins import Logins
from controller.access.members import Members
from controller.access.service import Access
from controller.accounts.administration import Administration
from controller.accounts.newpassword import PasswordChanges
from controller.accounts.passwords import Passwords
from controller.accounts.principal import Plan, Role
from controller.accounts.service import Accounts, hold_account
from controller.config import Passwords as PasswordSettings
from controller.config import RateLimit
from controller.contracts import irssh, kit, skynet
from controller.contracts.kit import AccessLog, Contract, HttpSettings
from controller.contracts.kit.listener import Handle
from controller.desired import service as desired
from controller.fleet.directory import Directory
from controller.fleet.metrics import FleetMetrics
from controller.fleet.nodes import NodeStatus
from controller.fleet.protocols import Protocols
from controller.fleet.settings import FleetSettings
from controller.fleet.tables import NodeRow
from controller.fleet.vpnkeys import load_keys
from controller.store.database import Database, Transaction
from controller.store.types import new_id, now
from controller.tunnels.addresses import Pool
from controller.tunnels.ending import end_account, end_by_ids
from controller.tunnels.live import LiveStates
from controller.tunnels.metrics import Metrics
from controller.tunnels.peers import Peers
from controller.tunnels.service import Tunnels, TunnelSettings
from controller.usage.limits import Limits
from controller.usage.sessions import Sessions
from shared import desired as resources
from shared.access import Credential
from shared.keys import PrivateKey, decode_key
from shared.protocol import PeerStats, Report, SessionStats

PASSWORD = "correct horse battery"
HOST_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPl2u3b3cJ7sU2y7m0uK4m8Qm2dG9v0o3w5sX1pQwZkE"
UNLIMITED = RateLimit(requests=0, auth_requests=0)
SETTINGS = HttpSettings(rate_limits=dict.fromkeys(("skynet", "irssh", "tiny"), UNLIMITED), body_seconds=1.0)


@dataclass
class World:
    """The controller's services as they are composed, without the channel to real nodes."""

    database: Database
    accounts: Accounts
    administration: Administration
    access: Access
    directory: Directory
    protocols: Protocols
    live: LiveStates
    tunnels: Tunnels
    members: Members
    sessions: Sessions
    nodes: dict[str, str] = field(default_factory=dict)  # name -> id
    applies: bool = True  # whether a node acknowledges what it is sent
    reports: int = 0

    @property
    def skynet(self) -> Contract:
        return skynet.contract(self.accounts, self.directory, self.tunnels)

    @property
    def irssh(self) -> Contract:
        return irssh.contract(self.accounts, self.members, self.protocols, self.sessions, self.directory)

    async def add_node(
        self,
        name: str,
        plan: Plan = Plan.FREE,
        status: NodeStatus = NodeStatus.ENABLED,
        protocols: str = "wireguard",
    ) -> str:
        row = NodeRow(
            id=new_id(),
            name=name,
            country="DE",
            city="Frankfurt",
            endpoint="198.51.100.10",
            plan=plan,
            status=status,
            created_at=now(),
            enrolled_at=now(),
            wireguard_public_key=PrivateKey.generate().public().raw,
            wireguard_port=51820,
            former_boot_ids="",
            protocols=protocols,
            ssh_host_keys=HOST_KEY,
        )
        async with self.database.transaction() as tx:
            tx.session.add(row)
        await self.directory.refresh()
        self.nodes[name] = row.id
        self.directory.set_online(row.id, True)
        return row.id

    def handshake(self, node: str, public_key: str, rx: int = 0, tx: int = 0) -> None:
        """The node reports that the peer has just spoken."""
        self.reports += 1
        stats = PeerStats(decode_key(public_key), rx, tx, int(now().timestamp()))
        self.live.record(self.nodes[node], Report(sequence=self.reports, boot_id="b", generation="g", peers=[stats]))

    async def session(self, connection_id: str, *, rx: int = 0, tx: int = 0, ended: bool = False) -> None:
        """The connection's node reports the session of its login."""
        scope = desired.node_scope(self.nodes["all-1"])
        async with self.database.connect() as connection:
            state = await desired.state(connection, self.database.secrets, scope)
        [login] = [
            login
            for login in (resources.decode(item.kind, item.key, item.payload) for item in state.resources)
            if isinstance(login, Credential) and login.connection == connection_id
        ]
        self.reports += 1
        at = int(now().timestamp())
        told = SessionStats(
            f"s-{connection_id}",
            login.protocol,
            login.account,
            login.username,
            connection_id,
            "198.51.100.7:4711",
            "10.67.0.2",
            at - 5,
            rx,
            tx,
            at if ended else 0,
        )
        self.live.record(
            self.nodes["all-1"], Report(sequence=self.reports, boot_id="b", generation="g", sessions=[told])
        )
        await self.live.flush()


@asynccontextmanager
async def build_world(database: Database) -> AsyncIterator[World]:
    passwords = Passwords(PasswordSettings(memory_kib=64, time_cost=1, parallelism=1, workers=1, queue=8))
    directory = Directory(database, FleetMetrics(CollectorRegistry()))
    live = LiveStates(database, Metrics(CollectorRegistry()), max_bytes_per_second=1_000_000_000)

    async def wait_applied(_node: str, _scope: str, _revision: int, _timeout: float) -> bool:
        return made.applies

    keys = await load_keys(database)
    pool = Pool.parse("10.66.0.0/24", "fd66::/112")
    protocols = Protocols(
        database, FleetSettings("controller.example.com:8443", pool.ipv4, pool.ipv6, dns=("9.9.9.9",)), keys
    )
    await protocols.refresh()
    tunnels = Tunnels(
        database,
        directory,
        live,
        Logins(passwords, keys),
        TunnelSettings(pool=pool, dns=("9.9.9.9", "2620:fe::9")),
        max_connections=lambda plan: {Plan.FREE: 1, Plan.PRO: 3, Plan.ENTERPRISE: 100}[plan],
        hold_account=hold_account,
        server_of=protocols.server_of,
        mtu_of=protocols.mtu_of,
        wait_applied=wait_applied,
    )
    access = Access(passwords, Peers(pool).refresh)
    changes = PasswordChanges(passwords, [access])
    accounts = Accounts(database, passwords, session_life=timedelta(hours=24), changes=changes)
    administration = Administration(database, changes, [end_account, access.end_account])
    sessions = Sessions(database, live.book, end_by_ids)
    live.on_written(sessions.on_written)

    async def refresh(tx: Transaction, user_id: str) -> None:
        await access.refresh(tx, user_id)

    members = Members(database, accounts, administration, access, Limits(refresh))
    made = World(database, accounts, administration, access, directory, protocols, live, tunnels, members, sessions)
    await made.add_node("fra-1")
    await made.add_node("nyc-1", plan=Plan.ENTERPRISE)
    for name, plan in (("alice", Plan.PRO), ("bob", Plan.FREE)):
        await accounts.create_user(name, f"{name}@example.com", PASSWORD, Role.USER, plan)
    yield made
    passwords.close()


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Any
    body: Any
    raw: bytes


@dataclass(frozen=True)
class Api:
    """A client of the running API, perhaps with a token, perhaps at a contract's prefix."""

    session: aiohttp.ClientSession
    url: str
    registry: CollectorRegistry
    lines: io.BytesIO  # of the access log, as far as they are written
    prefix: str = ""
    token: str | None = None

    async def call(self, method: str, path: str, json: Any = None, **options: Any) -> Answer:
        headers = dict(options.pop("headers", {}))
        if self.token is not None:
            headers.setdefault("Authorization", f"Bearer {self.token}")
        if json is not None:
            options["json"] = json
        async with self.session.request(method, self.url + self.prefix + path, headers=headers, **options) as response:
            raw = await response.read()
            body = await response.json() if response.content_type == "application/json" and raw else None
            return Answer(response.status, response.headers, body, raw)

    async def get(self, path: str, **options: Any) -> Answer:
        return await self.call("GET", path, **options)

    async def post(self, path: str, json: Any = None, **options: Any) -> Answer:
        return await self.call("POST", path, json, **options)

    def at(self, prefix: str) -> Api:
        return replace(self, prefix=prefix)

    def holding(self, token: str | None) -> Api:
        return replace(self, token=token)

    def access_log(self) -> list[dict[str, Any]]:
        """The lines that are written by now; those of a failure are at once."""
        return [orjson.loads(line) for line in self.lines.getvalue().splitlines()]

    async def login(self, name: str, password: str = PASSWORD) -> Api:
        answer = await self.post("/api/auth/login", {"username": name, "password": password})
        assert answer.status == 200, answer
        return self.holding(answer.body["token"])


@asynccontextmanager
async def serve(
    world: World,
    *contracts: Contract,
    settings: HttpSettings = SETTINGS,
    operations: Mapping[str, Handle] = MappingProxyType({}),
) -> AsyncIterator[Api]:
    registry, lines = CollectorRegistry(), io.BytesIO()
    served = kit.Api(contracts or [world.skynet], world.accounts, settings, registry, AccessLog(lines), operations)
    runner = web.ServerRunner(served.listener(access_log=None), shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    async with aiohttp.ClientSession() as session:
        yield Api(session, f"http://{host}:{port}", registry, lines)
    await runner.cleanup()
