"""The host's traffic by the interface of a tunnel, and that of the tunnel itself as it went before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import ip_network

from agent.drivers.netlink.rtnl import Link, Rtnl
from shared.addresses import Address, Network


async def lead_through(
    rtnl: Rtnl, link: Link, endpoint: Address, prefixes: Iterable[str], addresses: Iterable[str]
) -> None:
    """Send these prefixes by the link, of the IP versions that it has an address of; its far end is at `endpoint`."""
    hop = await rtnl.hop_to(endpoint)
    if hop.unicast and hop.index != link.index:
        await rtnl.add_route(ip_network(endpoint), hop.index, hop.gateway)
    for network in _routed(prefixes, addresses):
        await rtnl.add_route(network, link.index)


async def let_go(rtnl: Rtnl, endpoint: Address) -> None:
    """Take the endpoint's route away; those by the link go with it."""
    pinned = ip_network(endpoint)
    for route in await rtnl.our_routes():
        if route.destination == pinned:
            await rtnl.delete_route(route)


def _routed(prefixes: Iterable[str], addresses: Iterable[str]) -> Iterator[Network]:
    """The prefixes to route; a default route as two halves, which win over the host's own without replacing it."""
    versions = {6 if ":" in address else 4 for address in addresses}
    for prefix in prefixes:
        network = ip_network(prefix)
        if network.version in versions:
            yield from network.subnets() if network.prefixlen == 0 else (network,)
