from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.sessions import SILENCE, Session, advance
from shared.protocol import PeerStats

NOW = 1_800_000_000


def reading(handshake: int, rx: int = 0, tx: int = 0) -> PeerStats:
    return PeerStats(b"k" * 32, rx, tx, handshake)


def test_handshake_begins_a_session() -> None:
    assert advance(None, reading(NOW - 3, 10, 20), NOW) == Session(NOW - 3, NOW - 3, 10, 20)


def test_without_a_fresh_handshake_there_is_none() -> None:
    assert advance(None, reading(0, 10), NOW) is None
    assert advance(None, reading(NOW - SILENCE), NOW) is None


def test_new_handshakes_and_traffic_carry_it_on() -> None:
    session = advance(None, reading(NOW, 1), NOW)
    assert (renewed := advance(session, reading(NOW + 120, 1), NOW + 121)) is not None
    assert (renewed.since, renewed.alive) == (NOW, NOW + 120)
    assert (moved := advance(session, reading(NOW, 2), NOW + 170)) is not None
    assert (moved.since, moved.alive) == (NOW, NOW + 170)


def test_silence_ends_it_at_the_second() -> None:
    session = advance(None, reading(NOW), NOW)
    assert advance(session, reading(NOW), NOW + SILENCE - 1) is not None
    assert advance(session, reading(NOW), NOW + SILENCE) is None


def test_clock_that_was_set_back_does_not_keep_a_session_for_ever() -> None:
    session = advance(None, reading(NOW), NOW)
    earlier = NOW - 100_000
    session = advance(session, reading(NOW), earlier)
    assert session is not None
    assert session.alive <= earlier


@given(st.lists(st.tuples(st.integers(1, 400), st.integers(0, 400), st.integers(0, 5)), max_size=20))
def test_session_never_begins_after_it_was_alive(readings: list[tuple[int, int, int]]) -> None:
    session, now, rx = None, NOW, 0
    for step, age, more in readings:
        now, rx = now + step, rx + more
        session = advance(session, reading(now - age, rx), now)
        assert session is None or (session.since <= session.alive <= now and now - session.alive < SILENCE)
