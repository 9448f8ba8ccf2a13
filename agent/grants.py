"""The numbers under which the kernel counts allowances; a new one has it begin anew with what remains: pure.

The kernel also counts what is not the account's in the end (packets that are sent again, or that it drops, and what
sshd had read for a client who then hung up), so its count may be through long before the agent's. Who then stands still
with a rest gets that rest again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from agent.allowances import Allowances

_STALLED_SECONDS = 2.0


@dataclass(slots=True)
class _Grant:
    number: int
    allowed: int
    remaining: int  # when it was given
    seen: int  # what remained at the last look
    since: float  # and since when


class Grants:
    def __init__(self, allowances: Allowances, clock: Callable[[], float] = time.monotonic) -> None:
        self._allowances, self._clock = allowances, clock
        self._grants: dict[int, _Grant] = {}
        self._last = 0

    def number(self, account: int) -> int:
        """0 for an account that is not metered."""
        remaining = self._allowances.remaining(account)
        if remaining is None:
            self._grants.pop(account, None)
            return 0
        allowed, now = self._allowances.granted[account], self._clock()
        grant = self._grants.get(account)
        if grant is None or grant.allowed != allowed or self._stands_still(grant, remaining, now):
            self._last += 1
            grant = self._grants[account] = _Grant(self._last, allowed, remaining, remaining, now)
        elif grant.seen != remaining:
            grant.seen, grant.since = remaining, now
        return grant.number

    def _stands_still(self, grant: _Grant, remaining: int, now: float) -> bool:
        still = remaining == grant.seen and now - grant.since >= _STALLED_SECONDS
        return bool(remaining) and remaining != grant.remaining and still
