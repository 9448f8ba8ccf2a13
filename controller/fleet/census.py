"""How many nodes there are."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from controller.fleet.tables import NodeRow


async def enrolled(session: AsyncSession) -> int:
    """All that may let clients in, also without us: those that are locked, disabled or away too."""
    return (
        await session.scalar(sa.select(sa.func.count()).select_from(NodeRow).where(NodeRow.enrolled_at.is_not(None)))
        or 0
    )
