"""WireGuard in the kernel, over generic netlink."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterable, Sequence
from typing import Final

from agent.drivers.base import Device, Unsupported
from agent.drivers.netlink.channel import Channel, KernelRefused
from agent.drivers.netlink.rtnl import Rtnl
from agent.drivers.wireguard import dump, interface, message
from agent.drivers.wireguard.linux import GENL_CTRL
from agent.drivers.wireguard.server import ServerPeer
from shared.desired import Interface, Peer
from shared.keys import PrivateKey
from shared.protocol import PeerStats

_NETLINK_GENERIC = 16
_KIND = "wireguard"
_FEW = 4  # peers


class KernelWireGuard:
    """The WireGuardDriver over the kernel's netlink family; made by `open`."""

    backend: Final = "kernel"

    def __init__(self, channel: Channel, family: int) -> None:
        self._channel = channel
        self._family = family
        self._rtnl = Rtnl()

    @classmethod
    async def open(cls) -> KernelWireGuard:
        """Look the family up, which also loads the kernel's module; raise Unsupported where there is none."""
        channel = Channel(_NETLINK_GENERIC)
        try:
            (answer,) = await channel.request("look up WireGuard", GENL_CTRL, message.family_request())
        except KernelRefused as error:
            channel.close()
            if error.errno != errno.ENOENT:
                raise
            raise Unsupported("this kernel has no WireGuard") from error
        return cls(channel, dump.parse_family(answer))

    async def observe(self, name: str) -> Device | None:
        link = await interface.find(self._rtnl, name, _KIND)
        if link is None:
            return None
        answer = await self._dump(name)
        settings = dump.parse_settings(answer)
        return Device(
            name=name,
            public_key=settings.public_key,
            listen_port=settings.listen_port if link.up else 0,
            addresses=tuple(await self._rtnl.addresses(link)),
            mtu=link.mtu,
            generation=interface.generation(link),
            peers=await asyncio.to_thread(dump.parse_peers, answer),
        )

    async def fingerprint(self, name: str) -> bytes | None:
        link = await interface.find(self._rtnl, name, _KIND)
        if link is None:
            return None
        rest = await asyncio.to_thread(dump.fingerprint, await self._dump(name))
        return interface.fingerprint(link, await self._rtnl.addresses(link), rest)

    async def ensure(self, spec: Interface, private_key: PrivateKey) -> None:
        name = spec.name
        link = await interface.find(self._rtnl, name, _KIND)
        if link is None:
            await self._rtnl.create_link(name, _KIND, interface.new_tag())
            link = await interface.require(self._rtnl, name, _KIND)
        settings = dump.parse_settings(await self._dump(name))
        if settings.private_key != private_key.raw:  # to set it again would end every session
            await self._set(f"set the private key of {name}", [message.set_private_key(name, private_key)])
        await interface.settle(self._rtnl, link, spec)
        if not link.up:
            # Any port first: bringing it up on a port in use would fail without saying which.
            await self._set(f"reset the port of {name}", [message.set_listen_port(name, 0)])
            await self._rtnl.set_up(link)
            settings = dump.parse_settings(await self._dump(name))
        if spec.listen_port not in (0, settings.listen_port):
            what = f"listen on UDP port {spec.listen_port} for {name}"
            await self._set(what, [message.set_listen_port(name, spec.listen_port)])

    async def apply_peers(self, name: str, peers: Sequence[Peer]) -> None:
        await self._set(f"set {len(peers)} peers of {name}", _few(peers, message.set_peers(name, peers)))

    async def remove_peers(self, name: str, public_keys: Sequence[bytes]) -> None:
        requests = _few(public_keys, message.remove_peers(name, public_keys))
        await self._set(f"remove {len(public_keys)} peers of {name}", requests)

    async def set_server(self, name: str, server: ServerPeer) -> None:
        await self._set(f"set the server of {name}", message.set_server(name, server))

    async def stats(self, name: str) -> list[PeerStats]:
        return await asyncio.to_thread(dump.parse_stats, await self._dump(name))

    async def remove(self, name: str) -> None:
        link = await interface.find(self._rtnl, name, _KIND)
        if link is not None:
            await self._rtnl.delete_link(link)

    async def close(self) -> None:
        self._channel.close()
        self._rtnl.close()

    async def _set(self, what: str, requests: Iterable[bytes]) -> None:
        await self._channel.requests(what, self._family, requests)

    async def _dump(self, name: str) -> list[bytes]:
        return await self._channel.dump(f"read {name}", self._family, message.get_device(name))


def _few(items: Sequence[object], requests: Iterable[bytes]) -> Iterable[bytes]:
    """Encode what is little here, so that it can be sent from here; what is much, in the thread that sends it."""
    return list(requests) if len(items) <= _FEW else requests
