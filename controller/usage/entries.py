"""Sessions in memory, and what is to be written of them together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime

Key = tuple[str, str]  # node id, session id
Place = tuple[str, str, int]  # node id, protocol, Unix seconds of the hour


@dataclass(frozen=True, slots=True)
class Session:
    """A session as the other rooms see it."""

    id: str
    node_id: str
    user_id: str
    protocol: str
    username: str  # of the login; empty for WireGuard
    connection_id: str | None
    remote: str  # host:port of the client
    address: str  # inside the tunnel, "" where that is not known
    started_at: datetime
    ended_at: datetime | None
    end_reason: str | None
    rx: int  # bytes from the client
    tx: int
    exact: bool  # False = inferred from handshakes and traffic


@dataclass(slots=True, eq=False)
class Entry:
    """A session in memory; times are Unix seconds."""

    node_id: str
    id: str
    user_id: str
    protocol: str
    username: str
    connection_id: str | None
    remote: str
    address: str
    since: int
    exact: bool
    rx: int = 0
    tx: int = 0
    ended: int = 0
    reason: str = ""
    heard: float = 0.0  # when its counters last moved
    stored: bool = False
    reopened: bool = False  # it is stored as ended
    quarantined: bool = False

    @property
    def key(self) -> Key:
        return self.node_id, self.id

    def shown(self) -> Session:
        return Session(
            self.id,
            self.node_id,
            self.user_id,
            self.protocol,
            self.username,
            self.connection_id,
            self.remote,
            self.address,
            datetime.fromtimestamp(self.since, UTC),
            datetime.fromtimestamp(self.ended, UTC) if self.ended else None,
            self.reason or None,
            self.rx,
            self.tx,
            self.exact,
        )


@dataclass(slots=True)
class Counted:
    """What a report brought: bytes by protocol, and the parts of the batch that it goes into."""

    changed: dict[str, Entry]
    moved: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)  # by protocol and user
    rx: Counter[str] = field(default_factory=Counter)
    tx: Counter[str] = field(default_factory=Counter)
    connections: list[tuple[str, int, int]] = field(default_factory=list)  # that live: id, rx, tx
    quarantined: list[Entry] = field(default_factory=list)
    news: bool = False  # a session began or ended
    refused: int = 0  # sessions of accounts that do not exist, or may not be on the node


@dataclass(slots=True)
class Batch:
    """What is to be written together."""

    sessions: dict[str, dict[str, Entry]] = field(default_factory=dict)  # by node and id
    moved: dict[Place, dict[str, tuple[int, int]]] = field(default_factory=dict)  # by user
    used: dict[tuple[str, int], int] = field(default_factory=dict)  # node id, account -> the node's own count

    def __bool__(self) -> bool:
        return bool(self.moved or self.used or any(self.sessions.values()))

    def change(self, entry: Entry) -> None:
        sessions = self.sessions.get(entry.node_id)
        if sessions is None:
            sessions = self.sessions[entry.node_id] = {}
        sessions[entry.id] = entry

    def move(self, place: Place, user_id: str, rx: int, tx: int) -> None:
        moved = self.moved.get(place)
        if moved is None:
            moved = self.moved[place] = {}
        former = moved.get(user_id)
        moved[user_id] = (rx, tx) if former is None else (former[0] + rx, former[1] + tx)

    def users(self) -> set[str]:
        """Whose sessions and bytes are in it."""
        found = {entry.user_id for sessions in self.sessions.values() for entry in sessions.values()}
        return found.union(*self.moved.values())

    def without(self, user_ids: Collection[str]) -> Batch:
        batch = Batch(used=self.used)
        for sessions in self.sessions.values():
            for entry in sessions.values():
                if entry.user_id not in user_ids:
                    batch.change(entry)
        for place, moved in self.moved.items():
            for user_id, (rx, tx) in moved.items():
                if user_id not in user_ids:
                    batch.move(place, user_id, rx, tx)
        return batch


@dataclass(frozen=True, slots=True)
class RollCall:
    """A node's first report of a link, with all of its sessions that live, and what it said since."""

    present: set[str]
