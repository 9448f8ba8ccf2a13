"""When a quota begins anew: at 00:00 UTC, counted from the day on which the account began."""

from __future__ import annotations

from calendar import monthrange
from datetime import UTC, datetime, timedelta
from enum import StrEnum


class Period(StrEnum):
    NONE = "none"
    DAILY = "daily"
    WEEKLY = "weekly"
    MONTHLY = "monthly"  # on the day of the month on which the account began, or the month's last


def next_reset(period: Period, began: datetime, now: datetime) -> datetime | None:
    """The first boundary after `now`; None where the quota is for ever."""
    first, today = _midnight(began), _midnight(now)
    match period:
        case Period.NONE:
            return None
        case Period.DAILY:
            return today + timedelta(days=1)
        case Period.WEEKLY:
            return today + timedelta(days=7 - (today - first).days % 7)
        case Period.MONTHLY:
            boundary = _on_day(today.year, today.month, first.day)
            return (
                boundary if boundary > now else _on_day(today.year + today.month // 12, today.month % 12 + 1, first.day)
            )


def latest_reset(period: Period, began: datetime, now: datetime) -> datetime:
    """The last boundary that is not after `now`; the beginning where the quota is for ever."""
    first, today = _midnight(began), _midnight(now)
    match period:
        case Period.NONE:
            return first
        case Period.DAILY:
            return today
        case Period.WEEKLY:
            return today - timedelta(days=(today - first).days % 7)
        case Period.MONTHLY:
            boundary = _on_day(today.year, today.month, first.day)
            last_month = today.replace(day=1) - timedelta(days=1)
            return boundary if boundary <= now else _on_day(last_month.year, last_month.month, first.day)


def _midnight(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def _on_day(year: int, month: int, day: int) -> datetime:
    return datetime(year, month, min(day, monthrange(year, month)[1]), tzinfo=UTC)
