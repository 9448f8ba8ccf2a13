"""Snapshots come in parts and count when the last part is here, in order and of one revision: pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.protocol import Resource, Snapshot

_MAX_RESOURCES = 1 << 20  # as many peers as an interface can have


class BrokenSnapshot(ValueError):
    """A part is missing or belongs to another snapshot."""


@dataclass(slots=True)
class _Partial:
    epoch: str
    revision: int
    parts: int = 0
    resources: list[Resource] = field(default_factory=list)


class Staging:
    def __init__(self) -> None:
        self._partial: dict[str, _Partial] = {}

    def take(self, frame: Snapshot) -> list[Resource] | None:
        """Return all resources with the last part, None before; raise BrokenSnapshot and forget what came."""
        if frame.part == 0:
            self._partial[frame.scope] = _Partial(frame.epoch, frame.revision)
        partial = self._partial.get(frame.scope)
        if partial is None or (partial.epoch, partial.revision, partial.parts) != (
            frame.epoch,
            frame.revision,
            frame.part,
        ):
            self._partial.pop(frame.scope, None)
            raise BrokenSnapshot(f"part {frame.part} of revision {frame.revision} does not follow what came before")
        partial.parts += 1
        partial.resources += frame.resources
        if len(partial.resources) > _MAX_RESOURCES:
            del self._partial[frame.scope]
            raise BrokenSnapshot(f"a scope has at most {_MAX_RESOURCES} resources")
        if not frame.last:
            return None
        return self._partial.pop(frame.scope).resources

    def clear(self) -> None:
        self._partial.clear()
