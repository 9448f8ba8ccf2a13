"""Allowed IPs in the kernel's messages; pure.

All of an entry but its address is one of 162 constants, written from a table and recognised by the same table.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
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
IPV4_HOST, IPV6_HOST = _IPV4["32"], _IPV6["128"]
TWO_HOSTS = f"{_HEAD_BYTES}s4s{_HEAD_BYTES}s16s"  # struct's format: each of those, then an address


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


def hosts(peers: Sequence[Sequence[str]]) -> tuple[Iterator[bytes], Iterator[bytes]] | None:
    """The packed addresses of both families where every peer has an IPv4 /32 and then an IPv6 /128, or None.

    To pack all addresses of a family in one go takes a third of the time that single ones take.
    """
    if set(map(len, peers)) != {2}:
        return None
    first, second = ("\n".join([*column, ""]) for column in zip(*peers, strict=True))
    ipv4, ipv6 = first.split("/32\n"), second.split("/128\n")
    # One with another mask would have stayed in one piece with what follows it.
    if not len(ipv4) == len(ipv6) == len(peers) + 1 or ":" in first:
        return None
    return map(inet_pton, repeat(AF_INET), ipv4[:-1]), map(inet_pton, repeat(AF_INET6), ipv6[:-1])


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
