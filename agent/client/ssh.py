"""SSH by the program of that name: a SOCKS proxy on this machine, through which programs reach the internet."""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import Callable

import msgspec

from agent.client import namespace, programs
from agent.client.api import Api
from agent.client.errors import Failure
from agent.client.profile import LocalTunnel
from agent.client.tunnel import Counters, ping
from agent.config import split_address
from agent.drivers import commands
from agent.drivers.base import DriverError
from shared.access import USERNAME, parse_ssh_key
from shared.resource import InvalidResource

_LOGIN_SECONDS = 25.0
_HOST = re.compile(r"[A-Za-z0-9.:][A-Za-z0-9.:-]*")


class SshMaterial(msgspec.Struct, frozen=True):
    """The `json` format of the config of an SSH connection."""

    host: str
    port: int
    username: str
    password: str
    host_keys: tuple[str, ...]
    tcp_forwarding: bool = True

    def __repr__(self) -> str:
        return f"SshMaterial(host={self.host!r}, username={self.username!r})"


async def up(local: LocalTunnel, api: Api, *, routes: bool, save: Callable[[LocalTunnel], None]) -> LocalTunnel:  # noqa: ARG001
    """A proxy changes no route, whatever `routes` says."""
    material = await _material(local, api)
    if not material.tcp_forwarding:
        raise Failure(f"{local.server} forwards tun devices only: use ssh -w with skynetvpn config")
    place = material.host if material.port == 22 else f"[{material.host}]:{material.port}"
    password = programs.write(local, f"{material.password}\n".encode(), ".password")
    ask = programs.write(local, f"#!/bin/sh\nexec cat {shlex.quote(str(password))}\n".encode(), ".ask", 0o700)
    known = programs.write(local, "".join(f"{place} {key}\n" for key in material.host_keys).encode(), ".known")
    local = msgspec.structs.replace(local, endpoint=f"{place}" if ":" in place else f"{place}:{material.port}")
    save(local)
    argv = ["ssh", "-F", "/dev/null", "-f", "-N", "-D", local.interface]
    argv += ["-p", str(material.port), "-l", material.username]
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
            local.netns, lambda: commands.run([*argv, "--", material.host], timeout=_LOGIN_SECONDS, environ=asking)
        )
    except DriverError as error:
        raise Failure(f"{local.server} did not let us in: {' | '.join(str(error).splitlines())}") from error
    finally:
        password.unlink()
    await asyncio.to_thread(programs.note, local)
    return local


async def down(local: LocalTunnel) -> None:
    await programs.end(local)
    programs.forget(local)


async def counters(local: LocalTunnel) -> Counters | None:
    pid = programs.running(local)
    return Counters(None, None, programs.since(pid)) if pid is not None else None


async def latency(local: LocalTunnel) -> float | None:
    return await ping(local.endpoint.rpartition(":")[0].strip("[]"), local.netns) if local.endpoint else None


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
    except (msgspec.MsgspecError, ValueError) as error:
        raise Failure(f"the controller sent a configuration that cannot be used: {error}") from error
    return material
