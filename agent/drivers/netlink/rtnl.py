"""Links, addresses and routes of the host (rtnetlink(7))."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface

from agent.drivers.base import DeviceMissing
from agent.drivers.netlink.channel import Channel, KernelRefused
from agent.drivers.netlink.codec import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    attribute,
    attributes,
    nested,
    read_text,
    read_u32,
    text,
    u32,
)
from shared.addresses import Address, Network

_NETLINK_ROUTE = 0
_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK = 16, 17, 18
_RTM_NEWADDR, _RTM_DELADDR, _RTM_GETADDR = 20, 21, 22
_RTM_NEWROUTE, _RTM_DELROUTE, _RTM_GETROUTE = 24, 25, 26

_IFINFOMSG = struct.Struct("=BxHiII")  # family, type, index, flags, change
_IFADDRMSG = struct.Struct("=BBBBi")  # family, prefix length, flags, scope, index
_RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst length, src length, tos, table, protocol, scope, type, flags
_IFF_UP, _IFF_LOWER_UP = 1, 0x10000
_IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO, _IFLA_IFALIAS, _IFLA_GROUP = 3, 4, 18, 20, 27
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_IFLA_TUN_OWNER = 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST, _RTA_OIF, _RTA_GATEWAY = 1, 4, 5
_RT_TABLE_MAIN = 254
_RT_SCOPE_UNIVERSE, _RT_SCOPE_LINK = 0, 253
_RTN_UNICAST = 1
# Marks the routes that we made (rtm_protocol), so that they are found again and nobody else's are touched.
_OUR_ROUTES = 117
_DOOMED = 1_900_000_000  # the group of links that are about to be deleted


@dataclass(frozen=True, slots=True)
class Link:
    index: int
    name: str
    kind: str  # wireguard, tun, veth …; "" where the driver has none
    mtu: int
    up: bool
    alias: str
    owner: int | None = None  # uid of the only user who may open a tun device beside root
    carrier: bool = False  # a tun device has it while a program has it open


@dataclass(frozen=True, slots=True)
class Hop:
    """Where packets for a destination leave the host."""

    index: int
    gateway: Address | None
    unicast: bool  # False: the destination is the host itself, or cannot be reached


@dataclass(frozen=True, slots=True)
class Route:
    destination: Network
    index: int


class Rtnl:
    """The host's network configuration; all methods raise DriverError."""

    def __init__(self) -> None:
        self._channel = Channel(_NETLINK_ROUTE)

    def close(self) -> None:
        self._channel.close()

    async def link(self, name: str) -> Link | None:
        try:
            (answer,) = await self._channel.request(
                f"look up {name}", _RTM_GETLINK, _ifinfo() + text(_IFLA_IFNAME, name)
            )
        except DeviceMissing:
            return None
        return parse_link(answer)

    async def links(self, kind: str) -> list[Link]:
        """All of one kind."""
        # Kernels that know the kind list nothing else.
        payload = _ifinfo() + nested(_IFLA_LINKINFO, text(_IFLA_INFO_KIND, kind))
        found = await self._channel.dump(f"list the {kind} interfaces", _RTM_GETLINK, payload)
        return [link for link in map(parse_link, found) if link.kind == kind]

    async def create_link(self, name: str, kind: str, alias: str) -> None:
        # The alias comes second: not every kernel takes it at creation.
        info = nested(_IFLA_LINKINFO, text(_IFLA_INFO_KIND, kind))
        payload = _ifinfo() + text(_IFLA_IFNAME, name) + info
        await self._channel.request(f"create {name}", _RTM_NEWLINK, payload, NLM_F_CREATE | NLM_F_EXCL)
        await self._channel.request(f"tag {name}", _RTM_NEWLINK, _ifinfo() + text(_IFLA_IFNAME, name) + _alias(alias))

    async def set_alias(self, link: Link, alias: str) -> None:
        await self._channel.request(f"tag {link.name}", _RTM_NEWLINK, _ifinfo(link.index) + _alias(alias))

    async def rename(self, link: Link, name: str) -> None:
        """One that is down."""
        payload = _ifinfo(link.index) + text(_IFLA_IFNAME, name)
        await self._channel.request(f"rename {link.name} to {name}", _RTM_NEWLINK, payload)

    async def set_mtu(self, link: Link, mtu: int) -> None:
        payload = _ifinfo(link.index) + u32(_IFLA_MTU, mtu)
        await self._channel.request(f"set the MTU of {link.name} to {mtu}", _RTM_NEWLINK, payload)

    async def set_up(self, link: Link, alias: str | None = None) -> None:
        payload = _IFINFOMSG.pack(socket.AF_UNSPEC, 0, link.index, _IFF_UP, _IFF_UP)
        if alias is not None:
            payload += _alias(alias)
        await self._channel.request(f"bring {link.name} up", _RTM_NEWLINK, payload)

    async def delete_link(self, link: Link) -> None:
        try:
            await self._channel.request(f"delete {link.name}", _RTM_DELLINK, _ifinfo(link.index))
        except DeviceMissing:
            return

    async def delete_links(self, links: Collection[Link]) -> None:
        """Delete many as one: the kernel waits once until nobody uses any of them, and not once for each."""
        doomed = u32(_IFLA_GROUP, _DOOMED)
        with contextlib.suppress(DeviceMissing):
            for link in links:
                with contextlib.suppress(DeviceMissing):
                    await self._channel.request(f"mark {link.name}", _RTM_NEWLINK, _ifinfo(link.index) + doomed)
            if links:
                await self._channel.request("delete marked interfaces", _RTM_DELLINK, _ifinfo() + doomed)

    async def addresses(self, link: Link) -> list[str]:
        """The interface's addresses as address/prefix, without link-local ones."""
        found = await self._channel.dump(f"list the addresses of {link.name}", _RTM_GETADDR, bytes(_IFADDRMSG.size))
        parsed = [parse_address(payload) for payload in found]
        return [address for index, address in parsed if index == link.index and not _is_link_local(address)]

    async def add_address(self, link: Link, address: str, peer: Address | None = None) -> None:
        """`peer` is the address of the other end, where that is in no network of this one."""
        await self._change_address(f"add {address} to {link.name}", _RTM_NEWADDR, link, address, NLM_F_CREATE, peer)

    async def delete_address(self, link: Link, address: str) -> None:
        try:
            await self._change_address(f"take {address} from {link.name}", _RTM_DELADDR, link, address, 0)
        except KernelRefused as error:
            if error.errno != errno.EADDRNOTAVAIL:  # gone together with the primary address of its subnet
                raise

    async def hop_to(self, destination: Address) -> Hop:
        """Ask the kernel which way packets to this address go now."""
        payload = _rtmsg(destination.version, destination.max_prefixlen) + attribute(_RTA_DST, destination.packed)
        (answer,) = await self._channel.request(f"find the route to {destination}", _RTM_GETROUTE, payload)
        return parse_hop(answer)

    async def add_route(self, destination: Network, index: int, gateway: Address | None = None) -> None:
        """Route a prefix by an interface, marked as ours; one of ours that is there already is replaced."""
        scope = _RT_SCOPE_UNIVERSE if gateway or destination.version == 6 else _RT_SCOPE_LINK
        payload = _route(destination, index, scope)
        if gateway is not None:
            payload += attribute(_RTA_GATEWAY, gateway.packed)
        await self._channel.request(
            f"add the route to {destination}", _RTM_NEWROUTE, payload, NLM_F_CREATE | NLM_F_REPLACE
        )

    async def delete_route(self, route: Route) -> None:
        payload = _route(route.destination, route.index, 255)  # scope 255: any
        try:
            await self._channel.request(f"delete the route to {route.destination}", _RTM_DELROUTE, payload)
        except KernelRefused as error:
            if error.errno != errno.ESRCH:
                raise

    async def our_routes(self) -> list[Route]:
        found = await self._channel.dump("list the routes", _RTM_GETROUTE, bytes(_RTMSG.size))
        return [route for route in map(parse_our_route, found) if route is not None]

    async def _change_address(
        self, what: str, type_: int, link: Link, address: str, flags: int, peer: Address | None = None
    ) -> None:
        interface = ip_interface(address)
        packed = interface.ip.packed
        payload = (
            _IFADDRMSG.pack(_family(interface.version), interface.network.prefixlen, 0, 0, link.index)
            + attribute(_IFA_LOCAL, packed)
            + attribute(_IFA_ADDRESS, peer.packed if peer is not None else packed)
        )
        await self._channel.request(what, type_, payload, flags)


def parse_link(payload: bytes) -> Link:
    """Read an RTM_NEWLINK."""
    _family, _type, index, flags, _change = _IFINFOMSG.unpack_from(payload)
    values = dict(attributes(memoryview(payload)[_IFINFOMSG.size :]))
    info = dict(attributes(values.get(_IFLA_LINKINFO, memoryview(b""))))
    kind = read_text(info.get(_IFLA_INFO_KIND, memoryview(b"")))
    data = dict(attributes(info[_IFLA_INFO_DATA])) if kind == "tun" and _IFLA_INFO_DATA in info else {}
    return Link(
        index=index,
        name=read_text(values[_IFLA_IFNAME]),
        kind=kind,
        mtu=read_u32(values[_IFLA_MTU]),
        up=bool(flags & _IFF_UP),
        alias=read_text(values.get(_IFLA_IFALIAS, memoryview(b""))),
        owner=read_u32(data[_IFLA_TUN_OWNER]) if _IFLA_TUN_OWNER in data else None,
        carrier=bool(flags & _IFF_LOWER_UP),
    )


def parse_address(payload: bytes) -> tuple[int, str]:
    """Read an RTM_NEWADDR as interface index and address/prefix."""
    _family, prefix, _flags, _scope, index = _IFADDRMSG.unpack_from(payload)
    values = dict(attributes(memoryview(payload)[_IFADDRMSG.size :]))
    # On a point-to-point link IFA_ADDRESS is the other end; IPv6 has no IFA_LOCAL elsewhere.
    raw = values.get(_IFA_LOCAL, values.get(_IFA_ADDRESS, memoryview(b"")))
    return index, f"{ip_address(bytes(raw))}/{prefix}"


def parse_hop(payload: bytes) -> Hop:
    """Read the RTM_NEWROUTE that answers a look-up."""
    values = dict(attributes(memoryview(payload)[_RTMSG.size :]))
    gateway = values.get(_RTA_GATEWAY)
    return Hop(
        index=read_u32(values[_RTA_OIF]) if _RTA_OIF in values else 0,
        gateway=ip_address(bytes(gateway)) if gateway is not None else None,
        unicast=_RTMSG.unpack_from(payload)[7] == _RTN_UNICAST,
    )


def parse_our_route(payload: bytes) -> Route | None:
    """Read an RTM_NEWROUTE of the main table, or None where it is not marked as ours."""
    family, length, _src, _tos, table, protocol, _scope, _type, _flags = _RTMSG.unpack_from(payload)
    if protocol != _OUR_ROUTES or table != _RT_TABLE_MAIN:
        return None
    values = dict(attributes(memoryview(payload)[_RTMSG.size :]))
    empty = bytes(4 if family == socket.AF_INET else 16)
    destination = ip_interface((bytes(values.get(_RTA_DST, empty)), length)).network
    return Route(destination, read_u32(values[_RTA_OIF]))


def _ifinfo(index: int = 0) -> bytes:
    return _IFINFOMSG.pack(socket.AF_UNSPEC, 0, index, 0, 0)


def _alias(value: str) -> bytes:
    return attribute(_IFLA_IFALIAS, value.encode())


def _rtmsg(version: int, length: int) -> bytes:
    return _RTMSG.pack(_family(version), length, 0, 0, 0, 0, 0, 0, 0)


def _route(destination: Network, index: int, scope: int) -> bytes:
    head = _RTMSG.pack(
        _family(destination.version), destination.prefixlen, 0, 0, _RT_TABLE_MAIN, _OUR_ROUTES, scope, _RTN_UNICAST, 0
    )
    return head + attribute(_RTA_DST, destination.network_address.packed) + u32(_RTA_OIF, index)


def _family(version: int) -> int:
    return socket.AF_INET if version == 4 else socket.AF_INET6


def _is_link_local(address: str) -> bool:
    return ip_interface(address).ip.is_link_local
