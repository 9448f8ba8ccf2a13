"""Counts events per key in sliding windows, in this process, in bounded memory."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from dataclasses import dataclass

from limits import RateLimitItemPerSecond
from limits.aio.storage import Storage
from limits.aio.storage.base import SlidingWindowCounterSupport
from limits.aio.strategies import SlidingWindowCounterRateLimiter

_MAX_KEYS = 200_000


class WindowStorage(Storage, SlidingWindowCounterSupport):
    """Counters for the `limits` library. Its own memory storage walks over every key at every hit, so that the
    number of callers would slow each of them down; this one forgets the keys that were counted longest ago."""

    STORAGE_SCHEME = None  # not reachable by URL

    def __init__(self, max_keys: int = _MAX_KEYS) -> None:
        super().__init__()
        self._max_keys = max_keys
        self._windows: OrderedDict[str, tuple[int, int, int]] = (
            OrderedDict()
        )  # index of the window, count, count before

    @property
    def base_exceptions(self) -> type[Exception]:
        return ValueError

    async def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        index, fraction = divmod(time.time() / expiry, 1)
        count, before = self._counts(key, int(index))
        if math.floor(before * (1 - fraction) + count) + amount > limit:
            return False
        self._put(key, (int(index), count + amount, before))
        return True

    async def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        index, fraction = divmod(time.time() / expiry, 1)
        count, before = self._counts(key, int(index))
        rest = (1 - fraction) * expiry
        return before, rest, count, rest + expiry

    async def clear_sliding_window(self, key: str, expiry: int) -> None:
        self._windows.pop(key, None)

    async def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        index = int(time.time() // expiry)
        count, before = self._counts(key, index)
        self._put(key, (index, count + amount, before))
        return count + amount

    async def get(self, key: str) -> int:
        return self._windows[key][1] if key in self._windows else 0

    async def get_expiry(self, key: str) -> float:
        return time.time()

    async def check(self) -> bool:
        return True

    async def reset(self) -> int:
        count = len(self._windows)
        self._windows.clear()
        return count

    async def clear(self, key: str) -> None:
        self._windows.pop(key, None)

    def _counts(self, key: str, index: int) -> tuple[int, int]:
        seen, count, before = self._windows.get(key, (index, 0, 0))
        if seen == index:
            return count, before
        return 0, count if seen == index - 1 else 0

    def _put(self, key: str, window: tuple[int, int, int]) -> None:
        self._windows[key] = window
        self._windows.move_to_end(key)
        if len(self._windows) > self._max_keys:
            self._windows.popitem(last=False)


@dataclass(frozen=True, slots=True)
class Budget:
    """What is left of a limit after a hit."""

    allowed: bool
    limit: int
    remaining: int
    reset_at: float  # Unix time

    @property
    def retry_after(self) -> int:
        """Whole seconds to wait, at least one."""
        return max(1, math.ceil(self.reset_at - time.time()))


class Limit:
    """`amount` events per `seconds` and key. Limits that share a storage share its bound."""

    def __init__(self, name: str, amount: int, seconds: int, storage: WindowStorage) -> None:
        self._item = RateLimitItemPerSecond(amount, seconds, namespace=name)
        self._limiter = SlidingWindowCounterRateLimiter(storage)

    async def hit(self, key: str) -> bool:
        """Count one event; False, and nothing counted, where that is too many."""
        return await self._limiter.hit(self._item, key)

    async def budget(self, key: str, allowed: bool) -> Budget:
        reset_at, remaining = await self._limiter.get_window_stats(self._item, key)
        return Budget(allowed, self._item.amount, remaining, reset_at)

    async def clear(self, key: str) -> None:
        await self._limiter.clear(self._item, key)
