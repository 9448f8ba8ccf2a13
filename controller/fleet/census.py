"""How many nodes there are, and whose word on usage theirs is."""

from __future__ import annotations

from collections.abc import Collection

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from controller.fleet.tables import NodeRow
from controller.store.bulk import batched


async def enrolled(session: AsyncSession) -> int:
    """All that may let clients in, also without us: those that are locked, disabled or away too."""
    return (
        await session.scalar(sa.select(sa.func.count()).select_from(NodeRow).where(NodeRow.enrolled_at.is_not(None)))
        or 0
    )


async def existing(connection: AsyncConnection, node_ids: Collection[str]) -> set[str]:
    """Those of the nodes that were not deleted."""
    return set(await ledgers(connection, node_ids))


async def ledgers(connection: AsyncConnection, node_ids: Collection[str]) -> dict[str, str]:
    """The identity of each node's usage records, as its last Hello told; "" where it has none."""
    found: dict[str, str] = {}
    for chunk in batched(sorted(node_ids)):
        rows = await connection.execute(sa.select(NodeRow.id, NodeRow.ledger).where(NodeRow.id.in_(chunk)))
        found |= {row.id: row.ledger for row in rows}
    return found
