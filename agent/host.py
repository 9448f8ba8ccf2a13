"""The host as the reconciler uses it: carries out a plan through the drivers, and finds out what exactly failed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from agent.drivers.base import Device, DeviceMissing, DriverError, FirewallDriver, Tunnels, WireGuardDriver
from agent.plan import Action, EnsureInterface, RemovePeer, SetPeer
from shared.desired import Interface, Peer
from shared.keys import PrivateKey
from shared.protocol import PeerStats

_MAX_SINGLE_FAILURES = 16  # after so many the fault is not in single peers

# What the loaded table was made for, and its fingerprint.
_Guarded = tuple[tuple[Interface | None, tuple[Tunnels, ...]], str | None] | None


class Host:
    def __init__(
        self,
        open_wireguard: Callable[[], Awaitable[WireGuardDriver]],
        firewall: FirewallDriver,
        key: PrivateKey,
        public_key: bytes,
    ) -> None:
        self._open_wireguard = open_wireguard
        self._opened: WireGuardDriver | None = None
        self._firewall = firewall
        self._key = key
        self._guarded: _Guarded = None
        self._loading = asyncio.Lock()  # servers are protected from tasks of their own
        self.public_key = public_key

    async def wireguard(self) -> WireGuardDriver:
        """The driver, opened at its first use and tried again while this host cannot do it; raise DriverError."""
        if self._opened is None:
            self._opened = await self._open_wireguard()
        return self._opened

    @property
    def backend(self) -> str:
        return self._opened.backend if self._opened is not None else ""

    async def observe(self, name: str) -> Device | None:
        return await (await self.wireguard()).observe(name)

    async def fingerprint(self, name: str) -> bytes | None:
        return await (await self.wireguard()).fingerprint(name)

    async def stats(self, name: str) -> list[PeerStats]:
        return await (await self.wireguard()).stats(name)

    async def remove(self, name: str) -> None:
        await (await self.wireguard()).remove(name)

    async def protect(self, interface: Interface | None, tunnels: tuple[Tunnels, ...] = ()) -> bool:
        """Load the packet filter unless it is as it was loaded; True where somebody else had changed it."""
        async with self._loading:
            fingerprint = await self._firewall.observe()
            made_for, loaded = self._guarded or (None, None)
            wanted = (interface, tunnels)
            if made_for == wanted and fingerprint is not None and fingerprint == loaded:
                return False
            await self._firewall.apply([interface] if interface is not None else [], tunnels)
            self._guarded = (wanted, await self._firewall.observe())
            return made_for == wanted

    async def carry_out(self, name: str, actions: Sequence[Action]) -> dict[bytes, str]:
        """Return the peers that failed, each with the driver's words.

        Raise DriverError where the interface itself cannot be had, DeviceMissing where it went away meanwhile.
        """
        for action in actions:
            if isinstance(action, EnsureInterface):
                await (await self.wireguard()).ensure(action.spec, self._key)
        failed: dict[bytes, str] = {}
        removals = [action.public_key for action in actions if isinstance(action, RemovePeer)]
        if removals:
            try:
                await (await self.wireguard()).remove_peers(name, removals)
            except DeviceMissing:
                raise
            except DriverError as error:
                failed |= dict.fromkeys(removals, str(error))
        await self._set(name, [action.peer for action in actions if isinstance(action, SetPeer)], failed)
        return failed

    async def close(self) -> None:
        if self._opened is not None:
            await self._opened.close()
        await self._firewall.close()

    async def _set(self, name: str, peers: Sequence[Peer], failed: dict[bytes, str]) -> None:
        """Set all at once; where that fails, halve, so that one bad peer does not keep out the others."""
        if not peers:
            return
        try:
            await (await self.wireguard()).apply_peers(name, peers)
        except DeviceMissing:
            raise
        except DriverError as error:
            if len(peers) == 1 or len(failed) >= _MAX_SINGLE_FAILURES:
                failed |= {peer.public_key: str(error) for peer in peers}
                return
            middle = len(peers) // 2
            await self._set(name, peers[:middle], failed)
            await self._set(name, peers[middle:], failed)
