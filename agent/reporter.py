"""Reads the counters in time and reports what changed until the controller says that it has stored it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from agent.counters import Counters
from agent.drivers.base import DriverError
from agent.link import Outbox
from agent.load import LoadReader
from agent.reconciler import Reconciler
from agent.sessions import Session, advance
from agent.state import State, StateError
from shared.protocol import Load, PeerStats, Report

_CHUNK = 2000  # peers per report
_YOUNG_SECONDS = 60  # so long a new peer is looked at often: somebody is waiting to be connected
_ANSWER_SECONDS = 30
_DUTY = 200  # reading takes at most one part in so many of the time, however many peers there are

log = structlog.get_logger()


class Reporter:
    def __init__(
        self,
        *,
        reconciler: Reconciler,
        state: State,
        outbox: Outbox,
        counters: Counters,
        load: LoadReader,
        boot_id: str,
        poll_seconds: float = 5,
        fast_seconds: float = 1,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._reconciler, self._state, self._outbox, self._counters = reconciler, state, outbox, counters
        self._load, self._boot_id, self._clock = load, boot_id, clock
        self._poll_seconds, self._fast_seconds = poll_seconds, min(fast_seconds, poll_seconds)
        self.latest: dict[bytes, PeerStats] = {}
        self._reported: dict[bytes, PeerStats] = {}
        self._pending: dict[int, tuple[float, list[bytes]]] = {}  # sequence -> when it was sent, whose counters
        self._young: dict[bytes, float] = {}  # peers without a handshake -> when they were seen first
        self._sessions: dict[bytes, Session] = {}
        self._polled = self._cost = 0.0
        self._failing = False

    async def run(self) -> None:
        while True:
            awaited = bool(self._young) or self._reconciler.last_added > self._polled
            due = self._polled + max(self._fast_seconds if awaited else self._poll_seconds, _DUTY * self._cost)
            if time.monotonic() >= due:
                await self.poll()
            await asyncio.sleep(self._fast_seconds)

    async def poll(self) -> None:
        """Read all counters once, and report what changed."""
        first, started = not self._polled, time.monotonic()
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
        self._cost = self._polled - started
        if self._take(stats, first):
            # Counters fell: the interface was made anew, and then the report must say so, or a client came back with
            # the same key and waits. Read again at the next tick, when the re-check has told which.
            await self._reconciler.recheck()
            self._polled -= self._poll_seconds
            return
        try:
            await self._report()
        except StateError as error:
            log.warning("report_not_numbered", error=str(error))

    def received(self, sequence: int) -> None:
        """The controller has stored the reports up to this one."""
        self._pending = {number: sent for number, sent in self._pending.items() if number > sequence}

    def disconnected(self) -> None:
        """Whatever has no answer by now is sent again on the next link; counters are cumulative, twice is harmless."""
        for _, keys in self._pending.values():
            self._forget(keys)
        self._pending.clear()

    def _take(self, stats: list[PeerStats], first: bool) -> bool:
        """Remember the reading; True where a peer's counters fell."""
        now, monotonic, fell = self._clock(), time.monotonic(), False
        latest: dict[bytes, PeerStats] = {}
        for peer in stats:
            before = self.latest.get(peer.public_key)
            latest[peer.public_key] = before if before == peer else peer
            if before is None and not peer.handshake and not first:
                self._young.setdefault(peer.public_key, monotonic)
            fell = fell or (before is not None and (peer.rx < before.rx or peer.tx < before.tx))
            session = self._sessions.get(peer.public_key)
            if session is not None or peer.handshake:
                self._follow(peer, advance(session, peer, now))
        for key in self.latest.keys() - latest.keys():
            self._reported.pop(key, None)
            self._sessions.pop(key, None)
        self._young = {
            key: since
            for key, since in self._young.items()
            if monotonic - since < _YOUNG_SECONDS and (peer_ := latest.get(key)) is not None and not peer_.handshake
        }
        self.latest = latest
        self._counters.sessions = len(self._sessions)
        return fell

    def _follow(self, peer: PeerStats, session: Session | None) -> None:
        if session is None:
            self._sessions.pop(peer.public_key, None)
        else:
            self._sessions[peer.public_key] = session

    async def _report(self) -> None:
        load = self._load.read(self._reconciler.interface or "", len(self.latest))
        if load is not None:
            self._counters.load = load.total
        if not self._outbox.connected:
            return
        for sequence, (sent, keys) in list(self._pending.items()):
            if time.monotonic() - sent > _ANSWER_SECONDS:
                del self._pending[sequence]
                self._forget(keys)
        changed = [peer for key, peer in self.latest.items() if _news(peer, self._reported.get(key))]
        if changed or load is not None:
            await self._send(changed[:_CHUNK], load)
        for start in range(_CHUNK, len(changed), _CHUNK):
            await self._send(changed[start : start + _CHUNK], None)

    async def _send(self, peers: list[PeerStats], load: Load | None) -> None:
        sequence = await self._state.next_sequence()
        self._pending[sequence] = (time.monotonic(), [peer.public_key for peer in peers])
        self._reported |= {peer.public_key: peer for peer in peers}
        self._outbox.send(
            Report(
                sequence=sequence,
                boot_id=self._boot_id,
                generation=self._reconciler.generation,
                peers=peers,
                load=load,
            )
        )

    def _forget(self, keys: list[bytes]) -> None:
        for key in keys:
            self._reported.pop(key, None)


def _news(peer: PeerStats, reported: PeerStats | None) -> bool:
    if reported is None:
        return bool(peer.rx or peer.tx or peer.handshake)
    return peer is not reported and peer != reported
