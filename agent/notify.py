"""The service manager's socket (sd_notify(3)): ready, status, watchdog, stopping."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Mapping


class Notifier:
    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._watchdog_seconds = int(environ.get("WATCHDOG_USEC", "0")) / 1_000_000
        self._status = ""

    def ready(self) -> None:
        self._send("READY=1")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    async def feed(self, alive: Callable[[], bool]) -> None:
        """Feed the watchdog three times in its period, for as long as the agent really makes progress."""
        if not self._address or not self._watchdog_seconds:
            return
        while True:
            if alive():
                self._send("WATCHDOG=1")
            await asyncio.sleep(self._watchdog_seconds / 3)

    def _send(self, message: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as connection:
            try:
                connection.sendto(message.encode(), self._address)
            except OSError:
                # The manager is gone or its queue is full: the service itself must not suffer from it.
                return
