"""From a node's cumulative counters to a connection's traffic, so that no restart changes the sum."""

from __future__ import annotations

from dataclasses import dataclass

MAX_COUNT = 2**63 - 1  # what a column holds; a sum stays there
GRACE_SECONDS = 10.0  # reports may be held up and then come close together


@dataclass(frozen=True, slots=True)
class Counters:
    """`last_*` are as the node said them in `generation`; `rx` and `tx` are the connection's bytes in all."""

    generation: str | None
    last_rx: int
    last_tx: int
    rx: int
    tx: int

    def baseline(self) -> Counters:
        """Where the next connection of the same peer starts: what the node has counted so far is not its traffic."""
        return Counters(self.generation, self.last_rx, self.last_tx, 0, 0)


def count(before: Counters, generation: str, rx: int, tx: int) -> Counters:
    """Add what is new. An interface or a peer that was made anew counts from 0, so all of it is new then."""
    restarted = generation != before.generation or rx < before.last_rx or tx < before.last_tx
    new_rx = rx if restarted else rx - before.last_rx
    new_tx = tx if restarted else tx - before.last_tx
    return Counters(generation, rx, tx, min(before.rx + new_rx, MAX_COUNT), min(before.tx + new_tx, MAX_COUNT))


def plausible(before: Counters, after: Counters, seconds: float, max_bytes_per_second: int) -> bool:
    """Whether a link can have carried that much in the time since the last count."""
    possible = max_bytes_per_second * (max(seconds, 0.0) + GRACE_SECONDS)
    return max(after.rx - before.rx, after.tx - before.tx) <= possible
