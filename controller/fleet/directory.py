"""The servers that requests read: a snapshot in memory, renewed by the commits and reports that change it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import sqlalchemy as sa

from controller.accounts.principal import Plan
from controller.fleet.errors import ServerNotFound
from controller.fleet.metrics import FleetMetrics
from controller.fleet.nodes import NodeStatus
from controller.fleet.offer import known_protocols
from controller.fleet.tables import NodeRow
from controller.store.database import Database, Topic
from controller.store.snapshot import Snapshot
from shared.protocol import Load
from shared.resource import Protocol


class ServerStatus(StrEnum):
    ONLINE = "online"
    OFFLINE = "offline"
    MAINTENANCE = "maintenance"


@dataclass(frozen=True, slots=True)
class Server:
    """A node as clients see it."""

    id: str
    name: str
    country: str
    city: str
    host: str  # that clients dial
    status: ServerStatus
    load: int  # 0–100
    protocols: tuple[Protocol, ...]
    ssh_host_keys: tuple[str, ...]  # bare `type base64` of the tunnels' sshd
    ledger: str  # the identity of its usage records
    wireguard_public_key: bytes
    wireguard_port: int
    plan: Plan  # the lowest plan that may use it


@dataclass(frozen=True, slots=True)
class _Entry:
    server: Server
    status: NodeStatus


class Directory:
    """Reads are dictionary look-ups. `revision` grows with every change that a reader could notice."""

    def __init__(self, database: Database, metrics: FleetMetrics) -> None:
        self._database = database
        self._metrics = metrics
        self._entries: dict[str, _Entry] = {}
        self._offered: dict[Plan, dict[str, Server]] = {}
        self._online: set[str] = set()
        self._loads: dict[str, Load] = {}
        self._snapshot = Snapshot(database, Topic.NODES, self._read, event="fleet.directory_stale")
        self.revision = 0

    def servers(self, plan: Plan) -> tuple[Server, ...]:
        """What the plan may use, by name; nodes that are disabled or locked are not offered."""
        return tuple(self._offer(plan).values())

    def server(self, plan: Plan, server_id: str) -> Server:
        """Raises ServerNotFound, also for one that the plan does not include."""
        found = self._offer(plan).get(server_id)
        if found is None:
            raise ServerNotFound
        return found

    def known(self, server_id: str) -> Server:
        """Any enrolled node, offered or not: connections that exist go on. Raises ServerNotFound."""
        entry = self._entries.get(server_id)
        if entry is None:
            raise ServerNotFound
        return entry.server

    def name(self, node_id: str) -> str:
        """The node's name, or its id where it is not known (any more)."""
        entry = self._entries.get(node_id)
        return entry.server.name if entry is not None else node_id

    def set_online(self, node_id: str, online: bool) -> None:
        (self._online.add if online else self._online.discard)(node_id)
        if not online:
            self._loads.pop(node_id, None)
        self._renew(node_id)

    def set_load(self, node_id: str, load: Load) -> None:
        self._loads[node_id] = load
        self._renew(node_id)

    def loads(self) -> Mapping[str, Load]:
        """By node id."""
        return self._loads

    async def refresh(self) -> None:
        """Read all nodes; what is there stays where the database fails."""
        await self._snapshot.refresh()

    async def run(self) -> None:
        await self._snapshot.run()

    async def _read(self) -> None:
        async with self._database.read() as session:
            rows = (await session.scalars(sa.select(NodeRow).order_by(NodeRow.name))).all()
        self._entries = {row.id: self._entry(row) for row in rows if row.wireguard_public_key is not None}
        counts = Counter(row.status for row in rows if row.enrolled_at is not None)
        for status in NodeStatus:
            self._metrics.nodes.labels(status).set(counts[status])
        self._changed()

    def _entry(self, row: NodeRow) -> _Entry:
        status = NodeStatus(row.status)
        server = Server(
            id=row.id,
            name=row.name,
            country=row.country,
            city=row.city,
            host=row.endpoint or row.address or "",
            status=self._status(row.id, status),
            load=self._load(row.id),
            protocols=known_protocols(row.protocols.split()),
            ssh_host_keys=tuple(row.ssh_host_keys.splitlines()),
            ledger=row.ledger,
            wireguard_public_key=row.wireguard_public_key or b"",
            wireguard_port=row.wireguard_port,
            plan=Plan(row.plan),
        )
        return _Entry(server, status)

    def _status(self, node_id: str, status: NodeStatus) -> ServerStatus:
        if status == NodeStatus.MAINTENANCE:
            return ServerStatus.MAINTENANCE
        online = node_id in self._online and status == NodeStatus.ENABLED
        return ServerStatus.ONLINE if online else ServerStatus.OFFLINE

    def _load(self, node_id: str) -> int:
        load = self._loads.get(node_id)
        return round(load.total) if load is not None else 0

    def _renew(self, node_id: str) -> None:
        entry = self._entries.get(node_id)
        if entry is None:
            return
        status, load = self._status(node_id, entry.status), self._load(node_id)
        if (status, load) != (entry.server.status, entry.server.load):
            self._entries[node_id] = replace(entry, server=replace(entry.server, status=status, load=load))
            self._changed()

    def _changed(self) -> None:
        self._offered.clear()
        self.revision += 1

    def _offer(self, plan: Plan) -> dict[str, Server]:
        offered = self._offered.get(plan)
        if offered is None:
            offered = self._offered[plan] = {
                node_id: entry.server
                for node_id, entry in self._entries.items()
                if entry.status.admitted and plan.includes(entry.server.plan)
            }
        return offered
