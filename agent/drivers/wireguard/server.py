"""The client's only peer: the server, at an address that is known beforehand."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.addresses import Address
from shared.desired import Peer
from shared.keys import PresharedKey, PublicKey


@dataclass(frozen=True, slots=True)
class ServerPeer:
    public_key: PublicKey
    endpoint: tuple[Address, int]
    allowed_ips: tuple[str, ...] = ("0.0.0.0/0", "::/0")
    preshared_key: PresharedKey | None = field(default=None, repr=False)
    keepalive: int = 25  # seconds; keeps the way back through NAT open

    @property
    def peer(self) -> Peer:
        """The part that every peer has."""
        return Peer(
            public_key=self.public_key.raw,
            allowed_ips=self.allowed_ips,
            preshared_key=self.preshared_key.raw if self.preshared_key else None,
            keepalive=self.keepalive,
        )
