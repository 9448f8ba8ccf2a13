"""What an account may do at this moment, as its credentials and peers carry it to the nodes."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncSession

from controller.accounts.rows import User
from controller.fleet import census
from controller.store.types import now
from controller.usage import limits
from shared.access import Limits


@dataclass(frozen=True, slots=True)
class Standing:
    number: int
    blocked: str | None  # why no node may let it in: "inactive", "expired" or "quota"
    protocols: tuple[str, ...] | None  # that it may use; None = all
    limits: Limits
    not_after: int | None  # Unix seconds

    def admits(self, protocol: str) -> bool:
        return self.blocked is None and (self.protocols is None or protocol in self.protocols)


async def standing_of(session: AsyncSession, user: User) -> Standing:
    found = await limits.read(session, user.id)
    return Standing(
        number=user.number,
        blocked="inactive" if not user.active else found.blocked(now()),
        protocols=user.protocols,
        limits=found.wire(await census.enrolled(session)),
        not_after=int(found.expires_at.timestamp()) if found.expires_at is not None else None,
    )
