"""Reads and writes the settings of protocols; the secrets among them rest sealed, apart from the others."""

from __future__ import annotations

import json

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from controller.fleet.layers import FLEET, SECRET, Layer, Layers
from controller.fleet.tables import FleetKeyRow, ProtocolRow
from controller.fleet.vpnkeys import IPSEC_PSK, open_key, seal_key
from controller.secretbox import SecretBox
from controller.store.database import Transaction
from controller.store.types import now
from shared.resource import Protocol


async def read_layers(session: AsyncSession, secrets: SecretBox) -> Layers:
    """Raises SecretUnreadable."""
    found: dict[tuple[Protocol, str], Layer] = {}
    for row in await session.scalars(sa.select(ProtocolRow)):
        if row.protocol in set(Protocol):
            found[Protocol(row.protocol), row.node_id] = Layer(row.port or None, json.loads(row.settings))
    for key in await session.scalars(sa.select(FleetKeyRow).where(FleetKeyRow.name.startswith(IPSEC_PSK))):
        place = Protocol.L2TP, key.name.removeprefix(IPSEC_PSK).removeprefix("/")
        layer = found.get(place, Layer())
        found[place] = Layer(layer.port, {**layer.settings, "psk": open_key(secrets, key).decode()})
    return Layers(found)


async def write_layer(tx: Transaction, protocol: Protocol, node_id: str, layer: Layer) -> None:
    plain = {name: value for name, value in layer.settings.items() if name not in SECRET}
    await tx.session.merge(
        ProtocolRow(
            protocol=protocol, node_id=node_id, port=layer.port or 0, settings=json.dumps(plain), updated_at=now()
        )
    )
    if protocol is Protocol.L2TP:
        await _write_psk(tx, node_id, layer.settings.get("psk"))


async def forget_node(tx: Transaction, node_id: str) -> None:
    """Delete what was set for this node."""
    await tx.session.execute(sa.delete(ProtocolRow).where(ProtocolRow.node_id == node_id))
    await _write_psk(tx, node_id, None)


async def _write_psk(tx: Transaction, node_id: str, psk: str | None) -> None:
    name = IPSEC_PSK if node_id == FLEET else f"{IPSEC_PSK}/{node_id}"
    if psk is None:
        await tx.session.execute(sa.delete(FleetKeyRow).where(FleetKeyRow.name == name))
        return
    sealed = seal_key(tx.secrets, name, psk.encode())
    await tx.session.merge(FleetKeyRow(name=name, sealed_key=sealed, certificate=None, created_at=now()))
