"""Sliding windows: exact at the edge, and flat in memory."""

from __future__ import annotations

import pytest

from controller import ratelimit
from controller.ratelimit import Limit, WindowStorage


class Clock:
    def __init__(self) -> None:
        self.now = 600_000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(ratelimit, "time", clock)
    return clock


def test_the_window_slides(clock: Clock) -> None:
    limit = Limit("test", 10, 60, WindowStorage())
    assert [limit.hit("a") for _ in range(11)] == [True] * 10 + [False]
    assert limit.hit("b")
    clock.now += 60  # the next window: all ten of the last one still count
    assert not limit.hit("a")
    clock.now += 30  # half of it
    assert [limit.hit("a") for _ in range(6)] == [True] * 5 + [False]
    clock.now += 120
    assert [limit.hit("a") for _ in range(11)] == [True] * 10 + [False]


def test_clearing_gives_the_whole_limit_back(clock: Clock) -> None:
    limit = Limit("test", 2, 60, WindowStorage())
    assert [limit.hit("a") for _ in range(3)] == [True, True, False]
    limit.clear("a")
    assert limit.hit("a")


def test_memory_is_bounded_and_the_busiest_are_not_forgotten(clock: Clock) -> None:
    storage = WindowStorage(max_keys=100)
    limit = Limit("test", 5, 60, storage)
    for _ in range(5):
        assert limit.hit("busy")
    for number in range(1000):
        limit.hit(f"passer-by {number}")
        if number % 50 == 0:
            limit.hit("busy")
    assert len(storage) == 100
