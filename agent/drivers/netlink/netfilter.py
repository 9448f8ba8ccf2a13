"""The packet filter's generation: a number of the network namespace that every transaction changes (nf_tables)."""

from __future__ import annotations

import struct

from agent.drivers.base import DriverError
from agent.drivers.netlink.channel import Channel
from agent.drivers.netlink.codec import attributes

_NETLINK_NETFILTER = 12
_GETGEN = 10 << 8 | 16  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETGEN
_NFGENMSG = struct.Struct("=BBH")  # family, version, resource
_GEN_ID = 1


class Generations:
    """In the network namespace of the thread that asks first."""

    def __init__(self) -> None:
        self._channel: Channel | None = None

    async def current(self) -> bytes:
        """Whoever reads the same one twice knows that nobody changed a rule in between. Raise DriverError."""
        if self._channel is None:
            self._channel = Channel(_NETLINK_NETFILTER)
        answer = await self._channel.request("read the packet filter's generation", _GETGEN, _NFGENMSG.pack(0, 0, 0))
        for payload in answer:
            for type_, value in attributes(payload[_NFGENMSG.size :]):
                if type_ == _GEN_ID:
                    return bytes(value)
        raise DriverError("the kernel does not tell the packet filter's generation")

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
