"""What a scope's nodes are sent: as its commit told it or read in one query, encoded once for all who lack the same."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from sqlalchemy.ext.asyncio import AsyncConnection

from controller.channel.session import Wanted
from controller.desired import service as desired
from controller.desired.service import Changes, State
from controller.store.database import Database
from shared.protocol import MAX_FRAME_BYTES, SNAPSHOT_CHUNK, Delta, Resource, ResourceName, Snapshot, encode


@dataclass(frozen=True, slots=True)
class Push:
    revision: int
    digest: bytes
    frames: tuple[bytes, ...]


@dataclass(slots=True)
class _Scope:
    """What is known of one scope, valid until the next poke."""

    latest: Changes | None = None  # as its transaction told it
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    generation: int = 0
    ready: dict[tuple[int | None, bool], Push] = field(default_factory=dict)


class Pushes:
    def __init__(self, database: Database, epoch: str) -> None:
        self._database = database
        self._epoch = epoch
        self._scopes: dict[str, _Scope] = {}

    def changed(self, scope: str, told: Sequence[Changes] = ()) -> None:
        """The scope changed; `told` is what one transaction said of it, in order."""
        state = self._scopes.setdefault(scope, _Scope())
        state.generation += 1
        state.ready.clear()
        small = sum(len(change.upserts) + len(change.removals) for change in told) <= SNAPSHOT_CHUNK
        state.latest = merge(told) if told and small else None

    def forget(self, scope: str) -> None:
        """Nobody listens to the scope any more."""
        self._scopes.pop(scope, None)

    def known(self, wanted: Wanted) -> Push | None:
        """The answer where nothing has to be read for it. The common case: the latest change is what the node lacks."""
        state = self._scopes.setdefault(wanted.scope, _Scope())
        key = (wanted.base, wanted.confirmed)
        push = state.ready.get(key)
        if push is None and state.latest is not None and state.latest.base == wanted.base:
            push = self._encoded(state.latest)
            if push is not None:
                state.ready[key] = push
        return push

    async def get(self, wanted: Wanted, shared: bool) -> Push:
        """The answer; with `shared` it is kept for the other nodes of the scope. Raises StoreUnavailable."""
        if (known := self.known(wanted)) is not None:
            return known
        if not shared:
            return await self._read(wanted)
        state, key = self._scopes[wanted.scope], (wanted.base, wanted.confirmed)
        async with state.turn:
            if (ready := state.ready.get(key)) is not None:
                return ready
            generation = state.generation
            push = await self._read(wanted)
            if generation == state.generation:  # else it may be older than the poke
                state.ready[key] = push
            return push

    async def _read(self, wanted: Wanted) -> Push:
        async with self._database.connect() as connection:
            return await self._delta(connection, wanted) or await self._snapshot(connection, wanted)

    async def _delta(self, connection: AsyncConnection, wanted: Wanted) -> Push | None:
        if wanted.base is None:
            return None
        changes = await desired.changes(connection, self._database.secrets, wanted.scope, wanted.base)
        return self._encoded(changes) if changes is not None else None

    def _encoded(self, changes: Changes) -> Push | None:
        """None where one frame cannot hold it."""
        frame = encode_delta(self._epoch, changes)
        return Push(changes.revision, changes.digest, (frame,)) if len(frame) <= MAX_FRAME_BYTES else None

    async def _snapshot(self, connection: AsyncConnection, wanted: Wanted) -> Push:
        state = await desired.state(connection, self._database.secrets, wanted.scope)
        return Push(state.revision, state.digest, encode_snapshot(self._epoch, state, wanted.confirmed))


def merge(changes: Sequence[Changes]) -> Changes | None:
    """Consecutive changes as one; None where they are not consecutive."""
    if any(later.base != earlier.revision for earlier, later in pairwise(changes)):
        return None
    net: dict[tuple[str, str], Resource | ResourceName] = {}
    for change in changes:
        net |= {(removal.kind, removal.key): removal for removal in change.removals}
        net |= {(upsert.kind, upsert.key): upsert for upsert in change.upserts}
    return Changes(
        changes[0].scope,
        changes[0].base,
        changes[-1].revision,
        changes[-1].digest,
        [item for item in net.values() if isinstance(item, Resource)],
        [item for item in net.values() if isinstance(item, ResourceName)],
    )


def encode_delta(epoch: str, changes: Changes) -> bytes:
    return encode(
        Delta(
            epoch=epoch,
            scope=changes.scope,
            base=changes.base,
            revision=changes.revision,
            upserts=changes.upserts,
            removals=changes.removals,
        )
    )


def encode_snapshot(epoch: str, state: State, confirmed: bool) -> tuple[bytes, ...]:
    starts = range(0, max(len(state.resources), 1), SNAPSHOT_CHUNK)  # an empty scope is one empty part
    return tuple(
        encode(
            Snapshot(
                epoch=epoch,
                scope=state.scope,
                revision=state.revision,
                part=part,
                last=part == len(starts) - 1,
                resources=state.resources[start : start + SNAPSHOT_CHUNK],
                confirmed=confirmed,
            )
        )
        for part, start in enumerate(starts)
    )
