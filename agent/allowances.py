"""How much metered accounts have used on this node, and which of them have used up what they may: pure.

`used` never falls while the ledger lives. A source of bytes (a peer, a session) is a cumulative counter; what it has
counted since the look before is added, and a counter that fell began anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from shared.access import Lease
from shared.desired import Peer
from shared.protocol import AccountUsage, PeerStats

_SHORTEST = 0.2  # seconds between two looks, however fast an allowance shrinks
_SAMPLE_SECONDS = 0.1  # two readings this close say nothing about the speed


@dataclass(slots=True)
class Meters:
    """What a reading of peers has changed, for the disk."""

    used: dict[int, int] = field(default_factory=dict)  # account -> all that it has used
    meters: dict[bytes, tuple[str, int]] = field(default_factory=dict)
    gone: list[bytes] = field(default_factory=list)


class Allowances:
    """`patience` seconds after its last byte an account counts as spent: so long the kernel holds its traffic back and
    its sessions wait for a larger lease, which is under way as long as there is something left of the quota."""

    def __init__(
        self,
        ledger: str = "",
        used: Mapping[int, int] | None = None,
        meters: Mapping[bytes, tuple[str, int]] | None = None,
        *,
        fresh: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ledger = ledger
        self.used = dict(used or {})
        self.spent: set[int] = set()
        self.granted: dict[int, int] = {}  # metered account -> the bytes up to which it may use this node
        self.patience = 0.0
        self._over: dict[int, float] = {}  # accounts that wait for a larger allowance -> since when
        self._meters = dict(meters or {})  # of metered peers: the generation and rx + tx at the last reading
        self._fresh = fresh  # the ledger has just begun: what peers had counted before is nobody's use
        self._clock = clock
        self._reported: dict[int, int] = {}
        self._samples: dict[int, tuple[float, int]] = {}  # account -> when it had used so much
        self._speeds: dict[int, float] = {}  # bytes per second

    # --- counting ---

    def add(self, used: Mapping[int, int]) -> dict[int, int]:
        """Count what sessions have moved; return the sums of these accounts."""
        for account, count in used.items():
            self.used[account] = self.used.get(account, 0) + count
        return {account: self.used[account] for account in used}

    def read(
        self,
        stats: Iterable[PeerStats],
        peers: Mapping[bytes, Peer],
        generation: str,
        *,
        earlier: Mapping[bytes, PeerStats] | None = None,
        whole: bool = True,
    ) -> Meters:
        """Count what metered peers have moved. `whole` = these are all peers that the host has.

        `earlier` is the reading before: who was there and not metered begins with what he had.
        """
        there = earlier or {}
        changed, seen = Meters(), set[bytes]()
        for peer in stats:
            wanted = peers.get(peer.public_key)
            if wanted is None or wanted.limits is None or not wanted.limits.metered or not wanted.account:
                continue
            key, count = peer.public_key, peer.rx + peer.tx
            seen.add(key)
            before = self._meters.get(key)
            if before == (generation, count):
                continue
            if before is None:
                old = there.get(key)
                moved = 0 if self._fresh else count if old is None else max(count - old.rx - old.tx, 0)
            elif before[0] == generation and count >= before[1]:
                moved = count - before[1]
            else:
                moved = count
            self._meters[key] = changed.meters[key] = (generation, count)
            if moved:
                self.used[wanted.account] = self.used.get(wanted.account, 0) + moved
                changed.used[wanted.account] = self.used[wanted.account]
        if whole:
            self._fresh = False
            changed.gone = [key for key in self._meters if key not in seen]
            for key in changed.gone:
                del self._meters[key]
        return changed

    def forget(self, keys: Iterable[bytes]) -> list[bytes]:
        """These peers leave the host: a later one of the same key begins at 0."""
        return [key for key in keys if self._meters.pop(key, None) is not None]

    # --- judging ---

    def judge(
        self, metered: Mapping[int, int], leases: Mapping[int, Lease], accounts: Collection[int] | None = None
    ) -> tuple[set[int], set[int]]:
        """Set `granted` and `spent` of these accounts (None = of all); return who has joined the spent ones, and who
        has left them. `metered` has the bytes that each account may use without a lease."""
        if accounts is None:
            accounts = metered.keys() | self.spent
            self.granted = {account: allowed for account, allowed in self.granted.items() if account in metered}
        joined, left, gone, now = set[int](), set[int](), set[int](), self._clock()
        for account in accounts:
            if account not in metered:
                gone.add(account)
                self.granted.pop(account, None)
                if account in self.spent:
                    left.add(account)
                continue
            lease = leases.get(account)
            valid = lease is not None and bool(self.ledger) and lease.ledger == self.ledger
            allowed = lease.allowance if lease is not None and valid else metered[account]
            self.granted[account] = allowed
            if self.used.get(account, 0) < allowed:
                self._over.pop(account, None)
                if account in self.spent:
                    left.add(account)
            elif account not in self.spent:
                since = self._over.setdefault(account, now)
                if not self.patience or not self.used.get(account) or now - since >= self.patience:
                    joined.add(account)
        self.spent |= joined
        self.spent -= left
        self._over = {account: since for account, since in self._over.items() if account not in self.spent | gone}
        return joined, left

    @property
    def waiting(self) -> Collection[int]:
        """The accounts that have used up what they may and are not spent yet: they have to be judged again."""
        return self._over.keys()

    def remaining(self, account: int) -> int | None:
        """Bytes that a metered account may still use; None for others."""
        allowed = self.granted.get(account)
        return None if allowed is None else max(allowed - self.used.get(account, 0), 0)

    def horizon(self) -> float | None:
        """Seconds until the first account will have used up what it may at its present speed, if any moves."""
        now, first = self._clock(), None
        for account, allowed in self.granted.items():
            used = self.used.get(account, 0)
            at, before = self._samples.get(account, (now, used))
            if account not in self._samples or now - at >= _SAMPLE_SECONDS:
                self._speeds[account] = (used - before) / (now - at) if now > at else 0.0
                self._samples[account] = (now, used)
            speed = self._speeds.get(account, 0.0)
            if speed > 0 and used < allowed:
                seconds = (allowed - used) / speed
                first = seconds if first is None else min(first, seconds)
        if self._over:
            first = min(first or self.patience, self.patience)
        return None if first is None else max(first, _SHORTEST)

    # --- towards the controller ---

    def news(self) -> list[AccountUsage]:
        """The use of metered accounts that has not been reported as it is now."""
        return [
            AccountUsage(account, used)
            for account in self.granted
            if (used := self.used.get(account, 0)) != self._reported.get(account, -1)
        ]

    def sent(self, usage: Iterable[AccountUsage]) -> None:
        self._reported |= {entry.account: entry.used for entry in usage}

    def unsent(self, usage: Iterable[AccountUsage] | None = None) -> None:
        """The report of these (None = of any) has no answer: it is sent again."""
        if usage is None:
            self._reported.clear()
        else:
            for entry in usage:
                self._reported.pop(entry.account, None)
