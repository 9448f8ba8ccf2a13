"""The only writer on the host: takes desired state in, makes it so, answers what the host has, and heals it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection

import structlog

from agent.allowances import Allowances
from agent.answers import Answers
from agent.changes import Changes
from agent.convergence import Convergence, Farewell
from agent.counters import Counters
from agent.desired import IMPORTED, Desired
from agent.host import Host
from agent.intake import Guard as Guard
from agent.intake import Intake
from agent.logins import Logins
from agent.services import Services
from agent.serving import Outcome, Serving
from agent.state import State, StateError
from shared import __version__
from shared.desired import Peer, Protocol
from shared.protocol import (
    PROTOCOL_VERSION,
    Delta,
    Frame,
    Hello,
    PeerStats,
    Snapshot,
    Welcome,
)

_BACKUP_SECONDS = 600
_STUCK_SECONDS = 120

log = structlog.get_logger()


class Reconciler:
    """One task at a time holds `_turn`: frames, leases, the periodic re-check and the reading of counters.

    The servers of other protocols work in tasks of their own; only answers wait for them.
    """

    def __init__(
        self,
        *,
        state: State,
        host: Host,
        send: Callable[[Frame], None],
        counters: Counters,
        boot_id: str,
        guard: Guard,
        recheck_seconds: float,
        services: Services | None = None,
        allowances: Allowances | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.inbox: asyncio.Queue[Welcome | Delta | Snapshot] = asyncio.Queue(64)
        self._state, self._host, self._send, self._counters = state, host, send, counters
        self._boot_id, self._recheck_seconds, self._clock = boot_id, recheck_seconds, clock
        self._services = services or Services((Protocol.WIREGUARD,))
        self._allowances = allowances or Allowances()
        nothing = Desired({}, clock(), self._allowances.spent)
        self._convergence = Convergence(host, counters, nothing, self._services)
        self._answers = Answers(send, counters, applied=self._convergence.applied, busy=self._services.busy)
        self._changes = Changes(
            self._convergence, self._services, self._allowances, self._answers, send, counters, clock
        )
        self._intake = Intake(state, self._changes, self._convergence, self._answers, guard, counters, clock)
        self._services.settled, self._services.protect = self._settled, self._convergence.protect
        self._began_to_fail = asyncio.Event()
        self._lock = asyncio.Lock()
        self.stats_seconds = 0.0  # what the last reading of the counters took, without waiting for its turn
        self._busy_since: float | None = None

    # --- for the rest of the agent ---

    @property
    def last_added(self) -> float:
        """Monotonic time at which a peer was added that may be waited for."""
        return self._changes.last_added

    @property
    def interface(self) -> str | None:
        return self._desired.interface.name if self._desired.interface is not None else None

    @property
    def peers(self) -> dict[bytes, Peer]:
        return self._desired.peers

    @property
    def generation(self) -> str:
        return self._convergence.generation

    @property
    def _desired(self) -> Desired:
        return self._convergence.desired

    def on_farewell(self, farewell: Farewell) -> None:
        """Have the last counters of peers told that are about to be removed."""
        self._convergence.farewell = farewell

    @property
    def logins(self) -> Logins:
        return self._desired.logins

    def hello(self) -> Hello:
        return Hello(
            version=PROTOCOL_VERSION,
            agent=__version__,
            boot_id=self._boot_id,
            epoch=self._intake.epoch,
            revisions=self._intake.revisions(),
            wireguard_public_key=self._host.public_key,
            backend=self._host.backend,
            protocols=[str(protocol) for protocol in self._services.protocols],
            ssh_host_keys=self._services.host_keys,
            ledger=self._allowances.ledger,
        )

    def alive(self) -> bool:
        """False once a step hangs: the service manager then restarts the agent, the tunnels stay."""
        return self._busy_since is None or time.monotonic() - self._busy_since < _STUCK_SECONDS

    async def stats(self) -> list[PeerStats]:
        """Read the counters; raise DriverError."""
        if self.interface is None:
            return []
        async with self._turn():
            if self.interface is None:
                return []
            started = time.monotonic()
            try:
                return await self._host.stats(self.interface)
            finally:
                self.stats_seconds = time.monotonic() - started

    async def start(self) -> None:
        """Make the host serve what the disk knows, before anybody is asked."""
        async with self._turn():
            trusted = await self._intake.restore()
        log.info("started", scopes=len(self._desired.scopes), peers=len(self.peers), trusted=trusted)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._take_frames())
            tasks.create_task(self._recheck_periodically())
            tasks.create_task(self._enforce_leases())
            tasks.create_task(self._answer_late())
            tasks.create_task(self._services.run())

    async def recheck(self) -> None:
        """Read the host back, heal what is not as desired, and report it."""
        async with self._turn():
            await self._recheck()

    async def judge(self, accounts: Collection[int] | None = None) -> bool:
        """See whether these metered accounts (None = all) have used up what they may, and act on it at once; return
        whether any has, or has something again."""
        joined, left = self._allowances.judge(self._desired.metered, self.logins.leases, accounts)
        if not joined and not left:
            return False
        async with self._turn():
            await self._changes.bar_and_revive(joined)
        return True

    async def close(self) -> None:
        self._answers.close()
        with contextlib.suppress(StateError):
            await self._state.backup()
        await self._state.close()
        await self._services.close()
        await self._host.close()

    # --- tasks ---

    async def _take_frames(self) -> None:
        while True:
            frame = await self.inbox.get()
            async with self._turn():
                started = time.monotonic()
                await self._intake.take(frame)
                self._counters.apply_seconds += time.monotonic() - started
                self._counters.applies += 1
            del frame  # a part of a snapshot is large, and the next frame may be hours away

    async def _answer_late(self) -> None:
        while True:
            name = await self._answers.late()
            async with self._turn():
                if name in self._desired.scopes:
                    self._answers.answer_late(name)

    async def _settled(self, serving: Serving, outcome: Outcome) -> None:
        async with self._turn():
            self._changes.settled(serving, outcome)

    async def _recheck_periodically(self) -> None:
        retry, backed_up = 1.0, time.monotonic()
        while True:
            delay = min(retry, self._recheck_seconds) if self._convergence.failing() else self._recheck_seconds
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):  # wait_for may lose a cancellation (Python 3.11)
                    await self._began_to_fail.wait()
                self._began_to_fail.clear()
                continue
            await self.recheck()
            retry = retry * 2 if self._convergence.failing() else 1.0
            if time.monotonic() - backed_up > _BACKUP_SECONDS:
                backed_up = time.monotonic()
                with contextlib.suppress(StateError):
                    await self._state.backup()

    async def _enforce_leases(self) -> None:
        """Look at the wall clock at least once a second: it may be set at any time."""
        while True:
            first = self._desired.next_expiry()
            await asyncio.sleep(1.0 if first is None else min(1.0, max(0.01, first - self._clock())))
            if first is not None and first <= self._clock():
                async with self._turn():
                    await self._changes.expire()

    # --- the re-check ---

    async def _recheck(self) -> None:
        await self._changes.revive("clock_set_back")
        if self._desired.interface is None:
            return
        failing = self._convergence.failing()
        if not failing and await self._convergence.untouched():
            return
        actions = await self._convergence.converge()
        for drift in [] if failing else self._convergence.drifts(actions):
            self._counters.drift += drift.missing + drift.unexpected + drift.changed
            log.warning(
                "drift_healed",
                scope=drift.scope,
                missing=drift.missing,
                unexpected=drift.unexpected,
                changed=drift.changed,
            )
            if drift.scope != IMPORTED:
                self._send(drift)
        self._answers.tell_news(self._desired.scopes)

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        async with self._lock:
            self._busy_since = time.monotonic()
            failing = self._convergence.failing()
            try:
                yield
            finally:
                self._busy_since = None
                if self._convergence.failing() and not failing:
                    self._began_to_fail.set()
