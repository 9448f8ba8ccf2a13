"""The protocol state of one node's session: pure; what came in changes it, and it says what has to go out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from controller.fleet.servers import PROTOCOLS
from shared.protocol import PROTOCOL_VERSION, Applied, Hello, Refused, Resync, Welcome
from shared.resource import Kind, Protocol

REPAIR_INTERVAL = 60.0  # seconds between two snapshots of a scope that mismatches or refusals cause
_RESYNC_BURST = 10  # snapshots in that time that the node may ask for itself
_BOOT_ID = re.compile(r"[0-9A-Za-z-]{1,64}")
_LEDGER = re.compile(r"[0-9A-Za-z-]{0,64}")


class ProtocolViolation(Exception):
    """The node said what no node of ours says; the text is for its Bye."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a scope has to be sent: the changes after `base`, or (None) the whole."""

    scope: str
    base: int | None
    confirmed: bool = False


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """What an `Applied` means."""

    scope: str
    revision: int
    seconds: tuple[float, ...]  # from each push's commit until now
    mismatch: bool  # the host has something else than this revision
    problem: str | None
    servers: Mapping[Protocol, str] = field(default_factory=dict)  # what ails which protocol, in the node's own scope


@dataclass(slots=True)
class _Scope:
    sent: int | None = None  # the revision that the node will be at; None = only a snapshot helps
    digest: bytes = b""  # of `sent`
    due: bool = True
    announced: bool = False  # told in this session, even if nothing changed: the answer proves what the host has
    held: int | None = None  # the revision of the snapshot that the node refused
    confirmed: bool = False  # an operator allowed what it refused
    repaired_at: float = float("-inf")
    resyncs: list[float] = field(default_factory=list)
    changed_at: float | None = None  # of the first change that was not sent yet
    in_flight: list[tuple[int, float]] = field(default_factory=list)  # (revision, changed_at)


class Session:
    def __init__(self, node_id: str, epoch: str, scopes: Sequence[str]) -> None:
        self.node_id = node_id
        self.epoch = epoch
        self._scopes = {scope: _Scope() for scope in scopes}
        self.greeted = False

    @property
    def scopes(self) -> tuple[str, ...]:
        return tuple(self._scopes)

    def check(self, hello: Hello) -> None:
        if self.greeted:
            raise ProtocolViolation("hello was sent twice")
        if hello.version < PROTOCOL_VERSION - 1:
            raise ProtocolViolation(f"protocol version {hello.version} is too old, update the agent")
        if not _BOOT_ID.fullmatch(hello.boot_id):
            raise ProtocolViolation("the boot id is not 1 to 64 letters, digits or -")
        if not _LEDGER.fullmatch(hello.ledger):
            raise ProtocolViolation("the ledger is not at most 64 letters, digits or -")

    def hello(self, hello: Hello, confirmed: Sequence[str] = ()) -> Welcome:
        """Open the session; from now on something may be wanted. In `confirmed` scopes an operator has allowed what
        the node refused before."""
        self.greeted = True
        for name, scope in self._scopes.items():
            scope.confirmed = name in confirmed
            if hello.epoch == self.epoch and not scope.confirmed:
                scope.sent = hello.revisions.get(name)
        return Welcome(
            version=min(PROTOCOL_VERSION, hello.version),
            epoch=self.epoch,
            node_id=self.node_id,
            scopes=list(self._scopes),
        )

    def poke(self, scope: str, now: float) -> None:
        """The scope changed."""
        state = self._scopes[scope]
        state.due = True
        if state.changed_at is None:
            state.changed_at = now

    def compare(self, scope: str, revision: int, now: float) -> bool:
        """Note the revision that the database has; return whether something has to be sent."""
        state = self._scopes[scope]
        if state.held is not None and revision != state.held and now - state.repaired_at >= REPAIR_INTERVAL:
            state.held = None  # the rows changed since: perhaps somebody repaired them
        state.due = state.due or state.sent != revision
        if state.sent is not None and state.sent < revision and state.changed_at is None:
            state.changed_at = now  # its poke is lost, or comes only when this is sent already
        return state.due and state.held is None

    def confirm(self, scope: str, revision: int) -> bool:
        """An operator allows what the node refused; return whether that was held back, and nothing else is by now."""
        state = self._scopes.get(scope)  # the refusal may be from before the node gave the scope up
        if state is None or state.held != revision:
            return False
        state.held, state.confirmed, state.due = None, True, True
        return True

    def wanted(self) -> Wanted | None:
        """The next scope that has to be sent something; it counts as done, unless a poke comes in between."""
        if not self.greeted:
            return None
        for name, state in self._scopes.items():
            if state.due and state.held is None:
                state.due = False
                return Wanted(name, state.sent, state.confirmed)
        return None

    def postpone(self, scope: str) -> None:
        """What was wanted could not be read."""
        self._scopes[scope].due = True

    def pushing(self, wanted: Wanted, revision: int, digest: bytes) -> bool:
        """About to send what was wanted, up to this revision; return False where the node has it and was told so, and
        where it has asked for another thing, or refused this one, or its operator confirmed it, while it was read."""
        state = self._scopes[wanted.scope]
        confirmed_since = wanted.base is None and state.confirmed and not wanted.confirmed
        if state.sent != wanted.base or state.held is not None or confirmed_since:
            return False
        changed_at, state.changed_at = state.changed_at, None
        if state.announced and state.sent == revision:
            return False
        state.sent, state.digest, state.announced = revision, digest, True
        if changed_at is not None:
            state.in_flight.append((revision, changed_at))
        return True

    def applied(self, frame: Applied, now: float) -> Acknowledged | None:
        """Return None for an answer from before what this session has sent, or is about to send as a whole."""
        state = self._own(frame.scope)
        if not state.announced or state.sent is None:
            return None
        if frame.revision > state.sent:
            raise ProtocolViolation(f"revision {frame.revision} of {frame.scope!r} was acknowledged but never sent")
        landed = tuple(now - since for revision, since in state.in_flight if revision <= frame.revision)
        state.in_flight = [entry for entry in state.in_flight if entry[0] > frame.revision]
        current = frame.revision == state.sent
        if current:
            state.confirmed = False
        problem = None
        if frame.failures:
            first = frame.failures[0]
            problem = f"{len(frame.failures)} not applied; {first.kind} {first.key}: {first.message}"
        mismatch = current and not frame.failures and frame.digest != state.digest
        if mismatch and now - state.repaired_at >= REPAIR_INTERVAL:
            state.repaired_at = now
            state.sent, state.due = None, True
        servers = {
            PROTOCOLS[Kind(failure.kind)]: failure.message for failure in frame.failures if failure.kind in PROTOCOLS
        }
        return Acknowledged(frame.scope, frame.revision, landed, mismatch, problem, servers)

    def refused(self, frame: Refused, now: float) -> None:
        """The node keeps what it has: wait for an operator, or offer again later when the rows have changed."""
        state = self._own(frame.scope)
        state.held, state.confirmed, state.repaired_at = frame.revision, False, now
        state.sent, state.due, state.in_flight = None, True, []

    def resync(self, frame: Resync, now: float) -> None:
        state = self._own(frame.scope)
        state.resyncs = [*(at for at in state.resyncs if now - at < REPAIR_INTERVAL), now]
        if len(state.resyncs) > _RESYNC_BURST:
            raise ProtocolViolation(f"more than {_RESYNC_BURST} snapshots of {frame.scope!r} within a minute")
        state.sent, state.due = None, True

    def owns(self, scope: str) -> bool:
        return scope in self._scopes

    def _own(self, scope: str) -> _Scope:
        state = self._scopes.get(scope)
        if state is None:
            raise ProtocolViolation(f"the scope {scope!r} is not one of this node's")
        return state
