"""The WireGuard peers of connections, as their nodes have to run them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from controller.access.standing import Standing
from controller.desired import service as desired
from controller.secretbox import SecretBox
from controller.store.bulk import batched
from controller.store.database import Transaction
from controller.tunnels.addresses import Pool
from controller.tunnels.tables import AllocationRow, ConnectionRow
from shared.desired import Kind, Peer
from shared.keys import encode_key
from shared.resource import Protocol


class Peers:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def addresses(self, slot: int | None) -> tuple[str, ...]:
        """What the client has inside the tunnel; none once the connection has ended."""
        return self._pool.client_addresses(slot) if slot is not None else ()

    async def addresses_of(self, session: AsyncSession, connection_ids: Collection[str]) -> dict[str, tuple[str, ...]]:
        """By connection; those that have ended are not in it."""
        found: dict[str, tuple[str, ...]] = {}
        for chunk in batched(sorted(connection_ids)):
            rows = await session.scalars(sa.select(AllocationRow).where(AllocationRow.connection_id.in_(chunk)))
            found |= {row.connection_id: self.addresses(row.slot) for row in rows if row.connection_id is not None}
        return found

    async def put(self, tx: Transaction, row: ConnectionRow, slot: int, standing: Standing) -> int:
        """Let the node have the peer; return its scope's revision."""
        return await desired.put(tx, desired.node_scope(row.node_id), [self._peer(tx, row, slot, standing)])

    async def refresh(self, tx: Transaction, user_id: str, standing: Standing) -> None:
        """Bring the account's peers to what it may do now. Where it may not, they go, and keep their addresses."""
        rows = await tx.session.execute(
            sa.select(ConnectionRow, AllocationRow.slot)
            .join(AllocationRow, AllocationRow.connection_id == ConnectionRow.id)
            .where(
                ConnectionRow.user_id == user_id,
                ConnectionRow.ended_at.is_(None),
                ConnectionRow.protocol == Protocol.WIREGUARD,
            )
            .order_by(ConnectionRow.id)
            .with_for_update(of=ConnectionRow)
        )
        nodes: defaultdict[str, list[tuple[ConnectionRow, int]]] = defaultdict(list)
        for row, slot in rows:
            nodes[row.node_id].append((row, slot))
        for node_id, found in sorted(nodes.items()):  # one order for all writers: no deadlock on the scopes' rows
            scope = desired.node_scope(node_id)
            if standing.admits(Protocol.WIREGUARD):
                await desired.put(tx, scope, [self._peer(tx, row, slot, standing) for row, slot in found])
            else:
                keys = [encode_key(row.public_key) for row, _ in found]
                await desired.remove(tx, scope, Kind.WIREGUARD_PEER, keys)

    def _peer(self, tx: Transaction, row: ConnectionRow, slot: int, standing: Standing) -> Peer:
        return Peer(
            public_key=row.public_key,
            allowed_ips=self.addresses(slot),
            preshared_key=open_key(tx.secrets, row, "sealed_preshared_key"),
            not_after=standing.not_after,
            account=standing.number,
            limits=standing.limits,
        )


def seal_key(secrets: SecretBox, row: ConnectionRow, column: str, value: bytes) -> bytes:
    return secrets.seal(value, table=row.__tablename__, column=column, row=row.id)


def open_key(secrets: SecretBox, row: ConnectionRow, column: str) -> bytes | None:
    sealed: bytes | None = getattr(row, column)
    if sealed is None:
        return None
    return secrets.open(sealed, table=row.__tablename__, column=column, row=row.id)
