"""WireGuard in a program of its own (wireguard-go or any other with the UAPI socket), which outlives the agent."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

from agent.drivers import commands
from agent.drivers.base import Device, DriverError, Unsupported
from agent.drivers.netlink.rtnl import Link, Rtnl
from agent.drivers.wireguard import interface, uapi
from agent.drivers.wireguard.server import ServerPeer
from agent.drivers.wireguard.uapisocket import UapiSocket
from shared.desired import Interface, Peer
from shared.keys import PrivateKey
from shared.protocol import PeerStats

SOCKETS = Path("/var/run/wireguard")
PROGRAM = "wireguard-go"
TUN = Path("/dev/net/tun")
_KIND = "tun"
# A whole set operation holds the program's lock: bigger ones would keep `wg show` and others waiting for longer.
_PATIENCE = 10.0  # seconds

T = TypeVar("T")


class UserspaceWireGuard:
    """The WireGuardDriver over UNIX sockets."""

    backend: Final = "userspace"

    def __init__(
        self, program: str = PROGRAM, sockets: Path = SOCKETS, known_keys: Mapping[bytes, bytes] | None = None
    ) -> None:
        self._program = program
        self._sockets = sockets
        self._open: dict[str, UapiSocket] = {}
        self._rtnl = Rtnl()
        self._public_keys = dict(known_keys or {})  # private -> public

    async def observe(self, name: str) -> Device | None:
        link = await interface.find(self._rtnl, name, _KIND)
        if link is None:
            return None
        settings, peers = await self._socket(name).get(f"read {name}", uapi.parse)
        return Device(
            name=name,
            public_key=self._public_key(settings.private_key),
            listen_port=settings.listen_port if link.up else 0,
            addresses=tuple(await self._rtnl.addresses(link)),
            mtu=link.mtu,
            generation=interface.generation(link),
            peers=peers,
        )

    async def fingerprint(self, name: str) -> bytes | None:
        link = await interface.find(self._rtnl, name, _KIND)
        if link is None:
            return None
        rest = await self._socket(name).get(f"read {name}", uapi.fingerprint)
        return interface.fingerprint(link, await self._rtnl.addresses(link), rest)

    async def ensure(self, spec: Interface, private_key: PrivateKey) -> None:
        name = spec.name
        link = await interface.find(self._rtnl, name, _KIND)
        await self._check_owner(name, link)
        if link is None:
            _check_tun()
            # It goes to the background by itself, when the interface is there and the socket answers.
            await commands.run([self._program, name])
            link = await interface.require(self._rtnl, name, _KIND)
        settings = await self._settings(name)
        if settings.private_key != private_key.raw:
            await self._socket(name).set(f"set the private key of {name}", uapi.set_private_key(private_key))
        await interface.settle(self._rtnl, link, spec)
        if not link.up:
            await self._bring_up(link)
            settings = await self._settings(name)
        if spec.listen_port not in (0, settings.listen_port):
            await self._listen(name, spec.listen_port, settings.listen_port)

    async def apply_peers(self, name: str, peers: Sequence[Peer]) -> None:
        what = f"set {len(peers)} peers of {name}"
        await self._socket(name).set(what, uapi.set_peers(peers))

    async def remove_peers(self, name: str, public_keys: Sequence[bytes]) -> None:
        what = f"remove {len(public_keys)} peers of {name}"
        await self._socket(name).set(what, uapi.remove_peers(public_keys))

    async def set_server(self, name: str, server: ServerPeer) -> None:
        await self._socket(name).set(f"set the server of {name}", uapi.set_server(server))

    async def stats(self, name: str) -> list[PeerStats]:
        return await self._socket(name).get(f"read the counters of {name}", uapi.parse_stats)

    async def remove(self, name: str) -> None:
        link = await interface.find(self._rtnl, name, _KIND)
        if link is None:
            return
        await self._check_owner(name, link)
        await self._rtnl.delete_link(link)  # the program ends with its interface

        async def ended() -> bool:
            return not await self._socket(name).answers()

        await _wait_until(ended, f"{self._program} did not end after {name} was deleted")
        self._open.pop(name).close()

    async def close(self) -> None:
        for opened in self._open.values():
            opened.close()
        self._open.clear()
        self._rtnl.close()

    def _socket(self, name: str) -> UapiSocket:
        if name not in self._open:
            self._open[name] = UapiSocket(self._sockets / f"{name}.sock")
        return self._open[name]

    async def _settings(self, name: str) -> uapi.Settings:
        return await self._socket(name).get(f"read {name}", uapi.parse_settings)

    async def _check_owner(self, name: str, link: Link | None) -> None:
        """Interface and socket must be there together, or neither: the files are shared by network namespaces."""
        path = self._sockets / f"{name}.sock"
        answers = await self._socket(name).answers()
        if answers and link is None:
            raise DriverError(
                f"a program answers at {path}, but its interface {name} is not in this network namespace: "
                "use another interface name here"
            )
        if link is not None and not answers:
            raise DriverError(f"{name} is there, but no program answers at {path}: delete {name} to have it made anew")

    async def _bring_up(self, link: Link) -> None:
        """Bring the link up and wait until the program has opened some port.

        Only then is a port in use an error; told before, the program would stay down and say nothing.
        """
        name = link.name
        await self._socket(name).set(f"reset the port of {name}", uapi.set_listen_port(0))
        await self._rtnl.set_up(link)

        async def listening() -> bool:
            return (await self._settings(name)).listen_port != 0

        await _wait_until(listening, f"{self._program} did not open a port for {name}")

    async def _listen(self, name: str, port: int, before: int) -> None:
        try:
            await self._socket(name).set(f"listen on UDP port {port} for {name}", uapi.set_listen_port(port))
        except DriverError:
            # The program would go on to name the port that it could not open.
            await self._socket(name).set(f"return {name} to port {before}", uapi.set_listen_port(before))
            raise

    def _public_key(self, private_key: bytes) -> bytes:
        if private_key and private_key not in self._public_keys:
            self._public_keys[private_key] = PrivateKey(private_key).public().raw
        return self._public_keys.get(private_key, b"")


def _check_tun() -> None:
    """Raise Unsupported with what is missing: the program says only that the kernel's WireGuard would be better."""
    try:
        os.close(os.open(TUN, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise Unsupported(
            f"{TUN} cannot be opened ({error.strerror}), and WireGuard outside the kernel needs it: on a host run "
            f"modprobe tun, give a container the device (--device {TUN} --cap-add NET_ADMIN)"
        ) from error


async def _wait_until(condition: Callable[[], Awaitable[bool]], otherwise: str) -> None:
    try:
        async with asyncio.timeout(_PATIENCE):
            while not await condition():  # noqa: ASYNC110 — another process changes it and tells nobody
                await asyncio.sleep(0.01)
    except TimeoutError as error:
        raise DriverError(f"{otherwise} within {_PATIENCE:g} s") from error
