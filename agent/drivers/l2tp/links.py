"""The ppp interfaces of the host: their counters in one dump, and their coming and going as it happens."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from agent.drivers.base import DriverError
from agent.drivers.netlink.channel import Channel
from agent.drivers.netlink.codec import (
    MalformedMessage,
    attributes,
    messages,
    nested,
    read_text,
    text,
)

_NETLINK_ROUTE = 0
_RTMGRP_LINK = 1
_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK = 16, 17, 18
_IFINFOMSG = struct.Struct("=BxHiII")  # family, type, index, flags, change
_STATS64 = struct.Struct("=4Q")  # rx packets, tx packets, rx bytes, tx bytes; more follow
_IFF_UP = 1
_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_STATS64 = 3, 18, 23
_IFLA_INFO_KIND = 1
_RECEIVE_BYTES = 64 * 1024
_BUFFER_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class PppLink:
    name: str
    up: bool
    rx: int  # bytes that came in
    tx: int


def parse_ppp_link(payload: bytes | memoryview) -> PppLink | None:
    """Read an RTM_NEWLINK or RTM_DELLINK; None where it is no ppp interface."""
    view = memoryview(payload)
    _family, _type, _index, flags, _change = _IFINFOMSG.unpack_from(view)
    values = dict(attributes(view[_IFINFOMSG.size :]))
    info = dict(attributes(values.get(_IFLA_LINKINFO, memoryview(b""))))
    if read_text(info.get(_IFLA_INFO_KIND, memoryview(b""))) != "ppp" or _IFLA_STATS64 not in values:
        return None
    _, _, rx, tx = _STATS64.unpack_from(values[_IFLA_STATS64])
    return PppLink(read_text(values[_IFLA_IFNAME]), bool(flags & _IFF_UP), rx, tx)


class PppLinks:
    """`came` is called when an interface is up, `gone` with its last counters, `lost` when events were lost."""

    def __init__(
        self, came: Callable[[PppLink], None], gone: Callable[[PppLink], None], lost: Callable[[], None]
    ) -> None:
        self._came, self._gone, self._lost = came, gone, lost
        self._channel = Channel(_NETLINK_ROUTE)
        self._events = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, _NETLINK_ROUTE
        )
        self._events.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        self._events.bind((0, _RTMGRP_LINK))
        asyncio.get_running_loop().add_reader(self._events, self._read)

    async def list(self) -> dict[str, PppLink]:
        """All ppp interfaces by name."""
        # Kernels that know the kind list nothing else.
        payload = _IFINFOMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + nested(_IFLA_LINKINFO, text(_IFLA_INFO_KIND, "ppp"))
        found = await self._channel.dump("list the ppp interfaces", _RTM_GETLINK, payload)
        while self._read():  # an interface that is not in the list has left its last counters there
            continue
        return {link.name: link for link in map(parse_ppp_link, found) if link is not None}

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._events)
        self._events.close()
        self._channel.close()

    def _read(self) -> bool:
        """Take one datagram; False where there is none."""
        try:
            data = self._events.recv(_RECEIVE_BYTES)
            for part in messages(data):
                if part.type not in (_RTM_NEWLINK, _RTM_DELLINK) or (link := parse_ppp_link(part.payload)) is None:
                    continue
                if part.type == _RTM_DELLINK:
                    self._gone(link)
                elif link.up:
                    self._came(link)
        except BlockingIOError:
            return False
        except (OSError, MalformedMessage, DriverError):  # ENOBUFS: more happened than the buffer holds
            self._lost()
        return True
