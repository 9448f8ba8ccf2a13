"""Allowed IPs in the kernel's messages; pure.

All of an entry but its address is one of 162 constants, written from a table and recognised by the same table.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from itertools import repeat
from socket import AF_INET, AF_INET6, inet_ntoa, inet_ntop, inet_pton

from agent.drivers.netlink.codec import NLA_F_NESTED, attribute, attributes
from agent.drivers.wireguard.linux import ALLOWED_IP_ADDRESS, ALLOWED_IP_FAMILY, ALLOWED_IP_MASK, HEADER, header

_HEAD_BYTES = 24
_IPV4_BYTES = _HEAD_BYTES + 4
_IPV6_BYTES = _HEAD_BYTES + 16


def _head(family: int, mask: int, address_bytes: int) -> bytes:
    values = (
        attribute(ALLOWED_IP_MASK, bytes([mask]))
        + attribute(ALLOWED_IP_FAMILY, struct.pack("=H", family))
        + header(ALLOWED_IP_ADDRESS, address_bytes)
    )
    return header(NLA_F_NESTED, len(values) + address_bytes) + values


_IPV4 = {str(mask): _head(AF_INET, mask, 4) for mask in range(33)}
_IPV6 = {str(mask): _head(AF_INET6, mask, 16) for mask in range(129)}
_IPV4_MASKS = {head: mask for mask, head in _IPV4.items()}
_IPV6_MASKS = {head: mask for mask, head in _IPV6.items()}
_MANY = 8  # peers; to look at all of them first costs more than it saves for fewer
_TWO_HOSTS = struct.Struct(f"={_HEAD_BYTES}s4s{_HEAD_BYTES}s16s")


def encode(prefixes: Iterable[str]) -> bytes:
    """The content of a peer's nest of allowed IPs."""
    entries = b""
    for prefix in prefixes:
        address, _, mask = prefix.partition("/")
        if ":" in address:
            entries += _IPV6[mask] + inet_pton(AF_INET6, address)
        else:
            entries += _IPV4[mask] + inet_pton(AF_INET, address)
    return entries


def encode_each(peers: Sequence[Sequence[str]]) -> list[bytes]:
    """The contents of these peers' nests. Clients, with one address of each family, take a third of the time."""
    hosts = _hosts(peers) if len(peers) >= _MANY else None
    if hosts is None:
        return [encode(prefixes) for prefixes in peers]
    ipv4, ipv6 = map(inet_pton, repeat(AF_INET), hosts[0]), map(inet_pton, repeat(AF_INET6), hosts[1])
    return list(map(_TWO_HOSTS.pack, repeat(_IPV4["32"]), ipv4, repeat(_IPV6["128"]), ipv6))


def _hosts(peers: Sequence[Sequence[str]]) -> tuple[list[str], list[str]] | None:
    """The addresses of both families where every peer has an IPv4 /32 and then an IPv6 /128, or None."""
    if {len(prefixes) for prefixes in peers} != {2}:
        return None
    first, second = ("\n".join([*column, ""]) for column in zip(*peers, strict=True))
    ipv4, ipv6 = first.split("/32\n"), second.split("/128\n")
    # One with another mask would have stayed in one piece with what follows it.
    alike = len(ipv4) == len(ipv6) == len(peers) + 1 and ":" not in first
    return (ipv4[:-1], ipv6[:-1]) if alike else None


def decode(data: bytes, start: int, end: int) -> tuple[str, ...]:
    """Read the nest's content, at these offsets of a message."""
    found = []
    while start + HEADER.size <= end:
        head = data[start : start + _HEAD_BYTES]
        if (mask := _IPV4_MASKS.get(head)) is not None:
            found.append(f"{inet_ntoa(data[start + _HEAD_BYTES : start + _IPV4_BYTES])}/{mask}")
            start += _IPV4_BYTES
        elif (mask := _IPV6_MASKS.get(head)) is not None:
            address = data[start + _HEAD_BYTES : start + _IPV6_BYTES]
            found.append(f"{inet_ntop(AF_INET6, address)}/{mask}")
            start += _IPV6_BYTES
        else:  # written in another order than the kernel's usual one
            return (*found, *(_decode(entry) for _type, entry in attributes(data[start:end])))
    return tuple(found)


def _decode(entry: memoryview) -> str:
    values = dict(attributes(entry))
    address = bytes(values[ALLOWED_IP_ADDRESS])
    family = AF_INET6 if len(address) == 16 else AF_INET
    return f"{inet_ntop(family, address)}/{values[ALLOWED_IP_MASK][0]}"
