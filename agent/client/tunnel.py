"""A WireGuard tunnel on this machine, in its network namespace: up, down, its counters."""

from __future__ import annotations

import asyncio
import errno
import itertools
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import TypeVar

import msgspec

from agent.client import namespace, resolver
from agent.client.api import Api, TunnelConfig
from agent.client.errors import Failure, Misuse
from agent.client.profile import LocalTunnel, load_or_make_key
from agent.config import split_address
from agent.drivers import commands
from agent.drivers.base import DeviceMissing, DriverError
from agent.drivers.netlink.channel import KernelRefused
from agent.drivers.netlink.rtnl import Hop, Rtnl
from agent.drivers.wireguard import Backend, choose, client
from agent.drivers.wireguard.kernel import KernelWireGuard
from agent.drivers.wireguard.server import ServerPeer
from agent.drivers.wireguard.userspace import SOCKETS, UserspaceWireGuard
from shared.addresses import Address
from shared.desired import Interface
from shared.keys import PresharedKey, PublicKey

_PREFIX = "skyvpn"
_CAP_NET_ADMIN = 12  # capabilities(7)
_AVERAGE = re.compile(r"= [\d.]+/([\d.]+)/")  # ping's last line: min/avg/max/mdev

T = TypeVar("T")
Driver = KernelWireGuard | UserspaceWireGuard


class Counters(msgspec.Struct, frozen=True):
    """The tunnel as this end counts it; None where its program does not tell."""

    rx: int | None
    tx: int | None
    latest_handshake: int  # Unix seconds, 0 = none yet; of other protocols the beginning


def require_privilege() -> None:
    status = Path("/proc/self/status").read_text()
    effective = int(re.findall(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)[0], 16)
    if not effective & (1 << _CAP_NET_ADMIN):
        raise Failure("a tunnel needs root: run it with sudo, and all other skynetvpn commands as well")


async def free_interface(netns: str | None, taken: Sequence[str]) -> str:
    """The first name that neither this namespace nor, for programs' sockets, another one uses."""

    async def find() -> str:
        rtnl = Rtnl()
        try:
            for number in itertools.count():
                name = f"{_PREFIX}{number}"
                used = name in taken or (SOCKETS / f"{name}.sock").exists()
                if not used and await rtnl.link(name) is None:
                    return name
        finally:
            rtnl.close()
        raise AssertionError

    return await namespace.within(netns, find)


async def check_free(interface: str, netns: str | None) -> None:
    """Raise Misuse where something has that name: it would be taken for ours, and deleted in the end."""

    async def look() -> bool:
        rtnl = Rtnl()
        try:
            return await rtnl.link(interface) is None
        finally:
            rtnl.close()

    if not await namespace.within(netns, look):
        raise Misuse(f"an interface {interface} is there already: name another one with --interface")


async def check_way(host: str, netns: str | None, *, routes: bool) -> None:
    """Raise Failure where no tunnel can reach the server, or where its own packets would be led into it (`routes`)."""
    addresses = await _resolve(host)

    async def ask() -> list[Hop]:
        rtnl = Rtnl()
        try:
            return [hop for address in addresses if (hop := await _hop(rtnl, address)) is not None]
        finally:
            rtnl.close()

    hops = await namespace.within(netns, ask)
    if netns is not None and not hops:
        raise Failure(
            f"network namespace {netns} has no route to the server at {addresses[0]}: it needs a way of its own there, "
            f"for the tunnel's packets (a veth pair and a default route, say); ip -n {netns} route shows what it has"
        )
    if routes and not all(hop.unicast for hop in hops):
        where = "this machine's own" if netns is None else f"network namespace {netns}'s own"
        raise Failure(
            f"the server's address {addresses[0]} is {where}: all its traffic would go round in a tunnel to itself. "
            "Use --no-routes for the interface only, or --netns for a namespace with a way to the server"
        )


async def _hop(rtnl: Rtnl, address: Address) -> Hop | None:
    try:
        return await rtnl.hop_to(address)
    except KernelRefused as error:
        if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
            return None
        raise


async def up(local: LocalTunnel, api: Api, *, routes: bool, save: Callable[[LocalTunnel], None]) -> LocalTunnel:
    """Make the interface, noted down (`save`) before it is there; returns the tunnel with what was decided."""
    key = load_or_make_key(Path(local.key_file))
    config = await api.tunnel_config(local.connection_id)
    server = await _server(config, local.interface)
    local = msgspec.structs.replace(local, addresses=config.addresses, endpoint=join(*server.endpoint))
    await check_free(local.interface, local.netns)  # before `save`: what is noted with an endpoint is taken down

    async def bring_up() -> str:
        driver = await choose(Backend(local.backend))
        try:
            save(msgspec.structs.replace(local, backend=driver.backend))
            await client.connect(driver, local.interface, key, config.addresses, config.mtu, server, routes=routes)
        finally:
            await driver.close()
        return driver.backend

    local = msgspec.structs.replace(local, backend=await namespace.within(local.netns, bring_up))
    if routes and config.dns:
        used = await resolver.use(config.dns, local.interface, local.netns)
        local = msgspec.structs.replace(local, resolver=used)
    save(local)
    return local


async def down(local: LocalTunnel) -> None:
    """Take interface, routes and name servers away; what is gone already is no error."""
    await resolver.restore(local.resolver, local.interface, local.netns)
    if local.netns is not None and not namespace.exists(local.netns):
        return

    async def take_down(driver: Driver) -> None:
        if local.endpoint:
            await client.disconnect(driver, local.interface, endpoint(local))

    await _with_driver(local, take_down)


async def counters(local: LocalTunnel) -> Counters | None:
    """What the interface has counted, or None where it is not there any more."""
    if not local.endpoint or (local.netns is not None and not namespace.exists(local.netns)):
        return None

    async def read(driver: Driver) -> Counters | None:
        try:
            stats = await driver.stats(local.interface)
        except DeviceMissing:
            return None
        return Counters(stats[0].rx, stats[0].tx, stats[0].handshake) if stats else None

    return await _with_driver(local, read)


async def latency(local: LocalTunnel) -> float | None:
    """The round trip to the server in milliseconds, or None where it answers no ping."""
    return await ping(str(endpoint(local)), local.netns)


async def ping(host: str, netns: str | None) -> float | None:
    async def run() -> str:
        return await commands.run(["ping", "-n", "-q", "-c", "2", "-i", "0.2", "-W", "1", host])

    try:
        found = _AVERAGE.search(await namespace.within(netns, run))
    except DriverError:
        return None
    return float(found[1]) if found else None


async def _with_driver(local: LocalTunnel, work: Callable[[Driver], Awaitable[T]]) -> T:
    async def inside() -> T:
        driver = await choose(Backend(local.backend))
        try:
            return await work(driver)
        finally:
            await driver.close()

    return await namespace.within(local.netns, inside)


async def _server(config: TunnelConfig, interface: str) -> ServerPeer:
    """The other end; raise Failure for what no controller should send and no host should set."""
    try:
        host, port = split_address(config.endpoint)
        Interface(name=interface, listen_port=port, addresses=config.addresses, mtu=config.mtu).check()
        return ServerPeer(
            public_key=PublicKey.parse(config.server_public_key),
            endpoint=(await resolve(host), port),
            allowed_ips=tuple(str(ip_network(prefix)) for prefix in config.allowed_ips),
            preshared_key=PresharedKey.parse(config.preshared_key) if config.preshared_key else None,
            keepalive=config.keepalive,
        )
    except ValueError as error:
        raise Failure(f"the controller sent a configuration that cannot be used: {error}") from error


async def resolve(host: str) -> Address:
    return (await _resolve(host))[0]


async def _resolve(host: str) -> list[Address]:
    """The server's addresses, looked up where the command was typed: a new namespace has no name servers yet."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise Failure(f"the server's name {host} cannot be resolved: {error.strerror}") from error
    return [ip_address(each[4][0]) for each in found]


def endpoint(local: LocalTunnel) -> Address:
    return ip_address(split_address(local.endpoint)[0])


def join(host: Address, port: int) -> str:
    return f"[{host}]:{port}" if host.version == 6 else f"{host}:{port}"
