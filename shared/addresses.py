"""Tunnel addresses: one parser for both sides, and the rules that every allowed IP has to meet."""

from __future__ import annotations

from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Interface = IPv4Interface | IPv6Interface


class InvalidAddress(ValueError):
    """An address or prefix that cannot be used for a peer or an interface."""


def parse_interface(text: str) -> Interface:
    """Parse `address/prefix` as an interface carries it (10.66.0.1/16)."""
    try:
        return ip_interface(text)
    except ValueError as error:
        raise InvalidAddress(f"{text!r} is not an address with a prefix length") from error


def check_client_prefix(text: str) -> None:
    """Check a client's allowed IP: exactly one host, written canonically (10.66.0.7/32, fd66::7/128).

    A client owns single addresses, nothing wider: a prefix such as 0.0.0.0/0 would silently take over the
    routes of every other peer. IPv4-mapped IPv6, unspecified, loopback and multicast are refused as well.
    """
    # By the C library: every peer comes through here, and ipaddress takes ten times as long.
    host, _, length = text.partition("/")
    family, bits = (AF_INET6, "128") if ":" in host else (AF_INET, "32")
    try:
        packed = inet_pton(family, host)
    except (OSError, ValueError) as error:  # ValueError: a NUL, or no ASCII
        raise InvalidAddress(f"{text!r} is not an allowed IP") from error
    if length != bits:
        raise InvalidAddress(f"{text!r} is wider than one address, or does not end in /{bits}")
    if not (_is_unicast4(packed) if family == AF_INET else _is_unicast6(packed)):
        raise InvalidAddress(f"{text!r} is IPv4-mapped, or not a unicast address")
    if (canonical := inet_ntop(family, packed)) != host:
        raise InvalidAddress(f"{text!r} is written '{canonical}/{bits}'")


def check_name_server(text: str) -> None:
    """Check the address of a DNS server; without a zone (RFC 4007), which is of one host only, and may hold anything.

    Raises InvalidAddress.
    """
    try:
        zone = getattr(ip_address(text), "scope_id", None)
    except ValueError as error:
        raise InvalidAddress(f"{text!r} is not the address of a DNS server") from error
    if zone is not None:
        raise InvalidAddress(f"{text!r} has a zone, which means nothing to other hosts")


def _is_unicast4(packed: bytes) -> bool:
    """Not unspecified, loopback, link-local or multicast (RFC 6890)."""
    return any(packed) and packed[0] != 127 and packed[:2] != b"\xa9\xfe" and not 224 <= packed[0] < 240


def _is_unicast6(packed: bytes) -> bool:
    """Not unspecified, loopback or IPv4-compatible (::/96), IPv4-mapped, link-local or multicast (RFC 4291)."""
    embedded = not any(packed[:10]) and packed[10:12] in (b"\0\0", b"\xff\xff")
    return not embedded and packed[0] != 0xFF and int.from_bytes(packed[:2]) & 0xFFC0 != 0xFE80


def rate_limit_key(text: str) -> str:
    """The unit in which a caller is counted: the address for IPv4, the /64 for IPv6 (one subscriber)."""
    address = ip_address(text)
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ip_network((address, 64), strict=False))
    return str(address)
