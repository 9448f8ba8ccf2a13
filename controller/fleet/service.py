"""What an administrator does with nodes: join tokens, status, and the confirmation of a refused snapshot."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncSession

from controller.accounts.principal import Plan
from controller.desired import service as desired
from controller.fleet import servers, standing
from controller.fleet.errors import NodeInService, NodeNotFound, NothingToConfirm
from controller.fleet.layers import FLEET, merged
from controller.fleet.layerstore import forget_node, read_layers, write_layer
from controller.fleet.nodes import INTERFACE, NodeSpec, NodeStatus
from controller.fleet.offer import known_protocols
from controller.fleet.settings import FleetSettings
from controller.fleet.standing import Standing, servers_from
from controller.fleet.tables import EVERYTHING, AppliedRow, JoinTokenRow, NodeRow
from controller.store.database import Database, Topic, Transaction
from controller.store.types import new_id, now
from shared.desired import Kind, Protocol
from shared.jointoken import JoinToken

log = structlog.get_logger()

ForgetNode = Callable[[Transaction, str], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Node:
    """A node as an administrator sees it."""

    id: str
    name: str
    country: str
    city: str
    endpoint: str | None
    address: str | None
    plan: str
    status: NodeStatus
    enrolled_at: datetime | None
    last_seen_at: datetime | None
    certificate_expires_at: datetime | None
    agent: str | None
    problem: str | None  # in the node's words
    protocols: tuple[Protocol, ...]
    servers: Mapping[str, str]  # what ails which protocol, in the node's words


class Fleet:
    """`forget(tx, node_id)` of others: they end what is on a node that is deleted, and delete what they have of it."""

    def __init__(
        self, database: Database, ca_pin: bytes, settings: FleetSettings, forget: Sequence[ForgetNode] = ()
    ) -> None:
        self._database = database
        self._ca_pin = ca_pin
        self._settings = settings
        self._forget = forget

    async def issue_join_token(self, spec: NodeSpec, lifetime: timedelta | None = None) -> str:
        """Create the node, or change the one of that name to this, and return a token for its host."""
        spec.check()
        async with self._database.transaction() as tx:
            row = await tx.session.scalar(sa.select(NodeRow).where(NodeRow.name == spec.name))
            if row is None:
                row = await self._create(tx, spec)
            row.country, row.city = spec.country, spec.city
            row.endpoint, row.plan = spec.endpoint or row.endpoint, spec.plan or row.plan
            if spec.protocols is not None:
                row.allowed = " ".join(spec.protocols)
            await self._set_interface(tx, row, spec)
            tx.touch(Topic.NODES)
            return await self._issue(tx, row, lifetime)

    async def reissue_join_token(self, name: str, lifetime: timedelta | None = None) -> str:
        """A token for a node that is there already; what was handed out for it before is void."""
        async with self._database.transaction() as tx:
            return await self._issue(tx, await _by_name(tx.session, name), lifetime)

    async def nodes(self) -> list[Node]:
        async with self._database.read() as session:
            rows = (await session.scalars(sa.select(NodeRow).order_by(NodeRow.name))).all()
            told = (
                await session.execute(
                    sa.select(AppliedRow.node_id, AppliedRow.problem, AppliedRow.servers).order_by(AppliedRow.scope)
                )
            ).all()
        problems = {words.node_id: words.problem for words in told if words.problem is not None}
        ailing: dict[str, dict[str, str]] = {}
        for words in told:
            ailing.setdefault(words.node_id, {}).update(servers_from(words.servers))
        return [_node(row, problems.get(row.id), ailing.get(row.id, {})) for row in rows]

    async def node(self, name: str) -> tuple[Node, Mapping[Protocol, Standing]]:
        """The node, and how far it is with its servers while it is in service. Raises NodeNotFound."""
        found = next((node for node in await self.nodes() if node.name == name), None)
        if found is None:
            raise NodeNotFound(name=name)
        async with self._database.read() as session:
            standings = await standing.read(session, found.id)
        return found, {protocol: one for protocol, of_this in standings.items() for one in of_this}

    async def set_status(self, name: str, status: NodeStatus) -> None:
        """A node that is no longer admitted is cut off at once by every controller; its tunnels stay."""
        async with self._database.transaction() as tx:
            row = await _by_name(tx.session, name)
            if row.status == status:
                return
            before, row.status = row.status, status
            tx.touch(Topic.NODES)
        log.info("fleet.node_status", node=name, before=before, after=status)

    async def delete(self, name: str) -> None:
        """Delete a node that is out of service, with all that is on it; raise NodeNotFound, NodeInService.

        Its host is not reached any more: whatever still runs there goes on until somebody stops it.
        """
        async with self._database.transaction() as tx:
            row = await _by_name(tx.session, name)
            if row.enrolled_at is not None and NodeStatus(row.status).admitted:
                raise NodeInService(name=name, status=row.status)
            for forget in (*self._forget, forget_node):
                await forget(tx, row.id)
            await desired.forget(tx, desired.node_scope(row.id))
            await tx.session.delete(row)
            tx.touch(Topic.NODES)
        log.info("fleet.node_deleted", node=name, node_id=row.id)

    async def confirm_snapshot(self, name: str) -> None:
        """Allow the removal that the node refused; the session that holds it sends the snapshot again, confirmed."""
        async with self._database.transaction() as tx:
            row = await _by_name(tx.session, name)
            confirmed = await tx.session.execute(
                sa.update(AppliedRow)
                .where(AppliedRow.node_id == row.id, AppliedRow.refused_revision.is_not(None))
                .values(confirmed_at=now())
            )
            if confirmed.rowcount == 0:  # type: ignore[attr-defined]
                raise NothingToConfirm(name=name)
            tx.touch(Topic.NODES)
        log.warning("fleet.snapshot_confirmed", node=name)

    async def _create(self, tx: Transaction, spec: NodeSpec) -> NodeRow:
        layers = await read_layers(tx.session, tx.secrets)
        row = NodeRow(
            id=new_id(),
            name=spec.name,
            country=spec.country,
            city=spec.city,
            plan=spec.plan or Plan.FREE,
            status=NodeStatus.ENABLED,
            created_at=now(),
            interface=INTERFACE,
            wireguard_port=layers.port(Protocol.WIREGUARD, FLEET, self._settings),
            protocols=Protocol.WIREGUARD,  # until it says what it offers
            allowed=EVERYTHING,
            former_boot_ids="",
        )
        tx.session.add(row)
        log.info("fleet.node_created", node=spec.name, node_id=row.id)
        return row

    async def _set_interface(self, tx: Transaction, row: NodeRow, spec: NodeSpec) -> None:
        scope, former = desired.node_scope(row.id), row.interface
        row.interface, row.wireguard_port = spec.interface or former, spec.port or row.wireguard_port
        layers = await read_layers(tx.session, tx.secrets)
        if spec.port is not None:  # its own from now on, whatever the fleet's becomes
            own = layers.own(Protocol.WIREGUARD, row.id)
            await write_layer(tx, Protocol.WIREGUARD, row.id, merged(own, spec.port, {}))
        if Protocol.WIREGUARD not in row.protocols.split():
            return
        if row.interface != former:
            await desired.remove(tx, scope, Kind.WIREGUARD_INTERFACE, [former])
        wanted = servers.interface(self._settings, layers, row.id, row.interface, row.wireguard_port)
        await desired.put(tx, scope, [wanted])

    async def _issue(self, tx: Transaction, row: NodeRow, lifetime: timedelta | None) -> str:
        await tx.session.execute(sa.delete(JoinTokenRow).where(JoinTokenRow.node_id == row.id))
        secret = os.urandom(32)
        issued = JoinTokenRow(
            id=new_id(),
            node_id=row.id,
            secret_hash=hashlib.sha256(secret).digest(),
            created_at=now(),
            expires_at=now() + (lifetime or self._settings.join_token_lifetime),
        )
        tx.session.add(issued)
        return JoinToken(
            address=self._settings.channel_address, id=issued.id, secret=secret, ca_pin=self._ca_pin
        ).encode()


async def _by_name(session: AsyncSession, name: str) -> NodeRow:
    row = await session.scalar(sa.select(NodeRow).where(NodeRow.name == name))
    if row is None:
        raise NodeNotFound(name=name)
    return row


def _node(row: NodeRow, problem: str | None, servers: Mapping[str, str]) -> Node:
    return Node(
        id=row.id,
        name=row.name,
        country=row.country,
        city=row.city,
        endpoint=row.endpoint,
        address=row.address,
        plan=row.plan,
        status=NodeStatus(row.status),
        enrolled_at=row.enrolled_at,
        last_seen_at=row.last_seen_at,
        certificate_expires_at=row.certificate_expires_at,
        agent=row.agent,
        problem=problem,
        protocols=known_protocols(row.protocols.split()),
        servers=servers,
    )
