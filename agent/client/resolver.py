"""Name resolution through the tunnel: by whatever manages resolv.conf on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

from agent.client.errors import Failure
from agent.drivers import commands
from agent.drivers.base import DriverError

_RESOLVED = Path("/run/systemd/resolve/io.systemd.Resolve")
_NETNS = Path("/etc/netns")  # ip-netns(8): `ip netns exec NS` shows NS/resolv.conf as /etc/resolv.conf


class Resolver(StrEnum):
    RESOLVED = "systemd-resolved"
    RESOLVCONF = "resolvconf"
    NETNS = "netns"


async def use(servers: Sequence[str], interface: str, netns: str | None) -> Resolver | None:
    """Ask these servers for all names; None where nothing here can be told so, and names stay as they were."""
    if netns is not None:
        return _write_for_namespace(servers, netns)
    if _resolved_runs():
        await commands.run(["resolvectl", "dns", interface, *servers])
        await commands.run(["resolvectl", "domain", interface, "~."])
        return Resolver.RESOLVED
    try:
        await commands.run(["resolvconf", "-a", f"tun.{interface}", "-m", "0", "-x"], stdin=_lines(servers))
    except DriverError:  # not installed, or not in charge of resolv.conf
        return None
    return Resolver.RESOLVCONF


async def restore(resolver: str | None, interface: str, netns: str | None) -> None:
    """Undo `use`; systemd-resolved forgets by itself what belonged to an interface."""
    if resolver == Resolver.RESOLVCONF:
        await commands.run(["resolvconf", "-d", f"tun.{interface}", "-f"])
    elif resolver == Resolver.NETNS and netns is not None:
        path = _NETNS / netns / "resolv.conf"
        path.unlink(missing_ok=True)
        try:
            path.parent.rmdir()
        except OSError:  # somebody else keeps files there
            return


def _resolved_runs() -> bool:
    return _RESOLVED.exists()


def _write_for_namespace(servers: Sequence[str], netns: str) -> Resolver | None:
    path = _NETNS / netns / "resolv.conf"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x") as file:
            file.write(_lines(servers))
    except FileExistsError:  # the administrator's own choice stays
        return None
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from error
    return Resolver.NETNS


def _lines(servers: Sequence[str]) -> str:
    return "".join(f"nameserver {server}\n" for server in servers)
