"""The tun devices of the logins: sshd opens one as the user, who may not make any, so that each is there before.

A device is persistent, belongs to the login's uid, and says in its alias whose address it was made for: one that says
something else is made anew. One program at a time may have it open.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from agent.drivers.base import DriverError
from agent.drivers.netlink.rtnl import Link, Rtnl
from agent.drivers.ssh.passwd import UIDS
from shared.services import TUN_PREFIX, SshTunnel

_CLONE = Path("/dev/net/tun")
_KIND = "tun"
_AT_ONCE = 1000  # made in one call: whoever is to be kicked waits for its end
# linux/if_tun.h
_TUNSETIFF, _TUNSETPERSIST, _TUNSETOWNER = 0x400454CA, 0x400454CB, 0x400454CC
_IFF_TUN, _IFF_NO_PI, _IFF_TUN_EXCL = 0x0001, 0x1000, 0x8000
_IFREQ = struct.Struct("=16sH22x")


@dataclass(frozen=True, slots=True)
class Tun:
    tunnel: SshTunnel
    uid: int

    @property
    def name(self) -> str:
        return self.tunnel.device

    @property
    def alias(self) -> str:
        return f"skynetvpn ssh {self.tunnel.server} {self.tunnel.client}"

    def is_as_made(self, link: Link) -> bool:
        return (link.alias, link.owner, link.up) == (self.alias, self.uid, True)


class Tuns:
    """In the network namespace of the first call."""

    def __init__(self) -> None:
        self._rtnl: Rtnl | None = None

    async def bring(self, wanted: Collection[Tun]) -> bool:
        """Have these, and no others of ours; return whether more are to be made by another call. What is as it should
        be is not touched, nor whoever uses it."""
        there = {link.name: link for link in await self._open().links(_KIND) if _is_ours(link)}
        known = {tun.name: tun for tun in wanted}
        right = {name for name, tun in known.items() if name in there and tun.is_as_made(there[name])}
        await self._open().delete_links([link for name, link in there.items() if name not in right])
        missing = [tun for name, tun in known.items() if name not in right]
        tried, failed = 0, dict[str, str]()
        while tried < len(missing) and tried - len(failed) < _AT_ONCE:
            failed |= await self._make(missing[tried : tried + _AT_ONCE])
            tried += _AT_ONCE
        if failed:
            raise DriverError(
                f"{len(failed)} of {len(known)} tun devices cannot be made: {next(iter(failed.values()))}"
            )
        return tried < len(missing)

    async def put(self, wanted: Mapping[str, Tun]) -> dict[str, str]:
        """Have these, too; return by the same keys why some are not there."""
        missing: dict[str, Tun] = {}
        stale: list[Link] = []
        for key, tun in wanted.items():
            link = await self._open().link(tun.name)
            if link is None or not tun.is_as_made(link):
                missing[key] = tun
                stale += [link] if link is not None and _is_ours(link) else []
        await self._open().delete_links(stale)
        failed = await self._make(missing.values())
        return {key: failed[tun.name] for key, tun in missing.items() if tun.name in failed}

    async def remove(self, gone: Collection[Tun]) -> None:
        """A device that has another owner by now stays."""
        links = [(tun, await self._open().link(tun.name)) for tun in gone]
        ours = [link for tun, link in links if link is not None and _is_ours(link) and link.owner == tun.uid]
        await self._open().delete_links(ours)

    async def users(self) -> set[int]:
        """The uids whose device is open."""
        links = await self._open().links(_KIND)
        return {link.owner for link in links if link.owner is not None and link.carrier and _is_ours(link)}

    def close(self) -> None:
        if self._rtnl is not None:
            self._rtnl.close()
            self._rtnl = None

    def _open(self) -> Rtnl:
        if self._rtnl is None:
            self._rtnl = Rtnl()
        return self._rtnl

    async def _make(self, tuns: Collection[Tun]) -> dict[str, str]:
        """Return by their names why some could not be made."""
        failed = await asyncio.to_thread(_create, tuns)
        for tun in [tun for tun in tuns if tun.name not in failed]:
            try:
                link = await self._open().link(tun.name)
                if link is None:
                    raise DriverError(f"{tun.name} disappeared as soon as it was made")
                await self._open().add_address(link, f"{tun.tunnel.server}/32", tun.tunnel.client)
                await self._open().set_up(link, tun.alias)  # last: what is half done is not as it should be
            except DriverError as error:
                failed[tun.name] = str(error)
        return failed


def _is_ours(link: Link) -> bool:
    return link.name.startswith(TUN_PREFIX) and link.owner in UIDS


def _create(tuns: Collection[Tun]) -> dict[str, str]:
    """Without address, and down; return by their names why some could not be made."""
    failed: dict[str, str] = {}
    for tun in tuns:
        try:
            descriptor = os.open(_CLONE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            failed[tun.name] = f"{_CLONE}: {error.strerror}: load the module tun, or turn `tun` off"
            continue
        try:
            flags = _IFF_TUN | _IFF_NO_PI | _IFF_TUN_EXCL
            fcntl.ioctl(descriptor, _TUNSETIFF, _IFREQ.pack(tun.name.encode(), flags))
            fcntl.ioctl(descriptor, _TUNSETOWNER, tun.uid)
            fcntl.ioctl(descriptor, _TUNSETPERSIST, 1)
        except OSError as error:
            failed[tun.name] = f"{tun.name} cannot be made: {error.strerror}"
        finally:
            os.close(descriptor)
    return failed
