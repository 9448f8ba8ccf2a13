"""Our table on the host: loads its rules, reads its counters."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path

from agent.drivers import commands
from agent.drivers.base import DriverError
from agent.drivers.netlink.channel import Channel, KernelRefused
from agent.drivers.ssh.rules import FAMILY, GET_ELEMENTS, TABLE, Address, Client, parse, render, render_forget, request

_NETLINK_NETFILTER = 12
_RESOLV_CONF = Path("/etc/resolv.conf")


class Counters:
    def __init__(self) -> None:
        self._channel: Channel | None = None
        self._loaded: tuple[str, str | None] = ("", None)  # the text, and the table as it was listed after it

    async def ensure(self, port: int) -> None:
        """Load the table where it is not there, or not as it was loaded."""
        wanted = render([port], await asyncio.to_thread(_resolvers))
        text, listed = self._loaded
        if text == wanted and listed is not None and listed == await self._listing():
            return
        await commands.run(["nft", "-f", "-"], stdin=wanted)
        self._loaded = (wanted, await self._listing())

    async def read(self) -> tuple[dict[Client, int], dict[Client, int]]:
        """Bytes from and to each client since it came; empty where the table is not there."""
        rx4, rx6, tx4, tx6 = [await self._elements(name) for name in ("rx4", "rx6", "tx4", "tx6")]
        return rx4 | rx6, tx4 | tx6

    async def forget(self, clients: Iterable[Client]) -> None:
        await commands.run(["nft", "-f", "-"], stdin=render_forget(clients))

    async def remove(self) -> None:
        # Deleting a table that is not there is an error, adding one that is there is not.
        table = f"{FAMILY} {TABLE}"
        await commands.run(["nft", "-f", "-"], stdin=f"add table {table}\ndelete table {table}\n")
        self._loaded = ("", None)

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    async def _elements(self, name: str) -> dict[Client, int]:
        if self._channel is None:
            self._channel = Channel(_NETLINK_NETFILTER)
        try:
            return parse(await self._channel.dump(f"read {name} of {TABLE}", GET_ELEMENTS, request(name)))
        except KernelRefused as error:
            if error.errno == errno.ENOENT:
                return {}
            raise

    async def _listing(self) -> str | None:
        """The table without its elements; None where it is not there."""
        try:
            return await commands.run(["nft", "-s", "-t", "list", "table", FAMILY, TABLE])
        except DriverError as error:
            if "No such file or directory" in str(error):
                return None
            raise


def _resolvers() -> list[Address]:
    """The host's name servers; without any the C library asks its own host (resolv.conf(5))."""
    found: list[Address] = []
    with contextlib.suppress(OSError):
        for line in _RESOLV_CONF.read_text(errors="replace").splitlines():
            fields = line.split()
            if len(fields) >= 2 and fields[0] == "nameserver":
                with contextlib.suppress(ValueError):
                    found.append(ip_address(fields[1].partition("%")[0]))
    return found[:3] or [ip_address("127.0.0.1")]
