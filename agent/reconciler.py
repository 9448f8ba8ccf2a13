"""The only writer on the host: takes desired state in, makes it so, answers what the host has, and heals it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import structlog

from agent.allowances import Allowances
from agent.answers import Answers
from agent.convergence import Convergence, Farewell, log_actions
from agent.counters import Counters
from agent.desired import IMPORTED, Change, Desired, scope_of
from agent.host import Host
from agent.logins import Logins, Name
from agent.services import Services
from agent.serving import Outcome, Serving
from agent.snapshots import Staging
from agent.state import State, StateError, Stored
from shared import __version__
from shared.desired import Kind, Peer, Protocol
from shared.protocol import (
    PROTOCOL_VERSION,
    Delta,
    Drift,
    Frame,
    Hello,
    PeerStats,
    ResourceName,
    Snapshot,
    Welcome,
)

_BACKUP_SECONDS = 600
_STUCK_SECONDS = 120
_PATIENCE = 1.0  # so long the answer to a change of peers waits for the servers' work of the same scope
_WORK_SECONDS = 10.0  # and so long that to a change of their own

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Guard:
    """How much of its peers and logins a node lets a snapshot remove without the operator's confirmation."""

    share: float = 0.5
    minimum: int = 10

    def refuses(self, removes: int, present: int) -> bool:
        return removes >= self.minimum and removes > self.share * present


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
        self.last_added = 0.0  # monotonic time at which a peer was added that may be waited for
        self._state, self._host, self._send, self._counters = state, host, send, counters
        self._answers = Answers(send, counters)
        self._services = services or Services((Protocol.WIREGUARD,))
        self._services.settled, self._services.protect = self._settled, self._protect
        self._allowances = allowances or Allowances()
        self._spent = self._allowances.spent
        self._boot_id, self._guard = boot_id, guard
        self._recheck_seconds, self._clock = recheck_seconds, clock
        self._convergence = Convergence(host, counters, Desired({}, clock(), self._spent), self._services)
        self._epoch = ""
        self._session = Welcome(version=PROTOCOL_VERSION, epoch="", node_id="", scopes=[])
        self._staging = Staging()
        self._late: asyncio.Queue[str] = asyncio.Queue()  # scopes whose answer must wait no longer
        self._held: dict[str, asyncio.TimerHandle] = {}
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

    def on_farewell(self, farewell: Farewell) -> None:
        """Have the last counters of peers told that are about to be removed."""
        self._convergence.farewell = farewell

    @property
    def logins(self) -> Logins:
        return self._desired.logins

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
            desired = Desired(scopes, self._clock(), self._spent)
            self._judge(desired)
            await self._convergence.become(desired)
        log.info("started", scopes=len(scopes), peers=len(self.peers), trusted=stored.trusted)

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
            now = self._clock()
            change = self._desired.bar(self._spent & joined, now)
            change.then(self._desired.revive(now))
            await self._change(change, reason="allowance")
        return True

    async def close(self) -> None:
        self._answers.forget_resyncs()
        for timer in self._held.values():
            timer.cancel()
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
        self._answers.forget_resyncs()
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
                self._answers.refuse(name, self._desired.scopes[name].revision, words, removes, present)
            return
        if await self._stored(self._state.drop(names)):
            log.info("scopes_dropped", scopes=names, removes=removes)
            self._judge(smaller)
            await self._convergence.become(smaller)

    async def _delta(self, frame: Delta) -> None:
        scope = self._desired.scopes.get(frame.scope)
        if frame.scope == IMPORTED or scope is None or scope.epoch != frame.epoch or frame.epoch != self._epoch:
            self._answers.resync(frame.scope, "the node has no state of this scope in this epoch")
            return
        if frame.revision <= scope.revision:
            self._answer(frame.scope)  # a replay: it is here already
            return
        if frame.base > scope.revision:
            await self._revoke(frame.scope, _revocable(frame.removals))
            self._answers.resync(frame.scope, f"the node has revision {scope.revision}, not {frame.base}")
            return
        if not await self._stored(self._state.change(frame.scope, frame.revision, frame.upserts, frame.removals)):
            await self._revoke(frame.scope, _revocable(frame.removals))
            self._answers.resync(frame.scope, "the node could not store the change")
            return
        self._answers.synchronised(frame.scope)
        scope.revision = frame.revision
        removals = [(removal.kind, removal.key) for removal in frame.removals]
        names = [*removals, *((resource.kind, resource.key) for resource in frame.upserts)]
        if any(kind == Kind.WIREGUARD_INTERFACE for kind, _ in names):
            for name in removals:
                scope.discard(name)
            for resource in frame.upserts:
                scope.put(resource)
            desired = Desired(self._desired.scopes, self._clock(), self._spent)
            self._judge(desired)
            await self._convergence.become(desired)
            self._answer(frame.scope)
            return
        change = self._desired.change(frame.scope, frame.upserts, removals, self._clock())
        if change.accounts:
            change.then(self._judge(self._desired, change.accounts))
        await self._change(change, reason="delta", scope=frame.scope)

    def _complete(self, desired: Desired) -> bool:
        """Whether every scope of this session is here; only then a peer that none of them has belongs to nobody."""
        return all(
            (scope := desired.scopes.get(name)) is not None and scope.epoch == self._session.epoch
            for name in self._session.scopes
        )

    async def _change(self, change: Change, *, reason: str, scope: str = "") -> None:
        """Do a change and answer for every scope that it touched."""
        others = self._touch(change.others, scope)
        actions = await self._convergence.apply(change)
        if change.admitted:
            self.last_added = time.monotonic()
        touched = {name for name, _ in (*change.withdrawn.values(), *change.admitted.values())}
        for name in touched.union(others, {scope} if scope else ()):
            self._answer(name, _WORK_SECONDS if name in others else _PATIENCE)
        asyncio.get_running_loop().call_soon(log_actions, actions, reason)  # once the answer has gone out

    def _touch(self, names: Collection[Name], scope: str) -> set[str]:
        """Set the servers to work on what changed; return the scopes that it is part of."""
        parts: dict[str, list[Name]] = {}
        for name in names:
            owner = scope or self.logins.owner(name)
            if owner is not None:
                parts.setdefault(owner, []).append(name)
        for owner, part in parts.items():
            self._services.touch(part, owner)
        if parts:
            self._services.noticed()
        return set(parts)

    def _judge(self, desired: Desired, accounts: Collection[int] | None = None) -> Change:
        """Bar in this state who has used up what he may, and let in who has something again."""
        now = self._clock()
        joined, left = self._allowances.judge(desired.metered, desired.logins.leases, accounts)
        change = desired.bar(joined, now) if joined else Change()
        if left:
            change.then(desired.revive(now))
        return change

    async def _revive(self, reason: str) -> None:
        revived = self._desired.revive(self._clock())
        if revived.admitted or revived.others:
            await self._change(revived, reason=reason)

    async def _snapshot(self, frame: Snapshot) -> None:
        if frame.scope == IMPORTED or frame.epoch != self._session.epoch:
            words = f"the epoch of this session is {self._session.epoch!r}, not {frame.epoch!r}"
            self._answers.refuse(frame.scope, frame.revision, words)
            return
        try:
            resources = self._staging.take(frame)
        except ValueError as error:
            self._answers.resync(frame.scope, str(error))
            return
        if resources is None:
            return
        kept = self._desired.scopes.get(frame.scope)
        if kept is not None and kept.epoch == frame.epoch and frame.revision < kept.revision and not frame.confirmed:
            words = f"revision {frame.revision} is older than {kept.revision} of the same epoch, which the node has"
            self._answers.refuse(frame.scope, frame.revision, words)
            return
        scope = scope_of(frame.epoch, frame.revision, resources)
        wanted = self._desired.with_scope(frame.scope, scope, self._clock())
        prune = self._convergence.prune or self._complete(wanted)
        removes, present = await self._convergence.impact(wanted, prune=prune)
        if self._guard.refuses(removes, present) and not frame.confirmed:
            words = f"the snapshot would remove {removes} of {present} peers"
            self._answers.refuse(frame.scope, frame.revision, words, removes, present)
            return
        if not await self._stored(self._state.replace(frame.scope, frame.epoch, frame.revision, resources)):
            if kept is not None:
                peers = [
                    (str(Kind.WIREGUARD_PEER), peer.key) for key, peer in kept.peers.items() if key not in scope.peers
                ]
                logins = [name for name in kept.others if name[0] == Kind.CREDENTIAL and name not in scope.others]
                await self._revoke(frame.scope, [*peers, *logins])
            self._answers.resync(frame.scope, "the node could not store the snapshot")
            return
        self._answers.synchronised(frame.scope)
        self._epoch, self._convergence.prune = frame.epoch, prune
        self._judge(wanted)
        await self._convergence.become(wanted)
        self._answer(frame.scope)

    async def _revoke(self, scope: str, names: Sequence[Name]) -> None:
        """Take off the host whose end is known but cannot be stored now: nobody revoked stays for a full disk.

        It is not acknowledged: after a restart the disk would bring them back, and the controller has to say it again.
        """
        if names and scope in self._desired.scopes:
            change = self._desired.change(scope, [], names, self._clock())
            self._touch(change.others, scope)
            log_actions(await self._convergence.apply(change), reason="not_stored")

    # --- the re-check ---

    async def _recheck(self) -> None:
        await self._revive("clock_set_back")
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
        self._tell_news(self._desired.scopes)

    # --- answers ---

    def _answer(self, name: str, patience: float = _PATIENCE) -> None:
        """Acknowledge what the host has of the scope, once the servers are through with their part of it.

        Should that take long, the answer names them as failing: others of the same scope do not wait for ever.
        """
        if not self._services.busy(name):
            self._forget_held(name)
            self._answers.emit(self._convergence.applied(name))
            return
        loop = asyncio.get_running_loop()
        held = self._held.get(name)
        if held is None or held.when() > loop.time() + patience:
            self._forget_held(name)
            self._held[name] = loop.call_later(patience, self._late.put_nowait, name)

    async def _answer_late(self) -> None:
        while True:
            name = await self._late.get()
            async with self._turn():
                if self._held.pop(name, None) is not None and name in self._desired.scopes:
                    self._answers.emit(self._convergence.applied(name))

    async def _settled(self, serving: Serving, outcome: Outcome) -> None:
        """A server is through with a round of work."""
        if serving.served:
            self._counters.server_up[serving.protocol] = serving.running is not None and serving.fault is None
        async with self._turn():
            healed = outcome.missing + outcome.unexpected + outcome.altered
            owner = self.logins.owner(serving.name)
            if healed and owner is not None:
                self._counters.drift += healed
                counts = {"missing": outcome.missing, "unexpected": outcome.unexpected, "changed": outcome.altered}
                log.warning("drift_healed", scope=owner, protocol=str(serving.protocol), **counts)
                self._send(Drift(scope=owner, **counts))
            for name in outcome.scopes.intersection(self._desired.scopes):
                if not self._services.busy(name):
                    self._answer(name)
            if outcome.changed:
                self._tell_news(name for name in self._desired.scopes if not self._services.busy(name))

    def _tell_news(self, names: Iterable[str]) -> None:
        for name in names:
            self._answers.emit_news(self._convergence.applied(name))

    def _forget_held(self, name: str) -> None:
        if (timer := self._held.pop(name, None)) is not None:
            timer.cancel()

    async def _protect(self) -> str | None:
        return await self._convergence.protect()

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


def _revocable(names: Sequence[ResourceName]) -> list[Name]:
    return [(name.kind, name.key) for name in names if name.kind in (Kind.WIREGUARD_PEER, Kind.CREDENTIAL)]
