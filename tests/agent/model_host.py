"""A host in memory that behaves as WireGuard does: one owner per allowed IP, and the last who asks gets it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_interface

from agent.drivers.base import Device, DeviceMissing, DriverError, Tunnels
from shared.desired import Interface, Peer
from shared.keys import PrivateKey
from shared.protocol import PeerStats


@dataclass
class ModelPeer:
    allowed_ips: tuple[str, ...]
    preshared_key: bytes | None
    keepalive: int
    rx: int = 0
    tx: int = 0
    handshake: int = 0


@dataclass
class ModelDevice:
    spec: Interface
    key: PrivateKey | None
    generation: str
    peers: dict[bytes, ModelPeer] = field(default_factory=dict)


class ModelWireGuard:
    backend = "userspace"

    def __init__(self) -> None:
        self.devices: dict[str, ModelDevice] = {}
        self.calls: list[tuple[str, object]] = []
        self.poison: dict[bytes, str] = {}  # public keys that the host refuses, with its words
        self.failing: dict[str, DriverError] = {}  # method -> what it raises
        self.closed = False
        self._created = 0

    def create(self, spec: Interface, key: PrivateKey | None = None) -> ModelDevice:
        self._created += 1
        device = ModelDevice(spec, key, f"generation-{self._created}")
        self.devices[spec.name] = device
        return device

    def writes(self) -> list[tuple[str, object]]:
        return [call for call in self.calls if call[0] not in ("observe", "fingerprint", "stats")]

    async def observe(self, name: str) -> Device | None:
        self._enter("observe", name)
        device = self.devices.get(name)
        if device is None:
            return None
        return Device(
            name=name,
            public_key=device.key.public().raw if device.key is not None else b"",
            listen_port=device.spec.listen_port,
            addresses=tuple(str(ip_interface(address)) for address in device.spec.addresses),
            mtu=device.spec.mtu,
            generation=device.generation,
            peers=tuple(
                Peer(
                    public_key=key,
                    allowed_ips=tuple(sorted(peer.allowed_ips)),
                    preshared_key=peer.preshared_key,
                    keepalive=peer.keepalive,
                )
                for key, peer in device.peers.items()
            ),
        )

    async def fingerprint(self, name: str) -> bytes | None:
        self._enter("fingerprint", name)
        device = self.devices.get(name)
        if device is None:
            return None
        peers = {key: (peer.allowed_ips, peer.preshared_key, peer.keepalive) for key, peer in device.peers.items()}
        return repr((device.spec, device.key and device.key.raw, device.generation, peers)).encode()

    async def ensure(self, spec: Interface, private_key: PrivateKey) -> None:
        self._enter("ensure", spec.name)
        device = self.devices.get(spec.name) or self.create(spec)
        device.spec, device.key = spec, private_key

    async def apply_peers(self, name: str, peers: Sequence[Peer]) -> None:
        self._enter("apply_peers", [peer.public_key for peer in peers])
        device = self._device(name)
        for peer in peers:
            if peer.public_key in self.poison:
                raise DriverError(self.poison[peer.public_key])
            for other in device.peers.values():
                other.allowed_ips = tuple(prefix for prefix in other.allowed_ips if prefix not in peer.allowed_ips)
            there = device.peers.setdefault(peer.public_key, ModelPeer((), None, 0))
            there.allowed_ips = peer.allowed_ips
            there.preshared_key = peer.preshared_key
            there.keepalive = peer.keepalive

    async def remove_peers(self, name: str, public_keys: Sequence[bytes]) -> None:
        self._enter("remove_peers", list(public_keys))
        device = self._device(name)
        for key in public_keys:
            device.peers.pop(key, None)

    async def stats(self, name: str) -> list[PeerStats]:
        self._enter("stats", name)
        return [
            PeerStats(key, peer.rx, peer.tx, peer.handshake, "198.51.100.1:1000" if peer.handshake else "")
            for key, peer in self._device(name).peers.items()
        ]

    async def remove(self, name: str) -> None:
        self._enter("remove", name)
        self.devices.pop(name, None)

    async def close(self) -> None:
        self.closed = True

    def _enter(self, method: str, argument: object) -> None:
        self.calls.append((method, argument))
        if method in self.failing:
            raise self.failing[method]

    def _device(self, name: str) -> ModelDevice:
        if name not in self.devices:
            raise DeviceMissing(f"{name}: no such device")
        return self.devices[name]


class ModelFirewall:
    def __init__(self) -> None:
        self.loaded: tuple[Interface, ...] | None = None
        self.tunnels: tuple[Tunnels, ...] = ()
        self.failing: DriverError | None = None
        self.loads = 0

    async def observe(self) -> str | None:
        if self.failing is not None:
            raise self.failing
        return None if self.loaded is None else repr((self.loaded, self.tunnels))

    async def apply(self, interfaces: Sequence[Interface], tunnels: Sequence[Tunnels] = ()) -> None:
        if self.failing is not None:
            raise self.failing
        self.loads += 1
        self.loaded, self.tunnels = tuple(interfaces), tuple(tunnels)

    async def close(self) -> None:
        """The rules stay."""
