"""Takes desired state in from the controller: stored first, guarded, then done."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from agent.answers import Answers
from agent.changes import Changes
from agent.convergence import Convergence
from agent.counters import Counters
from agent.desired import IMPORTED, Desired, Scope, scope_of
from agent.logins import Name
from agent.snapshots import Staging
from agent.state import State, StateError, Stored
from shared.desired import Kind
from shared.protocol import PROTOCOL_VERSION, Delta, ResourceName, Snapshot, Welcome

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Guard:
    """How much of its peers and logins a node lets a snapshot remove without the operator's confirmation."""

    share: float = 0.5
    minimum: int = 10

    def refuses(self, removes: int, present: int) -> bool:
        return removes >= self.minimum and removes > self.share * present


class Intake:
    """`epoch` is that of the stored state. The caller sees to it that its methods never overlap."""

    def __init__(
        self,
        state: State,
        changes: Changes,
        convergence: Convergence,
        answers: Answers,
        guard: Guard,
        counters: Counters,
        clock: Callable[[], float],
    ) -> None:
        self.epoch = ""
        self._state, self._changes, self._convergence, self._answers = state, changes, convergence, answers
        self._guard, self._counters, self._clock = guard, counters, clock
        self._session = Welcome(version=PROTOCOL_VERSION, epoch="", node_id="", scopes=[])
        self._staging = Staging()

    async def restore(self) -> bool:
        """Make the host serve what the disk knows; return whether that is all that was there."""
        try:
            stored = await self._state.open()
        except StateError as error:
            self._counters.store_errors += 1
            log.error("state_unavailable", error=str(error))
            stored = Stored()
        self._convergence.prune = stored.trusted
        self.epoch = stored.epoch if stored.trusted else ""
        scopes = {
            name: scope_of(kept.epoch if stored.trusted else "", kept.revision, kept.resources)
            for name, kept in stored.scopes.items()
        }
        await self._changes.become(self._changes.state(scopes))
        return stored.trusted

    def revisions(self) -> dict[str, int]:
        """What of this epoch is here, by scope."""
        return {
            name: scope.revision
            for name, scope in self._changes.desired.scopes.items()
            if name != IMPORTED and self.epoch and scope.epoch == self.epoch
        }

    async def take(self, frame: Welcome | Delta | Snapshot) -> None:
        match frame:
            case Welcome():
                await self._welcome(frame)
            case Delta():
                await self._delta(frame)
            case Snapshot():
                await self._snapshot(frame)

    async def _welcome(self, frame: Welcome) -> None:
        self._session = frame
        self._staging.clear()
        self._answers.forget_resyncs()
        if self.epoch and frame.epoch != self.epoch:
            log.warning("epoch_changed", stored=self.epoch, controller=frame.epoch)
        gone = [name for name in self._changes.desired.scopes if name not in frame.scopes and name != IMPORTED]
        if gone:
            await self._drop(gone)
        for name, scope in self._changes.desired.scopes.items():
            if name in frame.scopes and scope.epoch == frame.epoch == self.epoch:
                self._answers.answer(name)

    async def _drop(self, names: list[str]) -> None:
        smaller = self._changes.desired.without(names, self._clock())
        removes, present = await self._convergence.impact(smaller, prune=self._convergence.prune)
        if self._guard.refuses(removes, present):
            for name in names:
                words = "the controller no longer names this scope"
                self._answers.refuse(name, self._changes.desired.scopes[name].revision, words, removes, present)
            return
        if await self._stored(self._state.drop(names)):
            log.info("scopes_dropped", scopes=names, removes=removes)
            await self._changes.become(smaller)
        else:
            for name in names:
                await self._revoke(name, _lost(self._changes.desired.scopes[name]))

    async def _delta(self, frame: Delta) -> None:
        scope = self._changes.desired.scopes.get(frame.scope)
        if frame.scope == IMPORTED or scope is None or scope.epoch != frame.epoch or frame.epoch != self.epoch:
            self._answers.resync(frame.scope, "the node has no state of this scope in this epoch")
            return
        if frame.revision <= scope.revision:
            self._answers.answer(frame.scope)  # a replay: it is here already
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
            await self._changes.become(self._changes.state(self._changes.desired.scopes))
            self._answers.answer(frame.scope)
            return
        change = self._changes.desired.change(frame.scope, frame.upserts, removals, self._clock())
        if change.accounts:
            change.then(self._changes.judge(self._changes.desired, change.accounts))
        await self._changes.do(change, reason="delta", scope=frame.scope)

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
        kept = self._changes.desired.scopes.get(frame.scope)
        if kept is not None and kept.epoch == frame.epoch and frame.revision < kept.revision and not frame.confirmed:
            words = f"revision {frame.revision} is older than {kept.revision} of the same epoch, which the node has"
            self._answers.refuse(frame.scope, frame.revision, words)
            return
        scope = scope_of(frame.epoch, frame.revision, resources)
        wanted = self._changes.desired.with_scope(frame.scope, scope, self._clock())
        prune = self._convergence.prune or self._complete(wanted)
        removes, present = await self._convergence.impact(wanted, prune=prune)
        if self._guard.refuses(removes, present) and not frame.confirmed:
            words = f"the snapshot would remove {removes} of {present} peers"
            self._answers.refuse(frame.scope, frame.revision, words, removes, present)
            return
        if not await self._stored(self._state.replace(frame.scope, frame.epoch, frame.revision, resources)):
            if kept is not None:
                await self._revoke(frame.scope, _lost(kept, scope))
            self._answers.resync(frame.scope, "the node could not store the snapshot")
            return
        self._answers.synchronised(frame.scope)
        self.epoch, self._convergence.prune = frame.epoch, prune
        del resources  # or their memory would be taken while the host is read, and most of that stays with the process
        await self._changes.become(wanted)
        self._answers.answer(frame.scope)

    def _complete(self, desired: Desired) -> bool:
        """Whether every scope of this session is here; only then a peer that none of them has belongs to nobody."""
        return all(
            (scope := desired.scopes.get(name)) is not None and scope.epoch == self._session.epoch
            for name in self._session.scopes
        )

    async def _revoke(self, scope: str, names: Sequence[Name]) -> None:
        """Take off the host whose end is known but cannot be stored now: nobody revoked stays for a full disk.

        It is not acknowledged: after a restart the disk would bring them back, and the controller has to say it again.
        """
        if names and scope in self._changes.desired.scopes:
            change = self._changes.desired.change(scope, [], names, self._clock())
            await self._changes.let_go(change, scope, reason="not_stored")

    async def _stored(self, write: Awaitable[None]) -> bool:
        try:
            await write
        except StateError as error:
            self._counters.store_errors += 1
            log.error("state_not_stored", error=str(error))
            return False
        return True


def _lost(kept: Scope, scope: Scope | None = None) -> list[Name]:
    """The peers and logins that go where `scope`, or nothing, takes the place of what was kept."""
    peers = [peer.key for key, peer in kept.peers.items() if scope is None or key not in scope.peers]
    logins = [
        name for name in kept.others if name[0] == Kind.CREDENTIAL and (scope is None or name not in scope.others)
    ]
    return [*((str(Kind.WIREGUARD_PEER), key) for key in peers), *logins]


def _revocable(names: Sequence[ResourceName]) -> list[Name]:
    return [(name.kind, name.key) for name in names if name.kind in (Kind.WIREGUARD_PEER, Kind.CREDENTIAL)]
