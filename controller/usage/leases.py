"""How a quota is shared out among nodes, so that they can enforce it alone. Pure.

Every node counts by itself. What it may use beyond its count is taken from what is left of the quota at once, so all
nodes together never use more than the quota; and nodes that hold no lease yet, more than one slice besides.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MOST = 256 * 2**20  # bytes of one slice
_SHARES = 10  # a slice is at most this part of the quota
_STEPS = 16  # the smallest grant near the end of the quota is this part of a slice


@dataclass(frozen=True, slots=True)
class Held:
    """One node's lease: bytes by the node's own count."""

    allowance: int
    used: int

    @property
    def outstanding(self) -> int:
        """What the node may still use without asking."""
        return max(self.allowance - self.used, 0)


def slice_bytes(quota: int, most: int = MOST) -> int:
    """The most that one node is given at a time."""
    return max(min(quota // _SHARES, most), 1)


def opening(quota: int, used: int, nodes: int, most: int = MOST) -> int:
    """What each of so many nodes may let an account use before it holds a lease."""
    return min(slice_bytes(quota, most), max(quota - used, 0)) // max(nodes, 1)


def renewed(quota: int, used: int, lease: Held, others: Iterable[Held], most: int = MOST) -> int:
    """The allowance that the node is to have now; the one it has, where there is no need or nothing is left.

    A node asks by using half of what it has. Near the end it is given half of what is free, so that the others find
    something too, and the last crumb whole.
    """
    full = slice_bytes(quota, most)
    if 2 * lease.outstanding > full:
        return lease.allowance
    free = quota - used - lease.outstanding - sum(other.outstanding for other in others)
    if free <= 0:
        return lease.allowance
    step = max(full // _STEPS, 1)
    return lease.used + lease.outstanding + min(full - lease.outstanding, max(free // 2, step), free)
