"""Reads the counters of peers in time, counts what metered accounts use, and has what changed reported."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping

import structlog
from msgspec.structs import replace

from agent.allowances import Allowances, Meters
from agent.counters import Counters
from agent.drivers.base import DriverError
from agent.ledger import Ledger
from agent.load import LoadReader
from agent.reconciler import Reconciler
from agent.reports import Reports
from agent.sessions import Session, advance
from agent.state import StateError
from shared.desired import Peer
from shared.protocol import Load, PeerStats

_YOUNG_SECONDS = 60  # so long a new peer is looked at often: somebody is waiting to be connected
_DUTY = 200  # reading takes at most one part in so many of the time, however many peers there are
_MOST_SECONDS = 30.0  # between two readings that cost much
_HURRIED_DUTY = 20  # the same while an allowance is about to be used up

Judge = Callable[[Collection[int]], Awaitable[None]]

log = structlog.get_logger()


class Reporter:
    def __init__(
        self,
        *,
        reconciler: Reconciler,
        reports: Reports,
        allowances: Allowances,
        ledger: Ledger,
        counters: Counters,
        load: LoadReader,
        poll_seconds: float = 5,
        fast_seconds: float = 1,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.reports = reports
        self.judge: Judge | None = None  # told which accounts have used more
        self._reconciler, self._allowances, self._ledger = reconciler, allowances, ledger
        self._counters, self._load, self._clock = counters, load, clock
        self._poll_seconds, self._fast_seconds = poll_seconds, min(fast_seconds, poll_seconds)
        self._young: dict[bytes, float] = {}  # peers without a handshake -> when they were seen first
        self._sessions: dict[bytes, Session] = {}
        self._earlier: Mapping[bytes, PeerStats] | None = None  # the reading that was counted last, while in doubt
        self._parted = asyncio.Event()  # last counters wait for the disk
        self._polled = self._cost = 0.0
        self._failing = False
        reconciler.on_farewell(self._part)

    @property
    def latest(self) -> Mapping[bytes, PeerStats]:
        return self.reports.latest

    def connected(self, accounts: Collection[int]) -> list[tuple[int, int]]:
        """The peers of these accounts that are connected now: account, and since when."""
        peers = self._reconciler.peers
        return [
            (peer.account, session.since)
            for key, session in self._sessions.items()
            if (peer := peers.get(key)) is not None and peer.account in accounts
        ]

    async def run(self) -> None:
        while True:
            if time.monotonic() >= self._polled + self._pause():
                await self.poll()
            elif self.reports.greeting_due:
                await self._report(self._read_load())
            try:
                async with asyncio.timeout(min(self._fast_seconds, self._pause())):
                    await self._parted.wait()
                self._parted.clear()
                await self._ledger.flush()
            except TimeoutError:
                continue

    async def poll(self) -> None:
        """Read all counters once, and report what changed."""
        first = not self._polled
        try:
            stats = await self._reconciler.stats()
        except DriverError as error:
            if not self._failing:
                log.warning("counters_unreadable", error=str(error))
            self._failing = True
            self._polled = time.monotonic()
            return
        self._failing = False
        self._polled = time.monotonic()
        self._cost = self._reconciler.stats_seconds
        earlier = self.latest if self._earlier is None else self._earlier
        if self._take(stats, first):
            # Counters fell: the interface was made anew, and then the report must say so, or a client came back with
            # the same key and waits. Read again at the next tick, when the re-check has told which.
            await self._reconciler.recheck()
            self._earlier = earlier
            self._polled -= self._poll_seconds
            return
        self._earlier = None
        generation, peers = self._reconciler.generation, self._reconciler.peers
        await self._count(self._allowances.read(stats, peers, generation, earlier=earlier))
        await self._report(self._read_load())

    def _pause(self) -> float:
        """Seconds between two readings: short while somebody is waited for, or an allowance will soon be used up."""
        awaited = bool(self._young) or self._reconciler.last_added > self._polled
        pause = self._fast_seconds if awaited else self._poll_seconds
        horizon = self._allowances.horizon()
        if horizon is not None and horizon < pause:
            return max(horizon, _HURRIED_DUTY * self._cost)
        return max(pause, min(_DUTY * self._cost, _MOST_SECONDS))

    async def _part(self, stats: list[PeerStats], peers: Mapping[bytes, Peer]) -> None:
        """Peers are about to be removed: these are their last counters."""
        changed = self._allowances.read(stats, peers, self._reconciler.generation, whole=False)
        changed.gone = self._allowances.forget(peers)
        changed.meters.clear()
        self._put(changed)
        self._parted.set()
        for key in peers:
            self._sessions.pop(key, None)
        try:
            await self.reports.farewell(stats)
        except StateError as error:
            log.warning("report_not_numbered", error=str(error))

    async def _count(self, changed: Meters) -> None:
        if changed.used or changed.meters or changed.gone:
            self._put(changed)
            await self._ledger.flush()
        if self.judge is not None and (changed.used or self._allowances.waiting):
            await self.judge({*changed.used, *self._allowances.waiting})

    def _put(self, changed: Meters) -> None:
        self._ledger.put(used=changed.used, meters=changed.meters, gone=changed.gone)

    def _take(self, stats: list[PeerStats], first: bool) -> bool:
        """Remember the reading; True where a peer's counters fell."""
        now, monotonic, fell = self._clock(), time.monotonic(), False
        latest: dict[bytes, PeerStats] = {}
        for peer in stats:
            before = self.latest.get(peer.public_key)
            known = before if before == peer else self._with_own_key(peer)
            latest[known.public_key] = known
            if before is None and not peer.handshake and not first:
                self._young.setdefault(peer.public_key, monotonic)
            fell = fell or (before is not None and (peer.rx < before.rx or peer.tx < before.tx))
            session = self._sessions.get(peer.public_key)
            if session is not None or peer.handshake:
                self._follow(peer, advance(session, peer, now))
        for key in self.latest.keys() - latest.keys():
            self.reports.forget(key)
            self._sessions.pop(key, None)
        self._young = {
            key: since
            for key, since in self._young.items()
            if monotonic - since < _YOUNG_SECONDS and (peer_ := latest.get(key)) is not None and not peer_.handshake
        }
        self.reports.latest = latest
        self._counters.sessions = len(self._sessions)
        return fell

    def _with_own_key(self, stats: PeerStats) -> PeerStats:
        """The same with the key that is held already: another copy of it would be as large as the counters."""
        peer = self._reconciler.peers.get(stats.public_key)
        return replace(stats, public_key=peer.public_key) if peer is not None else stats

    def _follow(self, peer: PeerStats, session: Session | None) -> None:
        if session is None:
            self._sessions.pop(peer.public_key, None)
        else:
            self._sessions[peer.public_key] = session

    def _read_load(self) -> Load | None:
        load = self._load.read(self._reconciler.interface or "", len(self.latest))
        if load is not None:
            self._counters.load = load.total
        return load

    async def _report(self, load: Load | None) -> None:
        self.reports.generation = self._reconciler.generation
        try:
            await self.reports.send(load)
        except StateError as error:
            log.warning("report_not_numbered", error=str(error))
