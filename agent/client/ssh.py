"""SSH by the program of that name: a SOCKS proxy on this machine, or an interface of its own (`ssh -w`)."""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import Callable
from ipaddress import IPv4Address

import msgspec

from agent.client import namespace, programs, resolver, tunnel
from agent.client.api import Api
from agent.client.errors import Failure
from agent.client.profile import LocalTunnel
from agent.client.tunnel import Counters, ping
from agent.config import split_address
from agent.drivers import commands
from agent.drivers.base import DeviceMissing, DriverError
from agent.drivers.netlink.routing import lead_through, let_go
from agent.drivers.netlink.rtnl import Rtnl
from shared.access import MAX_TUNNEL, USERNAME, parse_ssh_key
from shared.addresses import check_client_prefix, check_name_server
from shared.resource import InvalidResource

_LOGIN_SECONDS = 25.0
_HOST = re.compile(r"[A-Za-z0-9.:][A-Za-z0-9.:-]*")
_MOST_NAME_SERVERS = 8
_MOST_NUMBER = 2_000_000_000  # ssh opens `tunN`
_EVERYTHING = ("0.0.0.0/0",)  # such a tunnel is of IPv4


class SshTunnel(msgspec.Struct, frozen=True):
    """The login's tun device on the server, and the addresses of both ends."""

    number: int
    address: str
    server_address: str
    dns: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise ValueError."""
        if not MAX_TUNNEL < self.number < _MOST_NUMBER or len(self.dns) > _MOST_NAME_SERVERS:
            raise InvalidResource("the tunnel has another number, or more name servers, than tunnels have")
        for address in (self.address, self.server_address):
            check_client_prefix(f"{IPv4Address(address)}/32")
        for server in self.dns:
            check_name_server(server)


class SshMaterial(msgspec.Struct, frozen=True):
    """The `json` format of the config of an SSH connection."""

    host: str
    port: int
    username: str
    password: str
    host_keys: tuple[str, ...]
    tcp_forwarding: bool = True
    tunnel: SshTunnel | None = None

    def __repr__(self) -> str:
        return f"SshMaterial(host={self.host!r}, username={self.username!r})"


async def up(local: LocalTunnel, api: Api, *, routes: bool, save: Callable[[LocalTunnel], None]) -> LocalTunnel:
    """A proxy changes no route, whatever `routes` says."""
    material = await _material(local, api)
    wanted = await _wanted(local, material)
    server = await tunnel.resolve(material.host)
    local = msgspec.structs.replace(local, interface=wanted, endpoint=tunnel.join(server, material.port))
    save(local)
    if local.is_proxy or material.tunnel is None:
        await _start(local, material, ["-D", local.interface])
        return local
    own = material.tunnel
    await tunnel.check_way(material.host, local.netns, routes=routes)  # it was to be a proxy, perhaps
    # ssh makes the device, and takes it away with all its routes when it ends. On a machine that is the server as well
    # the one of the server has the number itself.
    number = own.number + MAX_TUNNEL + 1
    local = msgspec.structs.replace(local, addresses=(f"{own.address}/32",))
    save(local)
    await _start(local, material, ["-w", f"{number}:{own.number}"])
    # Refused by the server, ssh ends, and the device with it: at any moment until the server has answered.
    refused = Failure(f"{local.server} refuses the tunnel: is the login in use by another one?")
    try:
        await namespace.within(local.netns, lambda: _set_up(local, own, f"tun{number}", routes=routes))
    except DriverError as error:
        if isinstance(error, DeviceMissing) or programs.running(local) is None:
            raise refused from error
        raise
    await ping(own.server_address, local.netns)
    if await counters(local) is None:
        raise refused
    if routes and own.dns:
        used = await resolver.use(own.dns, local.interface, local.netns)
        local = msgspec.structs.replace(local, resolver=used)
        save(local)
    return local


async def down(local: LocalTunnel) -> None:
    await resolver.restore(local.resolver, local.interface, local.netns)
    await programs.end(local)
    if local.endpoint and not local.is_proxy and (local.netns is None or namespace.exists(local.netns)):
        await namespace.within(local.netns, lambda: _unroute(local))
    programs.forget(local)


async def counters(local: LocalTunnel) -> Counters | None:
    pid = programs.running(local)
    if pid is None:
        return None
    if local.is_proxy:
        return Counters(None, None, programs.since(pid))
    moved = await asyncio.to_thread(programs.traffic, pid, local.interface)
    return Counters(*moved, programs.since(pid)) if moved is not None else None


async def latency(local: LocalTunnel) -> float | None:
    return await ping(str(tunnel.endpoint(local)), local.netns)


async def _wanted(local: LocalTunnel, material: SshMaterial) -> str:
    """The interface, or the place of the proxy; an interface where the server forwards nothing else."""
    if not local.is_proxy:
        if material.tunnel is None:
            raise Failure(f"{local.server} has no tun device for this login: without --tun it is a proxy")
        return local.interface
    if material.tcp_forwarding:
        return local.interface
    if material.tunnel is None:
        raise Failure(f"{local.server} forwards tun devices only, and has none for this login")
    tunnel.require_privilege()
    return await tunnel.free_interface(local.netns, ())


async def _start(local: LocalTunnel, material: SshMaterial, forward: list[str]) -> None:
    """Have ssh run in the background, once the server has agreed to what it is to forward."""
    host = str(tunnel.endpoint(local))
    place = host if material.port == 22 else f"[{host}]:{material.port}"
    password = programs.write(local, f"{material.password}\n".encode(), ".password")
    ask = programs.write(local, f"#!/bin/sh\nexec cat {shlex.quote(str(password))}\n".encode(), ".ask", 0o700)
    known = programs.write(local, "".join(f"{place} {key}\n" for key in material.host_keys).encode(), ".known")
    argv = ["ssh", "-F", "/dev/null", "-f", "-N", *forward, "-p", str(material.port), "-l", material.username]
    for option in (
        f"UserKnownHostsFile={known}",
        "GlobalKnownHostsFile=/dev/null",
        "StrictHostKeyChecking=yes",
        "PreferredAuthentications=password,keyboard-interactive",
        "PubkeyAuthentication=no",
        "NumberOfPasswordPrompts=1",
        "ExitOnForwardFailure=yes",
        "ServerAliveInterval=15",
        "ConnectTimeout=15",
        "LogLevel=ERROR",
    ):
        argv += ["-o", option]
    asking = {"SSH_ASKPASS": str(ask), "SSH_ASKPASS_REQUIRE": "force"}  # ssh(1)
    try:
        await namespace.within(
            local.netns, lambda: commands.run([*argv, "--", host], timeout=_LOGIN_SECONDS, environ=asking)
        )
    except DriverError as error:
        raise Failure(f"{local.server} did not let us in: {' | '.join(str(error).splitlines())}") from error
    finally:
        password.unlink()
    await asyncio.to_thread(programs.note, local)


async def _set_up(local: LocalTunnel, own: SshTunnel, device: str, *, routes: bool) -> None:
    rtnl = Rtnl()
    try:
        link = await rtnl.link(device)
        if link is None:
            raise DeviceMissing(f"{device} is gone")
        await rtnl.rename(link, local.interface)
        await rtnl.add_address(link, f"{own.address}/32", IPv4Address(own.server_address))
        await rtnl.set_up(link)
        if routes:
            await lead_through(rtnl, link, tunnel.endpoint(local), _EVERYTHING, local.addresses)
    finally:
        rtnl.close()


async def _unroute(local: LocalTunnel) -> None:
    rtnl = Rtnl()
    try:
        await let_go(rtnl, tunnel.endpoint(local))
    finally:
        rtnl.close()


async def _material(local: LocalTunnel, api: Api) -> SshMaterial:
    """Raise Failure for what no controller should send: all of it becomes arguments and lines of files."""
    try:
        material = msgspec.json.decode(await api.config(local.connection_id, "json"), type=SshMaterial)
        split_address(
            f"[{material.host}]:{material.port}" if ":" in material.host else f"{material.host}:{material.port}"
        )
        plain = material.host + material.password
        if not USERNAME.fullmatch(material.username) or not plain.isprintable() or not _HOST.fullmatch(material.host):
            raise InvalidResource("host, login or password have other characters than these have")
        if any(parse_ssh_key(key) != key for key in material.host_keys):
            raise InvalidResource("a host key is not `type base64`")
        if material.tunnel is not None:
            material.tunnel.check()
    except (msgspec.MsgspecError, ValueError) as error:
        raise Failure(f"the controller sent a configuration that cannot be used: {error}") from error
    return material
