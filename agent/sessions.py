"""Who is connected: WireGuard has no sessions, so they are inferred from handshakes and traffic. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from shared.protocol import PeerStats

SILENCE = 180  # seconds: a live tunnel shakes hands every two minutes (REJECT_AFTER_TIME of the protocol)


@dataclass(frozen=True, slots=True)
class Session:
    since: int  # Unix seconds, as the other times
    alive: int  # the latest handshake or traffic
    rx: int
    tx: int


def advance(session: Session | None, stats: PeerStats, now: float) -> Session | None:
    """The session after this reading: a fresh handshake begins one, silence ends it."""
    moment = int(now)
    handshake = min(stats.handshake, moment)  # a clock that was set back must not keep a session for ever
    if session is None:
        if not handshake or moment - handshake >= SILENCE:
            return None
        return Session(handshake, handshake, stats.rx, stats.tx)
    moved = (stats.rx, stats.tx) != (session.rx, session.tx)
    alive = max(min(session.alive, moment), handshake, moment if moved and handshake else 0)
    if moment - alive >= SILENCE:
        return None
    return Session(session.since, alive, stats.rx, stats.tx)
