"""The agent's packet filter: one nftables table of its own, replaced as a whole in one transaction."""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import Iterable, Sequence
from hashlib import sha256
from ipaddress import ip_interface, ip_network
from pathlib import Path

from agent.drivers import commands
from agent.drivers.base import DriverError, Tunnels
from agent.drivers.netlink.netfilter import Generations
from agent.drivers.ruleset import TABLE, render
from shared.desired import Interface

_SYSCTLS = Path("/proc/sys")
_NO_SUCH_TABLE = "No such file or directory"


class Nftables:
    """The FirewallDriver by the nft program."""

    def __init__(self, program: str = "nft", sysctls: Path = _SYSCTLS) -> None:
        self._program = program
        self._sysctls = sysctls
        self._generations = Generations()
        self._observed: tuple[bytes, str | None] | None = None  # in which generation, and what

    async def observe(self) -> str | None:
        """A hash of the rules as the host lists them: the one read after `apply`, unless somebody changed them.

        They are listed only where a rule of the host, of whichever table, has changed since the last time.
        """
        generation = await self._generations.current()
        if self._observed is None or self._observed[0] != generation:
            self._observed = generation, await self._list()
        return self._observed[1]

    async def apply(self, interfaces: Sequence[Interface], tunnels: Sequence[Tunnels] = ()) -> None:
        await commands.run([self._program, "-f", "-"], stdin=render(interfaces, tunnels))
        await asyncio.to_thread(enable_forwarding, self._sysctls, _versions(interfaces, tunnels))

    async def close(self) -> None:
        self._generations.close()

    async def _list(self) -> str | None:
        try:
            listing = await commands.run([self._program, "-j", "list", "table", *TABLE.split()])
        except DriverError as error:
            if _NO_SUCH_TABLE in str(error):
                return None
            raise
        return fingerprint(listing)


def fingerprint(listing: str) -> str:
    """The hash of `nft -j list table` without what changes by itself: handles, and the program's version."""
    objects = [item for item in json.loads(listing)["nftables"] if "metainfo" not in item]
    text = json.dumps(_without_handles(objects), sort_keys=True, separators=(",", ":"))
    return sha256(text.encode()).hexdigest()[:32]


def enable_forwarding(sysctls: Path, versions: Iterable[int]) -> None:
    """Let the host route, for IP versions in use. Blocks; what is on already is not written."""
    if 4 in (wanted := set(versions)):
        _switch_on(sysctls / "net/ipv4/ip_forward", "1")
    forwarding = sysctls / "net/ipv6/conf/all/forwarding"
    if 6 in wanted and _read(forwarding) != "1":
        # A router ignores router advertisements: without this the host would lose its own IPv6 default route.
        for accept in sorted(forwarding.parent.parent.glob("*/accept_ra")):
            if accept.parent.name not in ("all", "lo") and _read(accept) == "1":
                _switch_on(accept, "2")
        _switch_on(forwarding, "1")


def _versions(interfaces: Iterable[Interface], tunnels: Iterable[Tunnels]) -> set[int]:
    addresses = {ip_interface(address).version for spec in interfaces for address in spec.addresses}
    return addresses | {ip_network(network).version for each in tunnels for network in each.networks}


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise DriverError(f"{path} cannot be read: {error.strerror}") from error


def _switch_on(path: Path, value: str) -> None:
    if _read(path) == value:
        return
    try:
        path.write_text(value)
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            name = ".".join(path.relative_to(_SYSCTLS).parts) if path.is_relative_to(_SYSCTLS) else str(path)
            raise DriverError(f"{path} is read-only here: set {name} to {value} on the host") from error
        raise DriverError(f"{path} cannot be set to {value}: {error.strerror}") from error


def _without_handles(value: object) -> object:
    """Drop the keys that the kernel numbers, and what a counter has counted."""
    if isinstance(value, dict):
        dropped = {"handle", "packets", "bytes"}
        return {key: _without_handles(item) for key, item in value.items() if key not in dropped}
    if isinstance(value, list):
        return [_without_handles(item) for item in value]
    return value
