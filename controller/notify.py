"""Tells systemd how the service is (sd_notify(3)): a datagram to the socket that it named."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable


def notify(*states: str) -> None:
    """Send READY=1, STATUS=…, WATCHDOG=1 or STOPPING=1; nothing happens outside systemd."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # abstract socket, unix(7)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.setblocking(False)
        sender.sendto("\n".join(states).encode(), address)


async def watchdog(alive: Callable[[], bool]) -> None:
    """Feed the watchdog at half of its time while `alive` says so; return at once where there is none."""
    microseconds = os.environ.get("WATCHDOG_USEC")
    if not microseconds:
        return
    while True:
        if alive():
            notify("WATCHDOG=1")
        await asyncio.sleep(int(microseconds) / 2_000_000)
