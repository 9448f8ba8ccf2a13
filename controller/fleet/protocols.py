"""The servers of all nodes: what each protocol is set to, what each node offers, and how far it has come with both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
import structlog
from cryptography.hazmat.primitives.serialization import Encoding
from sqlalchemy.ext.asyncio import AsyncSession

from controller.desired import service as desired
from controller.errors import InvalidInput
from controller.fleet import servers, standing
from controller.fleet.errors import ServerNotFound, UnknownProtocol
from controller.fleet.identities import Admitted
from controller.fleet.layers import FLEET, Layer, Layers, WireGuardSettings, merged, read_changes, shown
from controller.fleet.layerstore import read_layers, write_layer
from controller.fleet.nodes import INTERFACE
from controller.fleet.offer import Offer, known_protocols
from controller.fleet.settings import FleetSettings
from controller.fleet.standing import Standing
from controller.fleet.tables import AppliedRow, NodeRow
from controller.fleet.vetting import PORT, SETTINGS, Place, conflict, faults
from controller.fleet.vpnkeys import VpnKeys, new_psk
from controller.store.database import Database, Topic, Transaction
from controller.store.snapshot import Snapshot
from shared.desired import Payload
from shared.protocol import OPENVPN_SERVER, Certificate
from shared.resource import InvalidResource, Protocol
from shared.services import Server

log = structlog.get_logger()


class ProtocolStatus(StrEnum):
    RUNNING = "running"  # on every node that offers it
    APPLYING = "applying"  # a node has not acknowledged it yet
    ERROR = "error"  # a node cannot run it
    STOPPED = "stopped"  # no node offers it


@dataclass(frozen=True, slots=True)
class ProtocolState:
    name: Protocol
    status: ProtocolStatus
    port: int
    settings: dict[str, Any]  # without secrets
    problem: str | None  # in the words of the nodes


class Protocols:
    """`server_of` and `mtu_of` answer from memory, which every commit that changes it renews."""

    def __init__(self, database: Database, settings: FleetSettings, keys: VpnKeys) -> None:
        self._database = database
        self._fleet = settings
        self._keys = keys
        self._layers = Layers({})
        self._snapshot = Snapshot(database, Topic.NODES, self._read, event="fleet.protocols_stale")

    def server_of(self, node_id: str, protocol: Protocol) -> Server:
        """What the node runs for a protocol beside WireGuard; also what a client config is made from."""
        return servers.server(self._fleet, self._layers, self._keys, protocol, node_id)

    def mtu_of(self, node_id: str) -> int:
        """Of the node's WireGuard interface; that of its clients has to be the same."""
        settings = self._layers.settings(Protocol.WIREGUARD, node_id, self._fleet)
        assert isinstance(settings, WireGuardSettings)
        return settings.mtu

    async def configure(
        self,
        name: str,
        *,
        port: int | None = None,
        settings: Mapping[str, object] | None = None,
        server_id: str | None = None,
    ) -> ProtocolState:
        """Change the port and these settings, of the fleet or of one node; a setting of None is as if it were not set.

        Raises UnknownProtocol, ServerNotFound, and InvalidInput with every field that is wrong; then nothing changes.
        """
        protocol, target = _protocol(name), server_id or FLEET
        values, problems = read_changes(protocol, settings or {})
        if target == FLEET and "psk" in values and values["psk"] is None:
            values["psk"] = new_psk()
        async with self._database.transaction() as tx:
            nodes = (await tx.session.scalars(sa.select(NodeRow))).all()
            if target != FLEET and target not in {node.id for node in nodes}:
                raise ServerNotFound
            before = await read_layers(tx.session, tx.secrets)
            layers = before.changed(protocol, target, merged(before.own(protocol, target), port, values))
            reached = [node for node in nodes if target in (FLEET, node.id)]
            if protocol is Protocol.WIREGUARD and port is not None:
                _move(layers, reached, port)
            affected = [node for node in reached if protocol in known_protocols(node.protocols.split())]
            problems = self._vet(before, layers, protocol, target, port, values, affected) | problems
            if problems:
                raise InvalidInput({_field(name): reason for name, reason in problems.items()})
            await write_layer(tx, protocol, target, layers.own(protocol, target))
            await self._put(tx, layers, ((node, [protocol]) for node in affected))
            tx.touch(Topic.NODES)
        self._layers = layers
        changed = [*(["port"] if port is not None else []), *sorted(values)]
        log.info("fleet.protocol_configured", protocol=protocol, node=server_id or "all", changed=changed)
        return next(state for state in await self.list(server_id) if state.name is protocol)

    async def offer(self, node: Admitted, offer: Offer) -> None:
        """Store what the node says that it offers, and give it the servers for it."""
        async with self._database.transaction() as tx:
            row = await tx.session.get_one(NodeRow, node.node_id)
            before = known_protocols(row.protocols.split())
            row.protocols = " ".join(offer.protocols)
            row.ssh_host_keys, row.ledger = "\n".join(offer.ssh_host_keys), offer.ledger
            if before != offer.protocols:
                await self._put(tx, await read_layers(tx.session, tx.secrets), [(row, offer.protocols)])
                given_up = set(before) - set(offer.protocols)
                scopes = [desired.protocol_scope(protocol) for protocol in given_up]
                of_these = (AppliedRow.node_id == row.id, AppliedRow.scope.in_(scopes))
                await tx.session.execute(sa.delete(AppliedRow).where(*of_these))  # its problems are none any more
                for protocol in given_up:
                    key = row.interface if protocol is Protocol.WIREGUARD else protocol
                    await desired.remove(tx, desired.node_scope(row.id), servers.KINDS[protocol], [key])
            tx.touch(Topic.NODES)
        if before != offer.protocols:
            log.info("fleet.node_offers", node=node.name, protocols=list(offer.protocols), before=list(before))

    def certificate(self, node: Admitted, request: bytes) -> Certificate:
        """For the node's OpenVPN servers. Raises CertificateRequestInvalid."""
        issued = self._keys.server_certificate(request, node.node_id)
        log.info("fleet.openvpn_certificate", node=node.name, expires_at=issued.not_valid_after_utc.isoformat())
        return Certificate(
            certificate=issued.public_bytes(Encoding.PEM), ca=self._keys.ca.encode(), purpose=OPENVPN_SERVER
        )

    async def apply_settings(self) -> None:
        """Bring every node's servers to the settings of today; where they are the same, nothing is sent."""
        async with self._database.transaction() as tx:
            layers = await read_layers(tx.session, tx.secrets)
            nodes = (await tx.session.scalars(sa.select(NodeRow))).all()
            await self._put(tx, layers, ((node, known_protocols(node.protocols.split())) for node in nodes))
        self._layers = layers

    async def refresh(self) -> None:
        """Read what is set; what is there stays where the database fails."""
        await self._snapshot.refresh()

    async def run(self) -> None:
        await self._snapshot.run()

    async def _read(self) -> None:
        async with self._database.read() as session:
            self._layers = await read_layers(session, self._database.secrets)

    async def list(self, server_id: str | None = None) -> Sequence[ProtocolState]:
        """All protocols, of the fleet or of one node. Raises ServerNotFound."""
        async with self._database.read() as session:
            layers = await read_layers(session, self._database.secrets)
            found = await standing.read(session, server_id)
            port = self._fleet.wireguard_port if server_id is None else await _wireguard_port(session, server_id)
        return [self._state(layers, protocol, server_id or FLEET, found[protocol], port) for protocol in Protocol]

    def _state(
        self, layers: Layers, protocol: Protocol, target: str, found: Sequence[Standing], wireguard_port: int
    ) -> ProtocolState:
        port = layers.port(protocol, target, self._fleet)
        if protocol is Protocol.WIREGUARD and target != FLEET:
            port = wireguard_port
        words = [f"{one.node}: {one.problem}" for one in found if one.problem]
        if words:
            status = ProtocolStatus.ERROR
        elif not all(one.applied for one in found):
            status = ProtocolStatus.APPLYING
        else:
            status = ProtocolStatus.RUNNING if found else ProtocolStatus.STOPPED
        settings = shown(layers.settings(protocol, target, self._fleet))
        return ProtocolState(protocol, status, port, settings, "; ".join(words) or None)

    def _payload(self, layers: Layers, protocol: Protocol, node: NodeRow) -> Payload:
        if protocol is Protocol.WIREGUARD:
            return servers.interface(self._fleet, layers, node.id, node.interface, node.wireguard_port)
        return servers.server(self._fleet, layers, self._keys, protocol, node.id)

    def _vet(
        self,
        before: Layers,
        after: Layers,
        protocol: Protocol,
        target: str,
        port: int | None,
        values: Mapping[str, Any],
        affected: Sequence[NodeRow],
    ) -> dict[str, str]:
        """What is wrong with the change of the target's layer, by field."""

        def check(layer: Layer) -> None:
            layers = before.changed(protocol, target, layer)
            if protocol is Protocol.WIREGUARD:
                number = layers.port(protocol, target, self._fleet)
                servers.interface(self._fleet, layers, target, INTERFACE, number).check()
            else:
                servers.server(self._fleet, layers, self._keys, protocol, target).check()

        if problems := faults(check, before.own(protocol, target), port, values):
            return problems
        for node in affected:  # its own settings may not go together with the fleet's
            try:
                self._payload(after, protocol, node).check()
            except InvalidResource as error:
                return {SETTINGS: f"{node.name}: {error}"}
        if port is None and "transports" not in values:
            return {}
        places = [
            Place(node.name, node.id, node.wireguard_port, known_protocols(node.protocols.split())) for node in affected
        ]
        if target == FLEET:
            places.insert(0, Place("", FLEET, after.port(Protocol.WIREGUARD, FLEET, self._fleet), tuple(Protocol)))
        taken = conflict(after, self._fleet, protocol, places)
        return {PORT if port is not None else "transports": taken} if taken is not None else {}

    async def _put(self, tx: Transaction, layers: Layers, wanted: Iterable[tuple[NodeRow, Sequence[Protocol]]]) -> None:
        for node, protocols in wanted:
            payloads = [self._payload(layers, protocol, node) for protocol in protocols]
            await desired.put(tx, desired.node_scope(node.id), payloads)


def _protocol(name: str) -> Protocol:
    try:
        return Protocol(name)
    except ValueError as error:
        raise UnknownProtocol(name=name) from error


def _field(name: str) -> str:
    return name if name in (PORT, SETTINGS) else f"{SETTINGS}.{name}"


def _move(layers: Layers, nodes: Sequence[NodeRow], port: int) -> None:
    """Let the nodes have the port; a node that was given one of its own keeps it."""
    for node in nodes:
        own = layers.own(Protocol.WIREGUARD, node.id).port
        node.wireguard_port = port if own is None else own


async def _wireguard_port(session: AsyncSession, node_id: str) -> int:
    port = await session.scalar(sa.select(NodeRow.wireguard_port).where(NodeRow.id == node_id))
    if port is None:
        raise ServerNotFound
    return port
