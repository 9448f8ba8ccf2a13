"""Counts events per key in sliding windows, in this process, in bounded memory."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from dataclasses import dataclass

_MAX_KEYS = 200_000


class WindowStorage:
    """Counters of several limits; the keys that were counted longest ago are forgotten first."""

    def __init__(self, max_keys: int = _MAX_KEYS) -> None:
        self._max_keys = max_keys
        # index of the window, count, count before
        self._windows: OrderedDict[str, tuple[int, int, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._windows)

    def counts(self, key: str, index: int) -> tuple[int, int]:
        """In the window of that index, and in the one before."""
        seen, count, before = self._windows.get(key, (index, 0, 0))
        if seen == index:
            return count, before
        return 0, count if seen == index - 1 else 0

    def put(self, key: str, index: int, count: int, before: int) -> None:
        self._windows[key] = index, count, before
        self._windows.move_to_end(key)
        if len(self._windows) > self._max_keys:
            self._windows.popitem(last=False)

    def forget(self, key: str) -> None:
        self._windows.pop(key, None)


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
    """`amount` events per `seconds` and key: those of this window, and of the last one as far as it still reaches into
    the sliding one. Limits that share a storage share its bound."""

    def __init__(self, name: str, amount: int, seconds: int, storage: WindowStorage) -> None:
        self._prefix = f"{name}/"
        self._amount = amount
        self._seconds = seconds
        self._storage = storage

    def hit(self, key: str) -> bool:
        """Count one event; False, and nothing counted, where that is too many."""
        key = self._prefix + key
        windows = time.time() / self._seconds
        index = int(windows)
        count, before = self._storage.counts(key, index)
        if math.floor(before * (1 - (windows - index)) + count) >= self._amount:
            return False
        self._storage.put(key, index, count + 1, before)
        return True

    def budget(self, key: str, allowed: bool) -> Budget:
        now = time.time()
        index = int(now / self._seconds)
        count, before = self._storage.counts(self._prefix + key, index)
        rest = (index + 1) * self._seconds - now
        remaining = max(0, self._amount - math.floor(before * rest / self._seconds + count))
        # The next event becomes possible when this window ends, or when one more of the last window's has left.
        waits = [rest] if count else []
        if before:
            waits.append(rest % (self._seconds / before))
        return Budget(allowed, self._amount, remaining, now + min(waits, default=0))

    def clear(self, key: str) -> None:
        self._storage.forget(self._prefix + key)
