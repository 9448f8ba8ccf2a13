"""How a quota is shared out among nodes, so that they can enforce it alone. Pure.

Every node counts by itself. What it may use beyond its count is taken from what is left of the quota at once, so all
nodes together never use more than the quota; and nodes that hold no lease yet, more than one slice besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MOST = 256 * 2**20  # bytes of one slice
_SHARES = 10  # a slice is at most this part of the quota
_STEPS = 16  # the smallest grant near the end of the quota is this part of a slice


@dataclass(frozen=True, slots=True)
class Held:
    """One node's lease, in bytes by the node's own count."""

    allowance: int  # that it was told last
    used: int
    reserved: int  # the largest allowance that it may still go by

    @property
    def left(self) -> int:
        return max(self.allowance - self.used, 0)

    @property
    def outstanding(self) -> int:
        """What the node may still use, as far as we know."""
        return max(self.reserved - self.used, 0)


def slice_bytes(quota: int, most: int = MOST) -> int:
    """The most that one node is given at a time."""
    return max(min(quota // _SHARES, most), 1)


def opening(quota: int, used: int, nodes: int, most: int = MOST) -> int:
    """What each of so many nodes may let an account use before it holds a lease."""
    return min(slice_bytes(quota, most), max(quota - used, 0)) // max(nodes, 1)


def free(quota: int, used: int, held: Mapping[str, Held]) -> int:
    """What no node holds of the quota."""
    return max(quota - used - sum(lease.outstanding for lease in held.values()), 0)


def wants(quota: int, lease: Held, most: int = MOST) -> bool:
    """Whether a node that uses its lease is due for more: it has used half of it."""
    return 2 * lease.left <= slice_bytes(quota, most)


def renewed(quota: int, used: int, held: Mapping[str, Held], node_id: str, most: int = MOST) -> int:
    """The allowance that the node is to have; its own where it needs none, or none is left.

    Near the end it is given half of what is free, so that others find something too, and the last crumb whole.
    """
    lease, spare = held[node_id], free(quota, used, held)
    if spare == 0 or not wants(quota, lease, most):
        return lease.allowance
    full = slice_bytes(quota, most)
    more = min(full - lease.left, max(spare // 2, full // _STEPS, 1), spare)
    return lease.used + lease.left + more


def idle(quota: int, used: int, lease: Held, nodes: int, most: int = MOST) -> int:
    """The allowance of a node that does not use it: as little as one that never had a lease."""
    return lease.used + min(lease.left, opening(quota, used, nodes, most))


def shared(quota: int, used: int, held: Mapping[str, Held], nodes: int, most: int = MOST) -> dict[str, int]:
    """The allowances after the quota changed or began anew: everybody can begin, and nobody has too much."""
    share = max(quota - used, 0) // max(len(held), 1)
    low, high = min(opening(quota, used, nodes, most), share), min(slice_bytes(quota, most), share)
    spare = free(quota, used, held)
    allowances = {}
    for node_id, lease in sorted(held.items()):
        left = min(max(lease.left, low), high)
        more = min(max(left - lease.left, 0), spare)
        spare -= more
        allowances[node_id] = lease.used + min(left, lease.left) + more
    return allowances


def helped(quota: int, used: int, held: Mapping[str, Held], node_id: str, nodes: int, most: int = MOST) -> int:
    """The allowance of a node that has nothing left, and does not ask because nothing passes: a beginning."""
    lease = held[node_id]
    more = min(opening(quota, used, nodes, most), free(quota, used, held))
    return lease.used + max(lease.left, more)
