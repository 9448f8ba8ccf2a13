"""The ports between the agent's rules and the host, and the errors that cross them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.desired import Interface, Peer
from shared.keys import PrivateKey
from shared.protocol import PeerStats


class DriverError(Exception):
    """The host refused or failed; the text is the host's own words and names no secret."""


class DeviceMissing(DriverError):
    """The interface is not there (any more)."""


class Unsupported(DriverError):
    """This host cannot do it at all (no kernel module, no program)."""


@dataclass(frozen=True, slots=True)
class Device:
    """What the host really has of one WireGuard interface."""

    name: str
    public_key: bytes  # 32 bytes; b"" where no private key is set
    listen_port: int  # 0 while the interface is down: it listens nowhere
    addresses: tuple[str, ...]  # address/prefix, without link-local ones
    mtu: int
    generation: str  # changes whenever the interface was created anew, and its counters started at 0
    peers: tuple[Peer, ...]  # as Peer.digest() compares them; not_after is always None


class WireGuardDriver(Protocol):
    """One host's WireGuard interfaces. All methods raise DriverError; calls for one interface never overlap.

    `observe` reads the host, it never answers from a cache. `apply_peers` and `remove_peers` send exactly what they
    are given, removals first where both are wanted by the caller; a live peer's endpoint and counters survive.
    """

    @property
    def backend(self) -> str:
        """kernel | userspace, as Hello tells the controller."""
        ...

    async def observe(self, name: str) -> Device | None:
        """Read the interface and all its peers, or None where there is none."""
        ...

    async def fingerprint(self, name: str) -> bytes | None:
        """A hash of all that `observe` would tell, read from the host at a fraction of its cost; None as there.

        Two equal ones mean that nothing but counters, handshakes and endpoints has changed.
        """
        ...

    async def ensure(self, spec: Interface, private_key: PrivateKey) -> None:
        """Create the interface or adopt the one that runs, then set key, port, addresses and MTU where they differ.

        An adopted interface gets its generation here: read it afterwards. Port 0 leaves the port to the host.
        """
        ...

    async def apply_peers(self, name: str, peers: Sequence[Peer]) -> None:
        """Add the peers, or set those that exist to exactly this (allowed IPs replaced)."""
        ...

    async def remove_peers(self, name: str, public_keys: Sequence[bytes]) -> None:
        """Remove the peers; one that is not there is no error."""
        ...

    async def stats(self, name: str) -> list[PeerStats]:
        """Read the counters of all peers."""
        ...

    async def remove(self, name: str) -> None:
        """Delete the interface; none there is no error."""
        ...

    async def close(self) -> None:
        """Let go of sockets; what runs on the host stays."""
        ...


class FirewallDriver(Protocol):
    """The agent's own packet filter table: NAT, forwarding, isolation. Other tables are never touched."""

    async def observe(self) -> str | None:
        """The fingerprint of the loaded table, read from the host, or None where it is not there.

        Compare it with the one observed right after `apply`: another one means that somebody changed the table.
        """
        ...

    async def apply(self, interfaces: Sequence[Interface]) -> None:
        """Replace the whole table in one transaction, and turn forwarding on where it is needed."""
        ...

    async def close(self) -> None:
        """Let go of the host; the rules stay."""
        ...
