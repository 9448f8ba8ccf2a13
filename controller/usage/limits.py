"""What an account may use: read, change, and what the nodes are told of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncSession

from controller.accounts import rows as accounts
from controller.errors import InvalidInput
from controller.store.database import Topic, Transaction
from controller.store.types import now as utc_now
from controller.usage import leases
from controller.usage.periods import Period as Period
from controller.usage.periods import next_reset
from controller.usage.tables import LimitsRow
from shared import access
from shared.access import MAX_BYTES

_EARLIEST, _LATEST = datetime(1970, 1, 1, tzinfo=UTC), datetime(9998, 12, 31, tzinfo=UTC)  # with room for time zones
_BATCH = 500  # engines limit the parameters of a statement

log = structlog.get_logger()

Refresh = Callable[[Transaction, str], Awaitable[object]]
"""Tells the nodes what the account may do now: (tx, user id)."""


@dataclass(frozen=True, slots=True)
class AccountLimits:
    """None = no limit."""

    quota_bytes: int | None = None  # rx + tx of all protocols, per period
    quota_period: Period = Period.NONE
    used_bytes: int = 0  # in this period
    period_ends_at: datetime | None = None
    expires_at: datetime | None = None
    max_sessions: int | None = None  # over all nodes and protocols
    rate_up: int | None = None  # bits per second from the client
    rate_down: int | None = None

    @property
    def remaining(self) -> int | None:
        return None if self.quota_bytes is None else max(self.quota_bytes - self.used_bytes, 0)

    def blocked(self, now: datetime) -> str | None:
        """Why the account may not use anything now: "expired" or "quota"; None where it may."""
        if self.expires_at is not None and self.expires_at <= now:
            return "expired"
        return "quota" if self.remaining == 0 else None

    def wire(self, nodes: int, most: int = leases.MOST) -> access.Limits:
        """As each of so many nodes enforces them by itself."""
        opening = leases.opening(self.quota_bytes, self.used_bytes, nodes, most) if self.quota_bytes is not None else 0
        return access.Limits(
            max_sessions=self.max_sessions or 0,
            rate_up=self.rate_up or 0,
            rate_down=self.rate_down or 0,
            metered=self.quota_bytes is not None,
            opening=opening,
        )


NO_LIMITS = AccountLimits()


async def read(session: AsyncSession, user_id: str) -> AccountLimits:
    row = await session.get(LimitsRow, user_id)
    return _limits_from_row(row) if row is not None else NO_LIMITS


async def read_all(session: AsyncSession) -> dict[str, AccountLimits]:
    """By user; those without limits are not in it."""
    return {row.user_id: _limits_from_row(row) for row in await session.scalars(sa.select(LimitsRow))}


class Limits:
    """`refresh` is called in the same transaction when what the nodes have to know may have changed."""

    def __init__(self, refresh: Refresh, *, clock: Callable[[], datetime] = utc_now) -> None:
        self.refresh = refresh
        self._clock = clock

    async def change(self, tx: Transaction, user_id: str, **changes: Any) -> AccountLimits:
        """Set fields of AccountLimits; None takes a limit away. `used_bytes=0` gives the whole quota back.

        Raise InvalidInput that names every field which is wrong.
        """
        checked = check(changes)
        if not checked:
            return await read(tx.session, user_id)
        row = await tx.session.get(LimitsRow, user_id, with_for_update=True, populate_existing=True)
        if row is None:
            row = LimitsRow(user_id=user_id, quota_period=Period.NONE, used_bytes=0, told="")
            tx.session.add(row)
        if checked.get("quota_period", row.quota_period) != row.quota_period:
            began = (await accounts.row(tx.session, user_id)).created_at
            row.period_ends_at = next_reset(checked["quota_period"], began, self._clock())
        for name, value in checked.items():
            setattr(row, name, value)
        row.told = _still_told(row.told, checked)
        await tx.session.flush()
        await self.refresh(tx, user_id)
        tx.touch(Topic.LIMITS)
        log.info("usage.limits_changed", user_id=user_id, fields=sorted(checked))
        return _limits_from_row(row)


def check(changes: dict[str, Any]) -> dict[str, Any]:
    """The changes as the table takes them; raise InvalidInput."""
    checked: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for name, value in changes.items():
        try:
            checked[name] = _CHECKS[name](value) if value is not None or name not in _OPTIONAL else None
        except KeyError:
            problems[name] = "there is no such limit"
        except ValueError as error:
            problems[name] = str(error)
    if problems:
        raise InvalidInput(problems)
    return checked


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_BYTES:
        raise ValueError("expected a whole number from 1 to 2^63 - 1, or nothing for no limit")
    return value


def _nothing_used(value: object) -> int:
    if isinstance(value, bool) or value != 0:
        raise ValueError("can only be set to 0")
    return 0


def _moment(value: object) -> datetime:
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise ValueError("expected a time with its offset from UTC, or nothing for no end")
    if not _EARLIEST <= value <= _LATEST:
        raise ValueError(f"expected a time from {_EARLIEST.year} to {_LATEST.year}, or nothing for no end")
    return value


def _period(value: object) -> Period:
    try:
        return Period(value)  # type: ignore[arg-type]
    except ValueError:
        raise ValueError(f"expected one of {', '.join(Period)}") from None


_CHECKS: dict[str, Callable[[object], object]] = {
    "quota_bytes": _count,
    "quota_period": _period,
    "used_bytes": _nothing_used,
    "expires_at": _moment,
    "max_sessions": _count,
    "rate_up": _count,
    "rate_down": _count,
}
_OPTIONAL = frozenset(_CHECKS) - {"quota_period", "used_bytes"}


def _still_told(told: str, changes: dict[str, Any]) -> str:
    """Thresholds are told anew where what they are measured by has changed."""
    quota = changes.keys() & {"quota_bytes", "quota_period", "used_bytes"}
    return " ".join(
        kind for kind in told.split() if not (quota if kind.startswith("quota.") else "expires_at" in changes)
    )


def _limits_from_row(row: LimitsRow) -> AccountLimits:
    return AccountLimits(
        row.quota_bytes,
        Period(row.quota_period),
        row.used_bytes,
        row.period_ends_at,
        row.expires_at,
        row.max_sessions,
        row.rate_up,
        row.rate_down,
    )
