"""What must be done so that the host has what is desired: pure; the actions are also the log and the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_interface

from agent.desired import Change
from agent.drivers.base import Device
from shared.desired import Interface, Peer
from shared.keys import encode_key


@dataclass(frozen=True, slots=True)
class EnsureInterface:
    spec: Interface
    reason: str

    def __str__(self) -> str:
        return f"set up interface {self.spec.name}: {self.reason}"


@dataclass(frozen=True, slots=True)
class RemovePeer:
    public_key: bytes

    def __str__(self) -> str:
        return f"remove peer {encode_key(self.public_key)}"


@dataclass(frozen=True, slots=True)
class SetPeer:
    peer: Peer
    new: bool

    def __str__(self) -> str:
        return f"{'add' if self.new else 'change'} peer {self.peer.key} ({', '.join(self.peer.allowed_ips)})"


Action = EnsureInterface | RemovePeer | SetPeer


def plan(
    device: Device | None, interface: Interface, peers: Mapping[bytes, Peer], *, public_key: bytes, prune: bool = True
) -> list[Action]:
    """The interface, then removals, then changes, then additions; an empty list is normal.

    Changed peers go before new ones, so that an allowed IP is given up before somebody else gets it. Without `prune`
    a peer that nobody asked for stays: nothing may be removed from a host before its first sync.
    """
    actions: list[Action] = []
    reason = interface_differs(device, interface, public_key)
    if reason is not None:
        actions.append(EnsureInterface(interface, reason))
    observed = {peer.public_key: peer for peer in device.peers} if device is not None else {}
    if prune:
        actions += [RemovePeer(key) for key in observed if key not in peers]
    changed = [
        peer for key, peer in peers.items() if (there := observed.get(key)) is not None and peer_differs(there, peer)
    ]
    actions += [SetPeer(peer, new=False) for peer in _releases_first(changed, observed)]
    actions += [SetPeer(peer, new=True) for key, peer in peers.items() if key not in observed]
    return actions


def steps(change: Change, failed: Iterable[bytes] = ()) -> list[Action]:
    """The same for a change of peers on a host that had what was desired before, but for the `failed` ones."""
    retry = set(failed)
    actions: list[Action] = [RemovePeer(key) for key in change.withdrawn if key not in change.admitted]
    before = {key: peer for key, (_, peer) in change.withdrawn.items()}
    changed, new = [], []
    for key, (_, peer) in change.admitted.items():
        if key not in before:
            new.append(peer)
        elif key in retry or peer_differs(before[key], peer):
            changed.append(peer)
    actions += [SetPeer(peer, new=False) for peer in _releases_first(changed, before)]
    return actions + [SetPeer(peer, new=True) for peer in new]


def interface_differs(device: Device | None, spec: Interface, public_key: bytes) -> str | None:
    """Why the interface must be set up, or None."""
    if device is None:
        return "it is not there"
    if device.public_key != public_key:
        return "it has another private key"
    if device.listen_port != spec.listen_port:
        return f"it listens on port {device.listen_port}, not {spec.listen_port}"
    if device.mtu != spec.mtu:
        return f"its MTU is {device.mtu}, not {spec.mtu}"
    if _canonical(device.addresses) != _canonical(spec.addresses):
        return f"its addresses are {', '.join(device.addresses) or 'none'}, not {', '.join(spec.addresses)}"
    return None


def peer_differs(observed: Peer, desired: Peer) -> bool:
    """Whether the host shows the peer otherwise; the lease is not on the host."""
    return (
        (observed.allowed_ips != desired.allowed_ips and sorted(observed.allowed_ips) != sorted(desired.allowed_ips))
        or observed.keepalive != desired.keepalive
        or _preshared(observed) != _preshared(desired)
    )


def _releases_first(changed: list[Peer], before: Mapping[bytes, Peer]) -> list[Peer]:
    """Peers that only give up addresses, then those that take some."""
    return sorted(changed, key=lambda peer: not set(peer.allowed_ips) <= set(before[peer.public_key].allowed_ips))


def _preshared(peer: Peer) -> bytes:
    """All zero is how WireGuard writes "none"."""
    return peer.preshared_key if peer.preshared_key and any(peer.preshared_key) else b""


def _canonical(addresses: Iterable[str]) -> set[str]:
    return {str(ip_interface(address)) for address in addresses}
