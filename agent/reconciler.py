"""The only writer on the host: takes desired state in, makes it so, answers what the host has, and heals it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from agent.convergence import Convergence, log_actions
from agent.counters import Counters
from agent.desired import IMPORTED, Change, Desired, scope_of
from agent.host import Host
from agent.snapshots import Staging
from agent.state import State, StateError, Stored
from shared import __version__
from shared.desired import Kind, Peer
from shared.protocol import (
    PROTOCOL_VERSION,
    Applied,
    Delta,
    Frame,
    Hello,
    PeerStats,
    Refused,
    ResourceName,
    Resync,
    Snapshot,
    Welcome,
)

_BACKUP_SECONDS = 600
_STUCK_SECONDS = 120

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Guard:
    """How much of its peers a node lets a snapshot remove without the operator's confirmation."""

    share: float = 0.5
    minimum: int = 10

    def refuses(self, removes: int, present: int) -> bool:
        return removes >= self.minimum and removes > self.share * present


class Reconciler:
    """One task at a time holds `_turn`: frames, leases, the periodic re-check and the reading of counters."""

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
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.inbox: asyncio.Queue[Welcome | Delta | Snapshot] = asyncio.Queue(64)
        self.last_added = 0.0  # monotonic time at which a peer was added that may be waited for
        self._state, self._host, self._send, self._counters = state, host, send, counters
        self._boot_id, self._guard = boot_id, guard
        self._recheck_seconds, self._clock = recheck_seconds, clock
        self._convergence = Convergence(host, counters, Desired({}, clock()))
        self._epoch = ""
        self._session = Welcome(version=PROTOCOL_VERSION, epoch="", node_id="", scopes=[])
        self._staging = Staging()
        self._resyncs: dict[str, tuple[int, asyncio.TimerHandle | None]] = {}
        self._began_to_fail = asyncio.Event()
        self._lock = asyncio.Lock()
        self._busy_since: float | None = None

    # --- for the rest of the agent ---

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

    def hello(self) -> Hello:
        revisions = {
            name: scope.revision
            for name, scope in self._desired.scopes.items()
            if name != IMPORTED and self._epoch and scope.epoch == self._epoch
        }
        return Hello(
            version=PROTOCOL_VERSION,
            agent=__version__,
            boot_id=self._boot_id,
            epoch=self._epoch,
            revisions=revisions,
            wireguard_public_key=self._host.public_key,
            backend=self._host.backend,
        )

    def alive(self) -> bool:
        """False once a step hangs: the service manager then restarts the agent, the tunnels stay."""
        return self._busy_since is None or time.monotonic() - self._busy_since < _STUCK_SECONDS

    async def stats(self) -> list[PeerStats]:
        """Read the counters; raise DriverError."""
        if self.interface is None:
            return []
        async with self._turn():
            return await self._host.stats(self.interface) if self.interface is not None else []

    async def start(self) -> None:
        """Make the host serve what the disk knows, before anybody is asked."""
        try:
            stored = await self._state.open()
        except StateError as error:
            self._counters.store_errors += 1
            log.error("state_unavailable", error=str(error))
            stored = Stored()
        self._convergence.prune = stored.trusted
        self._epoch = stored.epoch if stored.trusted else ""
        scopes = {
            name: scope_of(kept.epoch if stored.trusted else "", kept.revision, kept.resources)
            for name, kept in stored.scopes.items()
        }
        async with self._turn():
            await self._convergence.become(Desired(scopes, self._clock()))
        log.info("started", scopes=len(scopes), peers=len(self.peers), trusted=stored.trusted)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._take_frames())
            tasks.create_task(self._recheck_periodically())
            tasks.create_task(self._enforce_leases())

    async def recheck(self) -> None:
        """Read the host back, heal what is not as desired, and report it."""
        async with self._turn():
            await self._recheck()

    async def close(self) -> None:
        self._forget_resyncs()
        with contextlib.suppress(StateError):
            await self._state.backup()
        await self._state.close()
        await self._host.close()

    # --- tasks ---

    async def _take_frames(self) -> None:
        while True:
            frame = await self.inbox.get()
            async with self._turn():
                started = time.monotonic()
                await self._take(frame)
                self._counters.apply_seconds += time.monotonic() - started
                self._counters.applies += 1
            del frame  # a part of a snapshot is large, and the next frame may be hours away

    async def _take(self, frame: Welcome | Delta | Snapshot) -> None:
        match frame:
            case Welcome():
                await self._welcome(frame)
            case Delta():
                await self._delta(frame)
            case Snapshot():
                await self._snapshot(frame)

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
                    await self._change(self._desired.expire(self._clock()), reason="lease_ended")

    # --- frames ---

    async def _welcome(self, frame: Welcome) -> None:
        self._session = frame
        self._staging.clear()
        self._forget_resyncs()
        if self._epoch and frame.epoch != self._epoch:
            log.warning("epoch_changed", stored=self._epoch, controller=frame.epoch)
        gone = [name for name in self._desired.scopes if name not in frame.scopes and name != IMPORTED]
        if gone:
            await self._drop(gone)
        for name, scope in self._desired.scopes.items():
            if name in frame.scopes and scope.epoch == frame.epoch == self._epoch:
                self._answer(name)

    async def _drop(self, names: list[str]) -> None:
        smaller = self._desired.without(names, self._clock())
        removes, present = await self._convergence.impact(smaller, prune=self._convergence.prune)
        if self._guard.refuses(removes, present):
            for name in names:
                words = "the controller no longer names this scope"
                self._refuse(name, self._desired.scopes[name].revision, words, removes, present)
            return
        if await self._stored(self._state.drop(names)):
            log.info("scopes_dropped", scopes=names, removes=removes)
            await self._convergence.become(smaller)

    async def _delta(self, frame: Delta) -> None:
        scope = self._desired.scopes.get(frame.scope)
        if frame.scope == IMPORTED or scope is None or scope.epoch != frame.epoch or frame.epoch != self._epoch:
            self._resync(frame.scope, "the node has no state of this scope in this epoch")
            return
        if frame.revision <= scope.revision:
            self._answer(frame.scope)  # a replay: it is here already
            return
        if frame.base > scope.revision:
            await self._revoke(frame.scope, _peers(frame.removals))
            self._resync(frame.scope, f"the node has revision {scope.revision}, not {frame.base}")
            return
        if not await self._stored(self._state.change(frame.scope, frame.revision, frame.upserts, frame.removals)):
            await self._revoke(frame.scope, _peers(frame.removals))
            self._resync(frame.scope, "the node could not store the change")
            return
        self._synchronised(frame.scope)
        scope.revision = frame.revision
        removals = [(removal.kind, removal.key) for removal in frame.removals]
        names = [*removals, *((resource.kind, resource.key) for resource in frame.upserts)]
        if any(kind == Kind.WIREGUARD_INTERFACE for kind, _ in names):
            for name in removals:
                scope.discard(name)
            for resource in frame.upserts:
                scope.put(resource)
            await self._convergence.become(Desired(self._desired.scopes, self._clock()))
            self._answer(frame.scope)
            return
        change = self._desired.change(frame.scope, frame.upserts, removals, self._clock())
        await self._change(change, reason="delta", scope=frame.scope)

    def _complete(self, desired: Desired) -> bool:
        """Whether every scope of this session is here; only then a peer that none of them has belongs to nobody."""
        return all(
            (scope := desired.scopes.get(name)) is not None and scope.epoch == self._session.epoch
            for name in self._session.scopes
        )

    async def _change(self, change: Change, *, reason: str, scope: str = "") -> None:
        """Do a change and answer for every scope that it touched."""
        actions = await self._convergence.apply(change)
        if change.admitted:
            self.last_added = time.monotonic()
        touched = {name for name, _ in (*change.withdrawn.values(), *change.admitted.values())}
        for name in touched | ({scope} if scope else set()):
            self._answer(name)
        asyncio.get_running_loop().call_soon(log_actions, actions, reason)  # once the answer has gone out

    async def _snapshot(self, frame: Snapshot) -> None:
        if frame.scope == IMPORTED or frame.epoch != self._session.epoch:
            words = f"the epoch of this session is {self._session.epoch!r}, not {frame.epoch!r}"
            self._refuse(frame.scope, frame.revision, words)
            return
        try:
            resources = self._staging.take(frame)
        except ValueError as error:
            self._resync(frame.scope, str(error))
            return
        if resources is None:
            return
        kept = self._desired.scopes.get(frame.scope)
        if kept is not None and kept.epoch == frame.epoch and frame.revision < kept.revision and not frame.confirmed:
            words = f"revision {frame.revision} is older than {kept.revision} of the same epoch, which the node has"
            self._refuse(frame.scope, frame.revision, words)
            return
        scope = scope_of(frame.epoch, frame.revision, resources)
        wanted = self._desired.with_scope(frame.scope, scope, self._clock())
        prune = self._convergence.prune or self._complete(wanted)
        removes, present = await self._convergence.impact(wanted, prune=prune)
        if self._guard.refuses(removes, present) and not frame.confirmed:
            words = f"the snapshot would remove {removes} of {present} peers"
            self._refuse(frame.scope, frame.revision, words, removes, present)
            return
        if not await self._stored(self._state.replace(frame.scope, frame.epoch, frame.revision, resources)):
            if kept is not None:
                await self._revoke(
                    frame.scope, [peer.key for key, peer in kept.peers.items() if key not in scope.peers]
                )
            self._resync(frame.scope, "the node could not store the snapshot")
            return
        self._synchronised(frame.scope)
        self._epoch, self._convergence.prune = frame.epoch, prune
        await self._convergence.become(wanted)
        self._answer(frame.scope)

    async def _revoke(self, name: str, keys: Sequence[str]) -> None:
        """Take peers off the host whose end is known but cannot be stored now: nobody revoked stays for a full disk.

        It is not acknowledged: after a restart the disk would bring them back, and the controller has to say it again.
        """
        if keys:
            names = [(Kind.WIREGUARD_PEER, key) for key in keys]
            change = self._desired.change(name, [], names, self._clock())
            log_actions(await self._convergence.apply(change), reason="not_stored")

    # --- the re-check ---

    async def _recheck(self) -> None:
        if self._desired.interface is None:
            return
        revived = self._desired.revive(self._clock())
        if revived.admitted:
            await self._change(revived, reason="clock_set_back")
        before = {name: self._convergence.applied(name) for name in self._desired.scopes}
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
        for name in self._desired.scopes:
            if (answer := self._convergence.applied(name)) != before[name]:
                self._emit(answer)

    # --- answers ---

    def _answer(self, name: str) -> None:
        self._emit(self._convergence.applied(name))

    def _emit(self, answer: Applied) -> None:
        if answer.scope == IMPORTED:
            return
        self._counters.applied_revision[answer.scope] = answer.revision
        self._send(answer)

    def _refuse(self, name: str, revision: int, reason: str, removes: int = 0, present: int = 0) -> None:
        self._counters.refused_snapshots += 1
        log.error("snapshot_refused", scope=name, revision=revision, reason=reason, removes=removes, present=present)
        self._send(Refused(scope=name, revision=revision, reason=reason, removes=removes, present=present))

    def _resync(self, name: str, reason: str) -> None:
        """Ask for a snapshot: the first time at once, then less and less often until one could be stored."""
        loop, ask = asyncio.get_running_loop(), Resync(scope=name, reason=reason)
        tries, timer = self._resyncs.get(name, (0, None))
        if tries == 0:
            log.warning("resync_asked", scope=name, reason=reason)
            self._send(ask)
        elif timer is not None and not timer.cancelled() and timer.when() > loop.time():
            return
        else:
            timer = loop.call_later(min(2.0 ** (tries - 1), 30.0), self._send, ask)
        self._resyncs[name] = (tries + 1, timer)

    def _forget_resyncs(self) -> None:
        """A new session tells from the start what is missing."""
        for name in list(self._resyncs):
            self._synchronised(name)

    def _synchronised(self, name: str) -> None:
        _, timer = self._resyncs.pop(name, (0, None))
        if timer is not None:
            timer.cancel()

    async def _stored(self, write: Awaitable[None]) -> bool:
        try:
            await write
        except StateError as error:
            self._counters.store_errors += 1
            log.error("state_not_stored", error=str(error))
            return False
        return True

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


def _peers(names: Sequence[ResourceName]) -> list[str]:
    return [name.key for name in names if name.kind == Kind.WIREGUARD_PEER]
