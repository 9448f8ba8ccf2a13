"""The client's end of a tunnel: one interface, one server, and the host's traffic through it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from ipaddress import ip_network

from agent.drivers.base import DriverError
from agent.drivers.netlink.rtnl import Link, Rtnl
from agent.drivers.wireguard.kernel import KernelWireGuard
from agent.drivers.wireguard.server import ServerPeer
from agent.drivers.wireguard.userspace import UserspaceWireGuard
from shared.addresses import Address, Network
from shared.desired import Interface
from shared.keys import PrivateKey

ANY_PORT = 0


async def connect(
    driver: KernelWireGuard | UserspaceWireGuard,
    name: str,
    private_key: PrivateKey,
    addresses: Sequence[str],
    mtu: int,
    server: ServerPeer,
    *,
    routes: bool = True,
) -> None:
    """Bring the tunnel up and (`routes`) send the server's allowed IPs through it; a failure leaves nothing behind."""
    rtnl = Rtnl()
    if await rtnl.link(name) is not None:
        rtnl.close()
        raise DriverError(f"{name} is there already: disconnect it first")
    try:
        spec = Interface(name=name, listen_port=ANY_PORT, addresses=tuple(addresses), mtu=mtu)
        await driver.ensure(spec, private_key)
        await driver.set_server(name, server)
        link = await rtnl.link(name)
        if link is None:
            raise DriverError(f"{name} disappeared as soon as it was created")
        if routes:
            await _pin_endpoint(rtnl, server.endpoint[0], link)
            for network in _routed(server.allowed_ips, addresses):
                await rtnl.add_route(network, link.index)
    except BaseException:
        await _remove(driver, rtnl, name, [server.endpoint[0]])
        raise
    finally:
        rtnl.close()


async def disconnect(driver: KernelWireGuard | UserspaceWireGuard, name: str, endpoint: Address) -> None:
    """Take the tunnel and all routes that `connect` made away; none there is no error."""
    rtnl = Rtnl()
    try:
        await _remove(driver, rtnl, name, [endpoint])
    finally:
        rtnl.close()


async def _remove(
    driver: KernelWireGuard | UserspaceWireGuard, rtnl: Rtnl, name: str, endpoints: Iterable[Address]
) -> None:
    await driver.remove(name)  # the routes through it go with it
    pinned = {ip_network(endpoint) for endpoint in endpoints}
    for route in await rtnl.our_routes():
        if route.destination in pinned:
            await rtnl.delete_route(route)


async def _pin_endpoint(rtnl: Rtnl, endpoint: Address, tunnel: Link) -> None:
    """Keep the tunnel's own packets on the way they go now, out of the tunnel."""
    hop = await rtnl.hop_to(endpoint)
    if hop.unicast and hop.index != tunnel.index:
        await rtnl.add_route(ip_network(endpoint), hop.index, hop.gateway)


def _routed(allowed_ips: Iterable[str], addresses: Iterable[str]) -> Iterator[Network]:
    """The prefixes to route; a default route as two halves, which win over the host's own without replacing it."""
    versions = {6 if ":" in address else 4 for address in addresses}
    for prefix in allowed_ips:
        network = ip_network(prefix)
        if network.version in versions:
            yield from network.subnets() if network.prefixlen == 0 else (network,)
