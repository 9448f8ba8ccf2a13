"""WireGuard interfaces: in the kernel, or in a program of their own where the kernel has none."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from enum import StrEnum

from agent.drivers.base import Unsupported
from agent.drivers.wireguard.kernel import KernelWireGuard
from agent.drivers.wireguard.userspace import PROGRAM, UserspaceWireGuard


class Backend(StrEnum):
    AUTO = "auto"
    KERNEL = "kernel"
    USERSPACE = "userspace"


async def choose(
    preference: Backend = Backend.AUTO, program: str = PROGRAM, known_keys: Mapping[bytes, bytes] | None = None
) -> KernelWireGuard | UserspaceWireGuard:
    """Open the driver that this host supports, the kernel's before a program's; raise Unsupported where there is none.

    The only place that decides. `driver.backend` says which it is. `known_keys`
    maps private keys to public ones, so that the library that computes them need not be loaded.
    """
    if preference is not Backend.USERSPACE:
        try:
            return await KernelWireGuard.open()
        except Unsupported:
            if preference is Backend.KERNEL:
                raise
    if shutil.which(program) is None:
        raise Unsupported(f"WireGuard needs its kernel module or the program {program}, and this host has neither")
    return UserspaceWireGuard(program, known_keys=known_keys)
