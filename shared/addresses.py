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


def parse_client_prefix(text: str) -> Network:
    """Parse a client's allowed IP: exactly one host, written canonically (10.66.0.7/32, fd66::7/128).

    A client owns single addresses, nothing wider: a prefix such as 0.0.0.0/0 would silently take over the
    routes of every other peer. IPv4-mapped IPv6, unspecified, loopback and multicast are refused as well.
    """
    try:
        network = ip_network(text, strict=True)
    except ValueError as error:
        raise InvalidAddress(f"{text!r} is not an allowed IP") from error
    address = network.network_address
    if network.prefixlen != network.max_prefixlen:
        raise InvalidAddress(f"{text!r} is wider than one address")
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        raise InvalidAddress(f"{text!r} is an IPv4-mapped IPv6 address")
    if address.is_unspecified or address.is_loopback or address.is_multicast or address.is_link_local:
        raise InvalidAddress(f"{text!r} is not a unicast address")
    if str(network) != text:
        raise InvalidAddress(f"{text!r} is written {str(network)!r}")
    return network


def rate_limit_key(text: str) -> str:
    """The unit in which a caller is counted: the address for IPv4, the /64 for IPv6 (one subscriber)."""
    address = ip_address(text)
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ip_network((address, 64), strict=False))
    return str(address)
