"""The LimitsDriver by nft and tc: one call of each for a change, none where nothing changed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Mapping, Sequence
from ipaddress import ip_address

from agent.drivers import commands
from agent.drivers.base import Allowed, DriverError
from agent.drivers.limits import shaping, table
from agent.drivers.limits.shaping import DOWN, UP, Places, Shape
from agent.drivers.netlink.rtnl import Rtnl

_ALIAS = "skynetvpn limits"


class KernelLimits:
    """The first `apply` of a process begins anew: what a former one left in the kernel is replaced by it."""

    def __init__(self) -> None:
        self._rtnl = Rtnl()
        self._content: table.Content | None = None  # None: the table is not known to be ours
        self._shapes: dict[int, Shape] | None = None  # likewise the queues
        self._places = Places()
        self._minors: dict[int, int] = {}
        self._devices: frozenset[tuple[int, str]] = frozenset()  # that are led through: index and name

    async def apply(self, accounts: Sequence[Allowed]) -> None:
        await self._allow(accounts)
        await self._shape(accounts)

    async def close(self) -> None:
        self._rtnl.close()

    async def _allow(self, accounts: Sequence[Allowed]) -> None:
        wanted = table.content(accounts)
        known, self._content = self._content, None  # until it is done
        empty = table.Content()
        if known is None or (known == empty and wanted != empty):
            text = table.create() + table.change(empty, wanted) if wanted != empty else table.remove()
        elif wanted == empty != known:
            text = table.remove()
        else:
            text = table.change(known, wanted)
        if text:
            await commands.run(["nft", "-f", "-"], stdin=text)
        self._content = wanted

    async def _shape(self, accounts: Sequence[Allowed]) -> None:
        wanted = self._wanted(accounts)
        known, self._shapes = self._shapes, None
        if known is None and not wanted and await self._rtnl.link(UP) is None:
            self._shapes = wanted  # nothing to limit, and nobody ever did
            return
        if known is None or (not known and wanted):
            await self._begin()
            known = {}
        if known != wanted or not self._devices <= await asyncio.to_thread(_devices):
            devices = await self._devices_of(wanted)
            await self._loosely([shaping.release(name) for _, name in sorted(self._devices - devices)])
            await self._tc(shaping.change(known, wanted, self._places))
            new = [name for _, name in sorted(devices - self._devices)]
            await self._loosely([shaping.release(name) for name in new])  # of a former process
            await self._tc([line for name in new for line in shaping.lead_through(name)])
            self._devices = devices
        self._shapes = wanted

    async def _begin(self) -> None:
        """The ifb devices with empty queues. They are never deleted: packets that are still led there must pass."""
        self._places, self._devices = Places(), frozenset()
        for device in (UP, DOWN):
            if await self._rtnl.link(device) is None:
                await self._rtnl.create_link(device, "ifb", _ALIAS)
            link = await self._rtnl.link(device)
            if link is not None and not link.up:
                await self._rtnl.set_up(link)
        await self._loosely([f"qdisc del dev {device} root" for device in (UP, DOWN)])
        await self._tc([line for device in (UP, DOWN) for line in shaping.set_up(device)])

    def _wanted(self, accounts: Sequence[Allowed]) -> dict[int, Shape]:
        shapes: dict[int, Shape] = {}
        limited = {each.account: each for each in accounts if each.addresses and (each.rate_up or each.rate_down)}
        self._minors = {account: minor for account, minor in self._minors.items() if account in limited}
        used = set(self._minors.values())
        free = (minor for minor in range(1, shaping.MAX_CLASSES + 1) if minor not in used)
        for account, each in limited.items():
            if account not in self._minors:
                minor = next(free, None)
                if minor is None:
                    raise DriverError(f"more than {shaping.MAX_CLASSES} accounts with a speed limit on one host")
                self._minors[account] = minor
            rates = {UP: each.rate_up, DOWN: each.rate_down}
            shapes[account] = Shape(
                self._minors[account],
                {device: rate for device, rate in rates.items() if rate},
                tuple(sorted(each.addresses)),
            )
        return shapes

    async def _devices_of(self, wanted: Mapping[int, Shape]) -> frozenset[tuple[int, str]]:
        found = set()
        names = dict(await asyncio.to_thread(_devices))
        for shape in wanted.values():
            for address in shape.addresses:
                with contextlib.suppress(DriverError):  # the session has just ended: no way leads there
                    hop = await self._rtnl.hop_to(ip_address(address))
                    if hop.unicast and hop.gateway is None and hop.index in names:
                        found.add((hop.index, names[hop.index]))
        return frozenset(found)

    async def _tc(self, lines: Sequence[str]) -> None:
        if lines:
            await commands.run(["tc", "-batch", "-"], stdin=shaping.batch(lines))

    async def _loosely(self, lines: Sequence[str]) -> None:
        """Take away what may be gone already, with its device."""
        if lines:
            with contextlib.suppress(DriverError):
                await commands.run(["tc", "-force", "-batch", "-"], stdin=shaping.batch(lines))


def _devices() -> set[tuple[int, str]]:
    """An index is not used again soon, a name is."""
    return set(socket.if_nameindex())
