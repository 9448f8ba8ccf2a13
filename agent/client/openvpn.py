"""OpenVPN by the program of that name, with the configuration that the controller made."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable

import msgspec

from agent.client import namespace, programs, resolver
from agent.client.api import Api
from agent.client.errors import Failure
from agent.client.profile import LocalTunnel
from agent.client.tunnel import Counters, ping
from agent.drivers import commands

_READY = "Initialization Sequence Completed"
_SECONDS, _POLL_SECONDS = 25.0, 0.1
_PEER = re.compile(r"Peer Connection Initiated with \[AF_INET6?\](\S+)")
_ADDRESS = re.compile(r"net_addr_v([46])_add: (\S+?)/(\d+)")
_NAME_SERVER = re.compile(r"dhcp-option DNS6? ([0-9a-fA-F.:]+)")


async def up(local: LocalTunnel, api: Api, *, routes: bool, save: Callable[[LocalTunnel], None]) -> LocalTunnel:
    path = programs.write(local, await api.config(local.connection_id, "conf"))
    argv = ["openvpn", "--config", str(path), "--dev", local.interface, "--dev-type", "tun", "--verb", "3"]
    argv += ["--writepid", f"{path}.pid", "--log", f"{path}.log", "--auth-retry", "none", "--daemon", "skynetvpn"]
    save(local)
    await namespace.within(
        local.netns, lambda: commands.run([*argv, *([] if routes else ["--route-nopull"])], timeout=10)
    )
    text = await _wait(local)
    found = [f"{address}/{32 if version == '4' else 128}" for version, address, _ in _ADDRESS.findall(text)]
    peer = _PEER.findall(text)
    local = msgspec.structs.replace(local, addresses=tuple(found), endpoint=peer[-1] if peer else "")
    if routes and (servers := _NAME_SERVER.findall(text)):
        used = await resolver.use(tuple(dict.fromkeys(servers)), local.interface, local.netns)
        local = msgspec.structs.replace(local, resolver=used)
    save(local)
    return local


async def down(local: LocalTunnel) -> None:
    await resolver.restore(local.resolver, local.interface, local.netns)
    await programs.end(local)
    programs.forget(local)


async def counters(local: LocalTunnel) -> Counters | None:
    pid = programs.running(local)
    if pid is None or _READY not in _log(local):
        return None
    moved = await asyncio.to_thread(programs.traffic, pid, local.interface)
    return Counters(*moved, programs.since(pid)) if moved is not None else None


async def latency(local: LocalTunnel) -> float | None:
    return await ping(local.endpoint.rpartition(":")[0].strip("[]"), local.netns) if local.endpoint else None


async def _wait(local: LocalTunnel) -> str:
    """The log of a program that is connected; raise Failure with its words where it has given up or takes too long."""
    deadline = time.monotonic() + _SECONDS
    while _READY not in (text := _log(local)):
        # The pid file is written by the program that has gone to the background, a moment after its parent has ended.
        if programs.running(local) is None and (programs.noted(local) or time.monotonic() > deadline - _SECONDS + 5):
            raise Failure(f"openvpn ended: {programs.last_words(local)}")
        if time.monotonic() > deadline:
            raise Failure(f"{local.server} did not let us in within {_SECONDS:g} s: {programs.last_words(local)}")
        await asyncio.sleep(_POLL_SECONDS)
    return text


def _log(local: LocalTunnel) -> str:
    path = programs.file_of(local, ".log")
    return path.read_text(errors="replace") if path.exists() else ""
