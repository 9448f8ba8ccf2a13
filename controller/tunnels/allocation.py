"""Takes and returns the slots of a node's address pool, inside the transaction of whoever needs them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from controller.tunnels.addresses import Pool
from controller.tunnels.errors import AddressesExhausted
from controller.tunnels.tables import AllocationRow


async def allocate(
    session: AsyncSession, pool: Pool, node_id: str, connection_id: str, now: datetime, cool_down: timedelta
) -> int:
    """The next slot that was never used, else the one released longest ago; raise AddressesExhausted.

    Two writers may choose the same new slot: the primary key refuses the second with IntegrityError, to try again.
    """
    newest = await session.scalar(sa.select(sa.func.max(AllocationRow.slot)).where(AllocationRow.node_id == node_id))
    slot = 0 if newest is None else newest + 1
    if slot < pool.capacity:
        session.add(AllocationRow(node_id=node_id, slot=slot, connection_id=connection_id, released_at=None))
        await session.flush()
        return slot
    row = await session.scalar(
        sa.select(AllocationRow)
        .where(
            AllocationRow.node_id == node_id,
            AllocationRow.released_at <= now - cool_down,
            AllocationRow.slot < pool.capacity,  # the pool may have been larger
        )
        .order_by(AllocationRow.released_at)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    if row is None:
        raise AddressesExhausted(retry_after=int(cool_down.total_seconds()))
    row.connection_id, row.released_at = connection_id, None
    await session.flush()
    return row.slot


async def pass_on(session: AsyncSession, connection_id: str, successor_id: str) -> int:
    """Give a connection's slot to the one that replaces it: same peer, same addresses."""
    return (
        await session.scalars(
            sa.update(AllocationRow)
            .where(AllocationRow.connection_id == connection_id)
            .values(connection_id=successor_id)
            .returning(AllocationRow.slot)
        )
    ).one()


async def release(session: AsyncSession, connection_ids: Sequence[str], now: datetime) -> None:
    await session.execute(
        sa.update(AllocationRow)
        .where(AllocationRow.connection_id.in_(connection_ids))
        .values(connection_id=None, released_at=now)
    )
