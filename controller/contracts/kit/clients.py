"""The address that a request comes from; pure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv6Address, ip_address

from shared.addresses import Address, Network


def client_address(peer: str | None, forwarded: Sequence[str], trusted: Sequence[Network]) -> str:
    """The nearest address that is not a trusted proxy's; empty for a peer without one (a Unix socket).

    X-Forwarded-For is believed as far as trusted proxies have written it: from its end, up to and including the first
    address that is not one of them. Whatever stands before that is the client's own invention.
    """
    if not peer:
        return ""
    if not trusted:
        return _canonical(peer)
    nearest = _parse(peer)
    if nearest is None:
        return ""
    hops = [hop.strip() for line in forwarded for hop in line.split(",")]
    while hops and any(nearest in network for network in trusted):
        before = _parse(hops.pop())
        if before is None:
            break
        nearest = before
    return str(nearest)


@lru_cache(maxsize=4096)
def _canonical(text: str) -> str:
    address = _parse(text)
    return str(address) if address is not None else ""


def _parse(text: str) -> Address | None:
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address
