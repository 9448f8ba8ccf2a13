"""What a process that died leaves in the kernel: a device that keeps its port and passes data that nobody counts."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import structlog

from agent.drivers.netlink.rtnl import Rtnl
from agent.drivers.openvpn.config import DEVICES

log = structlog.get_logger(__name__)

_KIND = "ovpn-dco"
_MODULE = Path("/sys/module/ovpn_dco_v2")


async def remove_others(kept: Collection[str]) -> None:
    """Delete our devices but these; raise DriverError."""
    if not _is_loaded():
        return
    rtnl = Rtnl()
    try:
        left = [link for link in await rtnl.links(_KIND) if link.name.startswith(DEVICES) and link.name not in kept]
        if left:
            log.warning("openvpn.device_left", devices=[link.name for link in left])
            await rtnl.delete_links(left)
    finally:
        rtnl.close()


def _is_loaded() -> bool:
    return _MODULE.exists()
