"""The client's end of a tunnel: one interface, one server, and the host's traffic through it."""

from __future__ import annotations

from collections.abc import Sequence

from agent.drivers.base import DriverError
from agent.drivers.netlink.routing import lead_through, let_go
from agent.drivers.netlink.rtnl import Rtnl
from agent.drivers.wireguard.kernel import KernelWireGuard
from agent.drivers.wireguard.server import ServerPeer
from agent.drivers.wireguard.userspace import UserspaceWireGuard
from shared.addresses import Address
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
            await lead_through(rtnl, link, server.endpoint[0], server.allowed_ips, addresses)
    except BaseException:
        await _remove(driver, rtnl, name, server.endpoint[0])
        raise
    finally:
        rtnl.close()


async def disconnect(driver: KernelWireGuard | UserspaceWireGuard, name: str, endpoint: Address) -> None:
    """Take the tunnel and all routes that `connect` made away; none there is no error."""
    rtnl = Rtnl()
    try:
        await _remove(driver, rtnl, name, endpoint)
    finally:
        rtnl.close()


async def _remove(driver: KernelWireGuard | UserspaceWireGuard, rtnl: Rtnl, name: str, endpoint: Address) -> None:
    await driver.remove(name)
    await let_go(rtnl, endpoint)
