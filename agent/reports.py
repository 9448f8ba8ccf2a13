"""What the controller has to learn of traffic and sessions: sent as it changes, again until it is acknowledged."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from agent.allowances import Allowances
from agent.ledger import Ledger
from agent.link import Outbox
from agent.sessionlog import SessionLog
from agent.state import State
from shared.protocol import AccountUsage, Load, PeerStats, Report, SessionStats

_CHUNK = 2000  # peers or sessions per report
_MOST_LIVE = 15_000  # sessions in the one report that has them all, or else there is none: it has to fit a frame
_ANSWER_SECONDS = 30


@dataclass(slots=True)
class _Sent:
    at: float
    peers: list[PeerStats] = field(default_factory=list)
    gone: list[PeerStats] = field(default_factory=list)
    sessions: list[SessionStats] = field(default_factory=list)
    usage: list[AccountUsage] = field(default_factory=list)
    complete: bool = False


class Reports:
    """`latest` has the counters of all peers at the last reading; they are cumulative, and so twice is harmless."""

    def __init__(
        self,
        *,
        state: State,
        outbox: Outbox,
        sessions: SessionLog,
        allowances: Allowances,
        ledger: Ledger,
        boot_id: str,
    ) -> None:
        self.latest: dict[bytes, PeerStats] = {}
        self.generation = ""
        self.sessions_known = False  # whether every server has been looked at since the start
        self._state, self._outbox, self._boot_id = state, outbox, boot_id
        self._sessions, self._allowances, self._ledger = sessions, allowances, ledger
        self._reported: dict[bytes, PeerStats] = {}
        self._gone: dict[bytes, PeerStats] = {}  # the last counters of peers that were removed
        self._gone_sent: set[bytes] = set()
        self._pending: dict[int, _Sent] = {}
        self._link = 0  # counts the links
        self._complete = False  # whether this link has been told every live session
        self._sending = asyncio.Lock()

    @property
    def greeting_due(self) -> bool:
        return self._outbox.connected and self.sessions_known and not self._complete

    async def send(self, load: Load | None = None) -> None:
        """Report what changed; raise StateError where no number can be had for it."""
        async with self._sending:
            if not self._outbox.connected:
                return
            self._give_up_waiting()
            link = self._link
            complete = self.sessions_known and not self._complete
            sessions = self._sessions.news(complete=complete)
            complete = complete and len(sessions) <= _MOST_LIVE
            peers = [peer for key, peer in self.latest.items() if _news(peer, self._reported.get(key))]
            usage = self._allowances.news()
            gone = [peer for key, peer in self._gone.items() if key not in self._gone_sent]
            first = _Sent(0, peers[:_CHUNK], gone[:_CHUNK], sessions[: self._first(complete)], usage, complete)
            if complete or load is not None or first.peers or first.gone or first.sessions or usage:
                await self._send(link, first, load)
            for start in range(_CHUNK, max(len(peers), len(gone)), _CHUNK):
                part = slice(start, start + _CHUNK)
                await self._send(link, _Sent(0, peers[part], gone[part]))
            for start in range(self._first(complete), len(sessions), _CHUNK):
                await self._send(link, _Sent(0, sessions=sessions[start : start + _CHUNK]))

    async def farewell(self, stats: Sequence[PeerStats]) -> None:
        """Report the last counters of peers that are removed now, before the removal is acknowledged."""
        self._gone |= {peer.public_key: peer for peer in stats if _news(peer, self._reported.get(peer.public_key))}
        for peer in stats:
            self._reported.pop(peer.public_key, None)
            self._gone_sent.discard(peer.public_key)
            self.latest.pop(peer.public_key, None)
        if self._gone:
            await self.send()

    def forget(self, key: bytes) -> None:
        """The peer is not on the host any more."""
        self._reported.pop(key, None)

    def received(self, sequence: int) -> None:
        """The controller has stored the reports up to this one."""
        over: list[str] = []
        for number in [number for number in self._pending if number <= sequence]:
            sent = self._pending.pop(number)
            for peer in sent.gone:
                if self._gone.get(peer.public_key) is peer:
                    del self._gone[peer.public_key]
                    self._gone_sent.discard(peer.public_key)
            over += self._sessions.acknowledged(sent.sessions)
        self._ledger.put(forgotten=over)

    def disconnected(self) -> None:
        """Whatever has no answer by now is sent again on the next link, which is told everything that lives."""
        for sent in self._pending.values():
            self._unsent(sent)
        self._pending.clear()
        self._allowances.unsent()
        self._link += 1
        self._complete = False

    @staticmethod
    def _first(complete: bool) -> int:
        return _MOST_LIVE if complete else _CHUNK

    async def _send(self, link: int, sent: _Sent, load: Load | None = None) -> None:
        sequence = await self._state.next_sequence()
        if link != self._link:
            return  # the link has ended meanwhile: nothing of this was told, and the next one is told all of it
        sent.at = time.monotonic()
        self._pending[sequence] = sent
        self._reported |= {peer.public_key: peer for peer in sent.peers}
        self._gone_sent.update(peer.public_key for peer in sent.gone)
        self._sessions.sent(sent.sessions)
        self._allowances.sent(sent.usage)
        self._complete = self._complete or sent.complete
        self._outbox.send(
            Report(
                sequence=sequence,
                boot_id=self._boot_id,
                generation=self.generation,
                peers=[*sent.gone, *sent.peers],
                load=load,
                sessions=sent.sessions,
                complete=sent.complete,
                usage=sent.usage,
            )
        )

    def _give_up_waiting(self) -> None:
        for sequence, sent in list(self._pending.items()):
            if time.monotonic() - sent.at > _ANSWER_SECONDS:
                del self._pending[sequence]
                self._unsent(sent)
                self._complete = self._complete and not sent.complete

    def _unsent(self, sent: _Sent) -> None:
        for peer in sent.peers:
            self._reported.pop(peer.public_key, None)
        self._gone_sent.difference_update(peer.public_key for peer in sent.gone)
        self._sessions.unsent(sent.sessions)
        self._allowances.unsent(sent.usage)


def _news(peer: PeerStats, reported: PeerStats | None) -> bool:
    if reported is None:
        return bool(peer.rx or peer.tx or peer.handshake)
    return peer is not reported and peer != reported
