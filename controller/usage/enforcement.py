"""Sees to it that limits hold: by the clock, by the bytes that were used, by the sessions that began."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa
import structlog

from controller.accounts import rows as accounts
from controller.errors import DomainError
from controller.events.service import EventKind, Events, emit
from controller.store.bulk import batched
from controller.store.database import Committed, Database, StoreUnavailable, Topic, Transaction
from controller.store.types import now as utc_now
from controller.usage.book import Book
from controller.usage.limits import Refresh
from controller.usage.periods import Period, next_reset
from controller.usage.records import Written
from controller.usage.sessions import Sessions
from controller.usage.tables import LimitsRow

WARNING = timedelta(days=3)  # before the expiry
_LONGEST = 3600.0  # seconds without a look at the clock of limits, and between two purges
_BATCH = 500
_RETRY = 1.0
_AGAIN = timedelta(minutes=1)  # after a limit that could not be enforced

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Kept:
    """How long history is kept."""

    sessions: timedelta = timedelta(days=90)  # since their end
    usage: timedelta = timedelta(days=400)
    events: timedelta = timedelta(days=30)


class Enforcement:
    """`refresh(tx, user_id)` brings the nodes to what the account may do now."""

    def __init__(
        self,
        database: Database,
        book: Book,
        sessions: Sessions,
        events: Events,
        refresh: Refresh,
        *,
        kept: Kept = Kept(),
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._database = database
        self._book = book
        self._sessions = sessions
        self._events = events
        self._refresh = refresh
        self._kept = kept
        self._clock = clock
        self._wake = asyncio.Event()
        self._metered: set[str] = set()  # users who used some of their quota
        self._began: set[str] = set()  # users with new sessions
        self._changed = False  # limits were, since the clock was set
        self._due = clock()  # when the next limit has its time
        database.listen(self._committed)

    def on_written(self, written: Written) -> None:
        self._metered.update(written.metered)
        self._began.update(session.user_id for session in written.began)
        if self._metered or self._began or self._sessions.untidy:
            self._wake.set()

    async def run(self) -> None:
        failing = False
        purge_at = self._clock()
        while True:
            try:
                await self.enforce()
                if self._clock() >= purge_at:
                    await self.purge()
                    purge_at = self._clock() + timedelta(seconds=_LONGEST)
                failing, wait = False, self._seconds()
            except StoreUnavailable:
                if not failing:
                    log.warning("usage.enforcement_failed")
                failing, wait = True, _RETRY
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()

    async def enforce(self) -> None:
        """Do everything that is due now."""
        self._wake.clear()
        await self._sessions.tidy()
        await self._kick_surplus()
        await self._check_quotas()
        if self._due <= self._clock():
            await self._check_times()

    async def purge(self) -> None:
        """Drop the history that is older than what is kept."""
        now = self._clock()
        await self._sessions.purge(now - self._kept.sessions, now - self._kept.usage)
        await self._events.purge(now - self._kept.events)

    async def _kick_surplus(self) -> None:
        """Of an account with too many sessions the newest end; each node knows only of its own."""
        began, self._began = self._began, set()
        try:
            for chunk in batched(sorted(began)):
                query = sa.select(LimitsRow.user_id, LimitsRow.max_sessions).where(
                    LimitsRow.user_id.in_(chunk), LimitsRow.max_sessions.is_not(None)
                )
                async with self._database.connect() as connection:
                    limited = (await connection.execute(query)).all()
                for row in limited:
                    live = [entry for entry in self._book.of_user(row.user_id) if not self._sessions.asked(entry)]
                    surplus = sorted(live, key=lambda entry: (entry.since, entry.id))[row.max_sessions :]
                    if surplus:
                        async with self._database.transaction() as tx:
                            await self._sessions.end(tx, surplus, "session limit")
        except BaseException:
            self._began |= began
            raise

    async def _check_quotas(self) -> None:
        metered, self._metered = self._metered, set()
        try:
            for chunk in batched(sorted(metered)):
                async with self._database.connect() as connection:
                    near = await connection.scalars(
                        sa.select(LimitsRow.user_id).where(
                            LimitsRow.user_id.in_(chunk),
                            LimitsRow.used_bytes >= LimitsRow.quota_bytes // 5 * 4,
                            _untold(EventKind.QUOTA_100),
                        )
                    )
                    found = near.all()
                for user_id in found:
                    await self._act(user_id, self._quota)
        except BaseException:
            self._metered |= metered
            raise

    async def _check_times(self) -> None:
        """Expiries, warnings and new periods; then the clock is set for the next one."""
        self._changed = False
        failed: set[str] = set()
        while True:
            now = self._clock()
            async with self._database.connect() as connection:
                due = (await connection.scalars(sa.select(LimitsRow.user_id).where(_is_due(now)).limit(_BATCH))).all()
            new = [user_id for user_id in due if user_id not in failed]
            for user_id in new:
                if not await self._act(user_id, self._time):
                    failed.add(user_id)
            if not new:
                break
        async with self._database.connect() as connection:
            ends = await connection.scalar(sa.select(sa.func.min(LimitsRow.period_ends_at)))
            expires = await connection.scalar(
                sa.select(sa.func.min(LimitsRow.expires_at)).where(_untold(EventKind.EXPIRED))
            )
            warns = await connection.scalar(
                sa.select(sa.func.min(LimitsRow.expires_at)).where(_untold(EventKind.EXPIRY_3D))
            )
        moments = [ends, expires, warns - WARNING if warns is not None else None]
        if failed:
            self._due = now + _AGAIN
        elif not self._changed:
            self._due = min([moment for moment in moments if moment is not None], default=now + timedelta(days=1))

    async def _act(self, user_id: str, act: Callable[[Transaction, LimitsRow], Awaitable[None]]) -> bool:
        """False where another room refused: one account must not hold up the others."""
        try:
            async with self._database.transaction() as tx:
                row = await tx.session.get(LimitsRow, user_id, with_for_update=True)
                if row is not None:
                    await act(tx, row)
        except StoreUnavailable:
            raise
        except DomainError as error:
            log.error("usage.not_enforced", user_id=user_id, reason=str(error))
            return False
        return True

    async def _quota(self, tx: Transaction, row: LimitsRow) -> None:
        quota = row.quota_bytes
        if quota is None:
            return
        data = {"quota_bytes": quota, "used_bytes": row.used_bytes}
        if 5 * row.used_bytes >= 4 * quota:
            await _tell(tx, row, EventKind.QUOTA_80, data)
        if row.used_bytes >= quota and await _tell(tx, row, EventKind.QUOTA_100, data):
            await self._refresh(tx, row.user_id)

    async def _time(self, tx: Transaction, row: LimitsRow) -> None:
        now = self._clock()
        if row.expires_at is not None:
            data = {"expires_at": row.expires_at.isoformat()}
            if row.expires_at <= now:
                row.told = _add(row.told, EventKind.EXPIRY_3D)  # too late for a warning
                if await _tell(tx, row, EventKind.EXPIRED, data):
                    await self._refresh(tx, row.user_id)
            elif row.expires_at <= now + WARNING:
                await _tell(tx, row, EventKind.EXPIRY_3D, data)
        if row.period_ends_at is not None and row.period_ends_at <= now:
            began = (await accounts.row(tx.session, row.user_id)).created_at
            used, row.used_bytes = row.used_bytes, 0
            row.period_ends_at = next_reset(Period(row.quota_period), began, now)
            row.told = " ".join(kind for kind in row.told.split() if not kind.startswith("quota."))
            await tx.session.flush()
            if row.quota_bytes is not None:
                await emit(tx, EventKind.LIMITS_RESET, row.user_id, {"used_bytes": used})
                await self._refresh(tx, row.user_id)

    def _seconds(self) -> float:
        return min(max((self._due - self._clock()).total_seconds(), 0.0), _LONGEST)

    def _committed(self, committed: Committed) -> None:
        if Topic.LIMITS in committed.topics:
            self._due, self._changed = self._clock(), True
            self._wake.set()
        elif self._sessions.untidy:
            self._wake.set()


def _untold(kind: EventKind) -> sa.ColumnElement[bool]:
    return LimitsRow.told.not_like(f"%{kind}%")


def _is_due(now: datetime) -> sa.ColumnElement[bool]:
    return sa.or_(
        LimitsRow.period_ends_at <= now,
        sa.and_(LimitsRow.expires_at <= now, _untold(EventKind.EXPIRED)),
        sa.and_(LimitsRow.expires_at <= now + WARNING, LimitsRow.expires_at > now, _untold(EventKind.EXPIRY_3D)),
    )


async def _tell(tx: Transaction, row: LimitsRow, kind: EventKind, data: Mapping[str, object]) -> bool:
    """Emit it once; False where that was done before."""
    if kind in row.told.split():
        return False
    row.told = _add(row.told, kind)
    await tx.session.flush()
    await emit(tx, kind, row.user_id, data)
    return True


def _add(told: str, kind: EventKind) -> str:
    return " ".join(sorted({*told.split(), kind}))
