"""The sessions that live, and those whose end the controller has not acknowledged; every byte counts once: pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from agent.drivers.base import LiveSession
from shared.access import Credential
from shared.protocol import SessionStats
from shared.resource import Protocol

VANISHED = "it was gone when the node looked"
NOT_SERVED = "the node does not serve its protocol any more"

Identify = Callable[[str], Credential | None]


@dataclass(frozen=True, slots=True)
class Entry:
    """A session as it is reported, and its counters as the host showed them last: should those ever begin anew, the
    sums go on."""

    stats: SessionStats
    raw_rx: int
    raw_tx: int


@dataclass(slots=True)
class Taken:
    """What a look at one protocol's sessions has brought."""

    entries: list[Entry] = field(default_factory=list)  # that are new or have changed
    used: dict[int, int] = field(default_factory=dict)  # account -> bytes since the look before
    rx: int = 0
    tx: int = 0
    turned: bool = False  # a session began or ended


class SessionLog:
    def __init__(self, stored: Iterable[Entry] = ()) -> None:
        self._entries = {entry.stats.id: entry for entry in stored}
        self._reported: dict[str, SessionStats] = {}
        self._alive = Counter(entry.stats.account for entry in self._entries.values() if not entry.stats.ended)

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, session_id: str) -> SessionStats | None:
        entry = self._entries.get(session_id)
        return entry.stats if entry is not None else None

    def count(self, account: int) -> int:
        """How many sessions of the account live, over all protocols."""
        return self._alive[account]

    def live(self, protocol: Protocol | None = None) -> list[SessionStats]:
        return [
            entry.stats
            for entry in self._entries.values()
            if not entry.stats.ended and protocol in (None, entry.stats.protocol)
        ]

    def take(
        self, protocol: Protocol, observed: Sequence[LiveSession], identify: Identify, now: float, *, old: bool = False
    ) -> Taken:
        """Take in what the host shows of a protocol. With `old` the records have just begun: what sessions have moved
        before is nobody's use."""
        taken = Taken()
        seen: set[str] = set()
        for session in observed:
            seen.add(session.id)
            before = self._entries.get(session.id)
            if before is not None and before.stats.ended:
                continue
            entry = _entry(protocol, session, before, identify)
            if entry != before:
                self._put(entry, before, taken, counted=before is not None or not old)
        for stats in self.live(protocol):
            if stats.id not in seen:
                before = self._entries[stats.id]
                ended = replace(stats, ended=max(int(now), stats.since), reason=VANISHED)
                self._put(Entry(ended, before.raw_rx, before.raw_tx), before, taken)
        return taken

    def abandon(self, served: Collection[Protocol], now: float) -> list[Entry]:
        """End the sessions of protocols that this host serves no more: nobody will ever say how they went."""
        taken = Taken()
        for stats in self.live():
            if stats.protocol not in served:
                before = self._entries[stats.id]
                ended = replace(stats, ended=max(int(now), stats.since), reason=NOT_SERVED)
                self._put(Entry(ended, before.raw_rx, before.raw_tx), before, taken)
        return taken.entries

    # --- towards the controller ---

    def news(self, *, complete: bool = False) -> list[SessionStats]:
        """What has not been reported as it is now; with `complete` every live one, too."""
        return [
            entry.stats
            for entry in self._entries.values()
            if (complete and not entry.stats.ended) or self._reported.get(entry.stats.id) is not entry.stats
        ]

    def sent(self, sessions: Iterable[SessionStats]) -> None:
        for stats in sessions:
            self._reported[stats.id] = stats

    def unsent(self, sessions: Iterable[SessionStats]) -> None:
        """The report of these has no answer: it is sent again."""
        for stats in sessions:
            self._reported.pop(stats.id, None)

    def acknowledged(self, sessions: Iterable[SessionStats]) -> list[str]:
        """The controller has stored these; return those that are over and done with."""
        done = [stats.id for stats in sessions if stats.ended and stats.id in self._entries]
        for session_id in done:
            del self._entries[session_id]
            self._reported.pop(session_id, None)
        return done

    def _put(self, entry: Entry, before: Entry | None, taken: Taken, *, counted: bool = True) -> None:
        stats = entry.stats
        self._entries[stats.id] = entry
        if before is not None:
            self._alive[before.stats.account] -= 1  # one that has ended does not change any more
        if not stats.ended:
            self._alive[stats.account] += 1
        taken.entries.append(entry)
        taken.turned = taken.turned or before is None or bool(stats.ended)
        rx = stats.rx - (before.stats.rx if before is not None else 0)
        tx = stats.tx - (before.stats.tx if before is not None else 0)
        taken.rx, taken.tx = taken.rx + rx, taken.tx + tx
        if counted and rx + tx and stats.account:
            taken.used[stats.account] = taken.used.get(stats.account, 0) + rx + tx


def _entry(protocol: Protocol, session: LiveSession, before: Entry | None, identify: Identify) -> Entry:
    rx, tx = max(session.rx, 0), max(session.tx, 0)
    whole_rx, whole_tx = rx, tx
    if before is not None:
        whole_rx = before.stats.rx + (rx - before.raw_rx if rx >= before.raw_rx else rx)
        whole_tx = before.stats.tx + (tx - before.raw_tx if tx >= before.raw_tx else tx)
    account, connection = (before.stats.account, before.stats.connection) if before is not None else (0, "")
    if not account and (credential := identify(session.username)) is not None:
        account, connection = credential.account, credential.connection
    stats = SessionStats(
        id=session.id,
        protocol=str(protocol),
        account=account,
        username=session.username[:_MAX_NAME],
        connection=connection,
        remote=session.remote[:_MAX_NAME],
        address=session.address[:_MAX_NAME],
        since=max(session.since, 0),
        rx=whole_rx,
        tx=whole_tx,
        ended=max(session.ended, 0),
        reason=session.reason[:_MAX_NAME],
    )
    if before is not None and stats == before.stats:
        stats = before.stats  # the same object: nothing to report
    return Entry(stats, rx, tx)


_MAX_NAME = 255  # shared.protocol.Name
