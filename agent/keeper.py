"""Follows the sessions of all servers: counts them, admits and ends them, and sees to it that no limit is exceeded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

import structlog

from agent.allowances import Allowances
from agent.counters import Counters
from agent.drivers.base import DriverError, LimitsDriver, LiveSession
from agent.ledger import Ledger
from agent.reconciler import Reconciler
from agent.reporter import Reporter
from agent.rights import Rights
from agent.services import Services
from agent.serving import Serving
from agent.sessionlog import SessionLog
from agent.state import StateError
from shared.resource import Protocol

_LIVE_SECONDS = 1.0  # between two looks at a server with sessions
_LIMIT_PAUSE = 0.05  # seconds between two changes of what the kernel enforces
_PATIENCE = 15.0  # seconds that an account may wait for a larger lease before its sessions end
_MOST_SECONDS = 10.0  # between two looks that cost much
_DUTY = 20  # looking takes at most one part in so many of the time, unless that took longer than `poll_seconds`

log = structlog.get_logger()


class Keeper:
    """A task per server, so that one that hangs blinds nobody else."""

    def __init__(
        self,
        *,
        services: Services,
        reconciler: Reconciler,
        reporter: Reporter,
        sessions: SessionLog,
        allowances: Allowances,
        ledger: Ledger,
        limits: LimitsDriver | None,
        counters: Counters,
        fresh: bool = False,
        poll_seconds: float = 5,
        live_seconds: float = _LIVE_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._services, self._reconciler, self._reporter = services, reconciler, reporter
        self._sessions, self._allowances, self._ledger = sessions, allowances, ledger
        self._limits, self._counters, self._clock = limits, counters, clock
        self._poll_seconds, self._live_seconds = poll_seconds, min(live_seconds, poll_seconds)
        self._unknown = {serving.protocol for serving in services}  # not looked at since the start
        self._fresh = set(self._unknown) if fresh else set()
        self._failing: set[Protocol] = set()
        self._verdicts: dict[str, str] = {}  # session -> why this node has ended it
        self._uids: dict[str, int] = {}  # session -> the uid that carries its traffic
        self._second: dict[str, str] = {}  # session -> its other address, of IPv6
        self._wakes = {protocol: asyncio.Event() for protocol in self._unknown}
        self._changed = asyncio.Event()  # limits may have to be set anew
        self._rights = Rights(reconciler, reporter, sessions, allowances)
        services.admit, services.noticed = self._rights.admit, self.look
        reporter.judge = self._judge

    def look(self) -> None:
        """Have every server looked at now."""
        for wake in self._wakes.values():
            wake.set()
        self._changed.set()

    async def run(self) -> None:
        served = [serving.protocol for serving in self._services]
        self._ledger.put(sessions=self._sessions.abandon(served, self._clock()))
        self._reporter.reports.sessions_known = not self._unknown
        async with asyncio.TaskGroup() as tasks:
            for serving in self._services:
                tasks.create_task(self._follow(serving))
            if self._limits is not None:
                tasks.create_task(self._limit(self._limits))

    async def close(self) -> None:
        if self._limits is not None:
            await self._limits.close()

    async def _follow(self, serving: Serving) -> None:
        wake = self._wakes[serving.protocol]
        while True:
            wake.clear()
            started = time.monotonic()
            await self.poll(serving)
            cost = time.monotonic() - started
            pause = self._live_seconds if self._sessions.live(serving.protocol) else self._poll_seconds
            pause = max(min(pause, self._allowances.horizon() or pause), min(_DUTY * cost, _MOST_SECONDS))
            try:
                async with asyncio.timeout(pause):
                    await wake.wait()
            except TimeoutError:
                continue

    async def poll(self, serving: Serving) -> None:
        """Look at one server once: count, end who must not live on, and report who came or went."""
        protocol = serving.protocol
        await self._end(serving)  # at once, by what is known: looking may take a while
        try:
            observed = await serving.sessions()
        except DriverError as error:
            if protocol not in self._failing:
                log.warning("sessions_unreadable", protocol=str(protocol), error=str(error))
            self._failing.add(protocol)
            return
        self._failing.discard(protocol)
        for number, session in enumerate(observed):
            if session.ended and session.id in self._verdicts:
                observed[number] = replace(session, reason=self._verdicts[session.id])
        taken = self._sessions.take(
            protocol,
            observed,
            lambda username: self._rights.credential(protocol, username),
            self._clock(),
            old=protocol in self._fresh,
        )
        self._fresh.discard(protocol)
        if taken.turned or len(self._uids) < len(observed):
            self._note(observed)
        self._counters.moved(protocol, taken.rx, taken.tx)
        self._counters.service_sessions[protocol] = len(self._sessions.live(protocol))
        self._ledger.put(used=self._allowances.add(taken.used), sessions=taken.entries)
        await self._ledger.flush()
        if taken.used or self._allowances.waiting:
            await self._judge({*taken.used, *self._allowances.waiting})
        await self._end(serving)
        if taken.turned or protocol in self._unknown:
            self._changed.set()
            self._unknown.discard(protocol)
            self._reporter.reports.sessions_known = not self._unknown
            await self._report()

    def _note(self, observed: Iterable[LiveSession]) -> None:
        """Keep what the log has no place for, of sessions that live."""
        self._uids |= {session.id: session.uid for session in observed if session.uid is not None}
        self._second |= {session.id: session.address6 for session in observed if session.address6}
        for kept in (self._uids, self._second, self._verdicts):
            for key in [key for key in kept if (stats := self._sessions.find(key)) is None or stats.ended]:
                del kept[key]

    async def _end(self, serving: Serving) -> None:
        """End the sessions that must not live on: ordered, or too many of an account."""
        for session_id, reason in self._rights.condemned(serving.protocol).items():
            if session_id not in self._verdicts:
                log.info("session_ended", session=session_id, protocol=str(serving.protocol), reason=reason)
            self._verdicts[session_id] = reason
            try:
                await serving.kick(session_id)
            except DriverError as error:
                log.error("session_not_ended", session=session_id, protocol=str(serving.protocol), error=str(error))
            self._wakes[serving.protocol].set()

    async def _judge(self, accounts: Collection[int] | None = None) -> None:
        waiting = set(self._allowances.waiting)
        if await self._reconciler.judge(accounts):
            self._changed.set()
            await self._report()
        elif not waiting.issuperset(self._allowances.waiting):
            await self._report()  # whoever waits for a larger lease gets it because of what this tells

    async def _report(self) -> None:
        try:
            await self._reporter.reports.send()
        except StateError as error:
            log.warning("report_not_numbered", error=str(error))

    async def _limit(self, driver: LimitsDriver) -> None:
        failing = False
        while True:
            self._changed.clear()
            try:
                await driver.apply(self._rights.allowed(self._uids, self._second))
                self._allowances.patience = _PATIENCE  # from now on the kernel lets nothing more pass
                if failing:
                    log.info("limits_recovered")
                failing = False
            except DriverError as error:
                if not failing:
                    log.error("limits_failed", error=str(error))
                failing, self._allowances.patience = True, 0.0
            try:
                async with asyncio.timeout(self._poll_seconds):
                    await self._changed.wait()
                await asyncio.sleep(_LIMIT_PAUSE)  # sessions come in crowds
            except TimeoutError:
                continue
