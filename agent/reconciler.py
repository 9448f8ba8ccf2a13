"""The only writer on the host: takes desired state in, makes it so, answers what the host has, and heals it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from agent.counters import Counters
from agent.desired import IMPORTED, Change, Desired, Name, scope_of
from agent.drivers.base import Device, DriverError
from agent.host import Host
from agent.plan import Action, EnsureInterface, RemovePeer, SetPeer, plan, steps
from agent.snapshots import Staging
from agent.state import State, StateError, Stored
from shared import __version__
from shared.desired import Kind, Peer, digest_bytes
from shared.keys import encode_key
from shared.protocol import (
    PROTOCOL_VERSION,
    Applied,
    Delta,
    Drift,
    Failure,
    Frame,
    Hello,
    PeerStats,
    Refused,
    Resync,
    Snapshot,
    Welcome,
)

_MAX_FAILURES = 5000  # in one answer; with the longest texts it still fits a frame
_MAX_WORDS = 500
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
        self.generation = ""
        self._state, self._host, self._send, self._counters = state, host, send, counters
        self._boot_id, self._guard = boot_id, guard
        self._recheck_seconds, self._clock = recheck_seconds, clock
        self._desired = Desired({}, clock())
        self._epoch = ""
        self._session_epoch = ""
        self._synced = False  # until then nothing is removed from the host
        self._running = ""  # the interface that this process has set up
        self._down: str | None = None  # why no peer can be on the host at all
        self._faults: dict[str, dict[Name, str]] = {}
        self._totals: dict[str, int] = {}
        self._staging = Staging()
        self._resyncs: dict[str, tuple[int, asyncio.TimerHandle]] = {}
        self._began_to_fail = asyncio.Event()
        self._was_failing = False
        self._lock = asyncio.Lock()
        self._busy_since: float | None = None
        self.last_added = 0.0  # monotonic time at which a peer was added that may be waited for

    # --- for the rest of the agent ---

    @property
    def interface(self) -> str | None:
        return self._desired.interface.name if self._desired.interface is not None else None

    @property
    def peers(self) -> dict[bytes, Peer]:
        return self._desired.peers

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
        self._synced = stored.trusted
        self._epoch = stored.epoch if stored.trusted else ""
        scopes = {name: scope_of(kept.epoch, kept.revision, kept.resources) for name, kept in stored.scopes.items()}
        self._desired = Desired(scopes, self._clock())
        async with self._turn():
            await self._converge()
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
        for _, timer in self._resyncs.values():
            timer.cancel()
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
            delay = min(retry, self._recheck_seconds) if self._failing() else self._recheck_seconds
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._began_to_fail.wait(), delay)
                self._began_to_fail.clear()
                continue
            await self.recheck()
            retry = retry * 2 if self._failing() else 1.0
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
                    await self._apply(self._desired.expire(self._clock()), reason="lease_ended")

    # --- frames ---

    async def _welcome(self, frame: Welcome) -> None:
        self._session_epoch = frame.epoch
        self._staging.clear()
        for _, timer in self._resyncs.values():
            timer.cancel()
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
        removes, present = await self._impact(smaller)
        if self._guard.refuses(removes, present):
            for name in names:
                words = "the controller no longer names this scope"
                self._refuse(name, self._desired.scopes[name].revision, words, removes, present)
            return
        if await self._stored(self._state.drop(names)):
            log.info("scopes_dropped", scopes=names, removes=removes)
            await self._become(smaller)

    async def _delta(self, frame: Delta) -> None:
        scope = self._desired.scopes.get(frame.scope)
        if frame.scope == IMPORTED or scope is None or scope.epoch != frame.epoch or frame.epoch != self._epoch:
            self._resync(frame.scope, "the node has no state of this scope in this epoch")
            return
        if frame.revision <= scope.revision:
            self._answer(frame.scope)  # a replay: it is here already
            return
        if frame.base > scope.revision:
            self._resync(frame.scope, f"the node has revision {scope.revision}, not {frame.base}")
            return
        if not await self._stored(self._state.change(frame.scope, frame.revision, frame.upserts, frame.removals)):
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
            await self._become(Desired(self._desired.scopes, self._clock()))
            self._answer(frame.scope)
            return
        change = self._desired.change(frame.scope, frame.upserts, removals, self._clock())
        await self._apply(change, reason="delta", scope=frame.scope)

    async def _snapshot(self, frame: Snapshot) -> None:
        if frame.scope == IMPORTED or frame.epoch != self._session_epoch:
            words = f"the epoch of this session is {self._session_epoch!r}, not {frame.epoch!r}"
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
        removes, present = await self._impact(wanted)
        if self._guard.refuses(removes, present) and not frame.confirmed:
            words = f"the snapshot would remove {removes} of {present} peers"
            self._refuse(frame.scope, frame.revision, words, removes, present)
            return
        if not await self._stored(self._state.replace(frame.scope, frame.epoch, frame.revision, resources)):
            self._resync(frame.scope, "the node could not store the snapshot")
            return
        self._synchronised(frame.scope)
        self._epoch, self._synced = frame.epoch, True
        await self._become(wanted)
        self._answer(frame.scope)

    # --- the host ---

    async def _become(self, desired: Desired) -> None:
        """Take over the new desired state as a whole."""
        before, self._desired = self._desired, desired
        old, new = before.interface, desired.interface
        if self._synced and old is not None and self._running == old.name and (new is None or new.name != old.name):
            try:
                await self._host.remove(old.name)
                log.info("interface_removed", interface=old.name)
            except DriverError as error:
                log.error("interface_not_removed", interface=old.name, error=str(error))
            self._running = ""
        await self._converge()

    async def _converge(self) -> list[Action]:
        """Read the host, do what is missing, read it back, and count what it has; return what was done."""
        spec, failed, actions = self._desired.interface, dict[bytes, str](), list[Action]()
        unprotected = None
        self._down = None
        if spec is None:
            self._down = "the node has no WireGuard interface yet"
            self._count(failed, None)
            return actions
        try:
            unprotected = await self._protect()
            device = await self._host.observe(spec.name)
            actions = self._plan(device)
            if actions:
                failed = await self._host.carry_out(spec.name, actions)
                device = await self._host.observe(spec.name)
                for action in self._plan(device):
                    self._still_to_do(action, failed)
            self._running, self.generation = spec.name, device.generation if device is not None else ""
        except DriverError as error:
            self._down = f"interface {spec.name}: {error}"
        self._count(failed, unprotected)
        self._log_actions(actions)
        return actions

    async def _protect(self) -> str | None:
        """Load the packet filter; where that fails the tunnels go on, and the interface is reported as failed."""
        assert self._desired.interface is not None
        try:
            if await self._host.protect(self._desired.interface):
                self._counters.drift += 1
                log.warning("firewall_healed")
        except DriverError as error:
            return f"packet filter: {error}"
        return None

    def _plan(self, device: Device | None) -> list[Action]:
        spec = self._desired.interface
        assert spec is not None
        return plan(device, spec, self.peers, public_key=self._host.public_key, prune=self._synced)

    @staticmethod
    def _still_to_do(action: Action, failed: dict[bytes, str]) -> None:
        match action:
            case EnsureInterface():
                raise DriverError(f"it was set up, and yet {action.reason}")
            case SetPeer():
                failed.setdefault(action.peer.public_key, "it was set, and yet the host shows something else")
            case RemovePeer():
                failed.setdefault(action.public_key, "it was removed, and yet the host has it")

    def _count(self, failed: dict[bytes, str], unprotected: str | None) -> None:
        """Set faults and digests of all scopes from what the host was seen to have."""
        self._faults = {name: {} for name in self._desired.scopes}
        self._totals = dict.fromkeys(self._desired.scopes, 0)
        spec = self._desired.interface
        for name, scope in self._desired.scopes.items():
            if spec is not None and scope.interfaces.get(spec.name) is spec:
                if self._down or unprotected:
                    self._faults[name][Kind.WIREGUARD_INTERFACE, spec.name] = self._down or unprotected or ""
                else:
                    self._totals[name] += spec.digest()
            for key, peer in scope.peers.items():
                if self.peers.get(key) is not peer or self._down:
                    continue
                if key in failed:
                    self._faults[name][Kind.WIREGUARD_PEER, peer.key] = failed[key]
                else:
                    self._totals[name] += peer.digest()
        self._settle()

    async def _apply(self, change: Change, *, reason: str, scope: str = "") -> None:
        """Do a small change on a host that is as desired otherwise, and answer for every scope it touched."""
        spec = self._desired.interface
        failed: dict[bytes, str] = {}
        if spec is not None and self._down is None:
            retry = [key for key, (name, old) in change.withdrawn.items() if self._fault(name, old) is not None]
            actions = steps(change, retry)
            try:
                failed = await self._host.carry_out(spec.name, actions)
            except DriverError as error:
                log.warning("interface_lost", interface=spec.name, error=str(error))
                await self._converge()
            else:
                self._log_actions(actions, reason)
                self._account(change, failed)
        if change.admitted:
            self.last_added = time.monotonic()
        touched = {name for name, _ in (*change.withdrawn.values(), *change.admitted.values())}
        for name in touched | ({scope} if scope else set()):
            self._answer(name)

    def _account(self, change: Change, failed: dict[bytes, str]) -> None:
        for key, (name, old) in change.withdrawn.items():
            if self._faults[name].pop((Kind.WIREGUARD_PEER, old.key), None) is None:
                self._totals[name] -= old.digest()
            if key in failed and key not in change.admitted:
                self._faults[name][Kind.WIREGUARD_PEER, old.key] = failed[key]
        for key, (name, new) in change.admitted.items():
            if key in failed:
                self._faults[name][Kind.WIREGUARD_PEER, new.key] = failed[key]
            else:
                self._faults[name].pop((Kind.WIREGUARD_PEER, new.key), None)
                self._totals[name] += new.digest()
        self._settle()

    async def _recheck(self) -> None:
        spec = self._desired.interface
        if spec is None:
            return
        revived = self._desired.revive(self._clock())
        if revived.admitted:
            await self._apply(revived, reason="clock_set_back")
        before = {name: self._applied(name) for name in self._desired.scopes}
        was_failing = self._failing()
        if not was_failing and await self._untouched():
            return
        actions = await self._converge()
        if not was_failing:
            self._report_drift(actions)
        for name in self._desired.scopes:
            if (answer := self._applied(name)) != before[name]:
                self._emit(answer)

    async def _untouched(self) -> bool:
        """Whether the host is exactly as desired; it costs one reading and no message."""
        spec = self._desired.interface
        assert spec is not None
        try:
            if await self._host.protect(spec):
                self._counters.drift += 1
                log.warning("firewall_healed")
            device = await self._host.observe(spec.name)
        except DriverError:
            return False
        return not self._plan(device) and device is not None and device.generation == self.generation

    def _report_drift(self, actions: Sequence[Action]) -> None:
        found: dict[str, dict[str, int]] = {}
        for action in actions:
            match action:
                case SetPeer():
                    name = self._desired.scope_name(action.peer.public_key)
                    what = "missing" if action.new else "changed"
                case _:  # the interface, or a peer that nobody asked for: the scope that names the interface
                    name = self._interface_scope()
                    what = "unexpected" if isinstance(action, RemovePeer) else "changed"
            if name is not None:
                counts = found.setdefault(name, {"missing": 0, "unexpected": 0, "changed": 0})
                counts[what] += 1
        for name, counts in found.items():
            self._counters.drift += sum(counts.values())
            log.warning("drift_healed", scope=name, **counts)
            if name != IMPORTED:
                self._send(Drift(scope=name, **counts))

    def _interface_scope(self) -> str | None:
        spec = self._desired.interface
        return next((name for name, scope in self._desired.scopes.items() if spec in scope.interfaces.values()), None)

    async def _impact(self, wanted: Desired) -> tuple[int, int]:
        """How many peers of this node `wanted` would remove, and how many it has: on the host, or stored for it."""
        present = set(self.peers)
        spec = self._desired.interface or wanted.interface
        if spec is not None:
            with contextlib.suppress(DriverError):
                device = await self._host.observe(spec.name)
                present.update(peer.public_key for peer in (device.peers if device is not None else ()))
        if wanted.interface is None:
            return len(present), len(present)
        return sum(key not in wanted.peers for key in present), len(present)

    # --- answers ---

    def _answer(self, name: str) -> None:
        self._emit(self._applied(name))

    def _emit(self, answer: Applied) -> None:
        if answer.scope == IMPORTED:
            return
        self._counters.applied_revision[answer.scope] = answer.revision
        self._send(answer)

    def _applied(self, name: str) -> Applied:
        failures = [Failure(kind, key, words[:_MAX_WORDS]) for (kind, key), words in self._failures(name).items()]
        return Applied(
            scope=name,
            revision=self._desired.scopes[name].revision,
            digest=digest_bytes(self._totals.get(name, 0)),
            failures=failures[:_MAX_FAILURES],
        )

    def _failures(self, name: str) -> dict[Name, str]:
        failures = self._desired.refusals(name) | self._faults.get(name, {})
        if self._down is not None:
            for key, peer in self._desired.scopes[name].peers.items():
                if self.peers.get(key) is peer:
                    failures[Kind.WIREGUARD_PEER, encode_key(key)] = self._down
        return failures

    def _fault(self, name: str, peer: Peer) -> str | None:
        return self._faults.get(name, {}).get((Kind.WIREGUARD_PEER, peer.key))

    def _failing(self) -> bool:
        """Whether a driver failed; what was refused as wrong does not get better by trying again."""
        return any(self._faults.values()) or (self._down is not None and self._desired.interface is not None)

    def _refuse(self, name: str, revision: int, reason: str, removes: int = 0, present: int = 0) -> None:
        self._counters.refused_snapshots += 1
        log.error("snapshot_refused", scope=name, revision=revision, reason=reason, removes=removes, present=present)
        self._send(Refused(scope=name, revision=revision, reason=reason, removes=removes, present=present))

    def _resync(self, name: str, reason: str) -> None:
        """Ask for a snapshot: the first time at once, then less and less often until one could be stored."""
        tries, timer = self._resyncs.get(name, (0, None))
        if timer is not None and not timer.cancelled() and timer.when() > asyncio.get_running_loop().time():
            return
        delay = 0.0 if tries == 0 else min(2.0 ** (tries - 1), 30.0)
        if tries == 0:
            log.warning("resync_asked", scope=name, reason=reason)
        ask = Resync(scope=name, reason=reason)
        self._resyncs[name] = (tries + 1, asyncio.get_running_loop().call_later(delay, self._send, ask))

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

    def _settle(self) -> None:
        self._counters.failures = sum(len(self._failures(name)) for name in self._desired.scopes)
        self._counters.peers = 0 if self._down else len(self.peers)
        if self._failing() and not self._was_failing:
            self._began_to_fail.set()
        self._was_failing = self._failing()

    @staticmethod
    def _log_actions(actions: Sequence[Action], reason: str = "") -> None:
        if len(actions) <= 5:
            for action in actions:
                log.info("applied", action=str(action), reason=reason)
        else:
            log.info("applied", actions=len(actions), first=str(actions[0]), reason=reason)

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        async with self._lock:
            self._busy_since = time.monotonic()
            try:
                yield
            finally:
                self._busy_since = None
