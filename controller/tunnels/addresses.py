"""The pool that clients' addresses come from: a slot is a number, and both addresses follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Self

_FIRST = 2  # 0 is the network (IPv6: the routers' anycast address, RFC 4291 §2.6.1), 1 is the node itself


@dataclass(frozen=True, slots=True)
class Pool:
    """The tunnel networks of a node. Every node has the same: they are behind its own NAT."""

    ipv4: IPv4Network
    ipv6: IPv6Network

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"{self.ipv4} and {self.ipv6} have no room for a client")

    @classmethod
    def parse(cls, ipv4: str, ipv6: str) -> Self:
        return cls(IPv4Network(ipv4), IPv6Network(ipv6))

    @property
    def capacity(self) -> int:
        broadcast = 1
        return min(self.ipv4.num_addresses - _FIRST - broadcast, self.ipv6.num_addresses - _FIRST)

    def client_addresses(self, slot: int) -> tuple[str, str]:
        """The client's addresses as allowed IPs; raise ValueError for a slot outside the pool."""
        if not 0 <= slot < self.capacity:
            raise ValueError(f"slot {slot} is not in a pool of {self.capacity}")
        return f"{self.ipv4[slot + _FIRST]}/32", f"{self.ipv6[slot + _FIRST]}/128"
