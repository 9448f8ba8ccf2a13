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
_REFUSED = re.compile(r"AUTH_FAILED(?:,(.+))?")
_ADDRESS = re.compile(r"net_addr_v([46])_add: (\S+?)/(\d+)")
_NAME_SERVER = re.compile(r"dhcp-option DNS6? ([0-9a-fA-F.:]+)")
_LONGEST_LINE = 200
_BLOCKS = ("<ca>", "<cert>", "<key>", "<tls-crypt-v2>")
_OPTIONS = frozenset(
    ("client", "dev", "nobind", "persist-tun", "remote", "server-poll-timeout", "explicit-exit-notify")
) | {"remote-cert-tls", "verify-x509-name", "tls-version-min", "data-ciphers", "auth-nocache"}


async def up(local: LocalTunnel, api: Api, *, routes: bool, save: Callable[[LocalTunnel], None]) -> LocalTunnel:
    profile = await api.config(local.connection_id, "conf")
    _check(profile)
    path = programs.write(local, profile)
    argv = ["openvpn", "--config", str(path), "--dev", local.interface, "--dev-type", "tun", "--verb", "3"]
    argv += ["--writepid", f"{path}.pid", "--log", f"{path}.log", "--auth-retry", "none", "--suppress-timestamps"]
    argv += ["--daemon", "skynetvpn"]
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


def _check(profile: bytes) -> None:
    """Raise Failure for what no controller should send: openvpn runs as root, and some options start programs.

    It reads lines as openvpn does: a block ends at its tag whatever precedes or follows it, and a line too long is two.
    """
    inside = ""
    for line in profile.decode(errors="replace").split("\n"):
        first = line.split(maxsplit=1)[0] if line.strip() else "#"
        if len(line) > _LONGEST_LINE or "\0" in line:
            raise Failure("the controller sent a configuration that cannot be used: it has too long lines, or NUL")
        if inside:
            inside = "" if line.strip().startswith(f"</{inside}>") else inside
        elif line in _BLOCKS:
            inside = line[1:-1]
        elif not first.startswith("#") and first not in _OPTIONS:
            raise Failure(f"the controller sent a configuration that cannot be used: option {first[:40]!r}")


async def _wait(local: LocalTunnel) -> str:
    """The log of a program that is connected; raise Failure with its words where it has given up or takes too long."""
    deadline = time.monotonic() + _SECONDS
    while _READY not in (text := _log(local)):
        if refused := _REFUSED.search(text):
            raise Failure(f"{local.server} refuses the login: {refused[1] or 'it gives no reason'}")
        # The pid file is written by the program that has gone to the background, a moment after its parent has ended.
        # In this order: it may be written between the two questions.
        noted = programs.noted(local) or time.monotonic() > deadline - _SECONDS + 5
        if noted and programs.running(local) is None:
            raise Failure(f"openvpn ended: {programs.last_words(local)}")
        if time.monotonic() > deadline:
            raise Failure(f"{local.server} did not let us in within {_SECONDS:g} s: {programs.last_words(local)}")
        await asyncio.sleep(_POLL_SECONDS)
    return text


def _log(local: LocalTunnel) -> str:
    path = programs.file_of(local, ".log")
    return path.read_text(errors="replace") if path.exists() else ""
