"""Processes that run on without the agent: found again for sure, and ended for sure."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.drivers import commands
from agent.drivers.base import DriverError
from agent.drivers.pidfd import open_process

_MARK = "SKYNETVPN_L2TP"
_END_WITHIN = 1.0  # seconds; a pppd that waits for the farewell of a client that is gone would take six
_KILLED_WITHIN = 5.0
_FOUND_WITHIN = 5.0


@dataclass(frozen=True, slots=True)
class Process:
    """One process, and no other one that gets its number later."""

    pid: int
    started: int  # clock ticks after the boot

    @property
    def alive(self) -> bool:
        return started(self.pid) == self.started


def started(pid: int) -> int | None:
    """When a process began, in clock ticks after the boot; None where there is none, or only its zombie."""
    try:
        # The name is in parentheses, and may contain anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[19]) if fields[0] not in "ZX" else None


class Daemon:
    """A program with a pid file. A mark in its environment tells which settings it was started with."""

    def __init__(self, pid_file: Path) -> None:
        self._pid_file = pid_file
        self._watched: int | None = None

    def find(self, mark: str = "") -> Process | None:
        """The one that runs with this mark (with any)."""
        try:
            pid = int(self._pid_file.read_text())
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        since = started(pid)
        wanted = f"{_MARK}={mark}".encode()
        if since is None or not any(item.startswith(wanted) for item in environment):
            return None
        return Process(pid, since)

    async def start(self, mark: str, program: str, argv: Sequence[str]) -> Process:
        """Run a program that goes to the background when it is ready."""
        # xl2tpd refuses to start while a process, any one, has the number of its last run.
        self._pid_file.unlink(missing_ok=True)
        await commands.run(["env", f"{_MARK}={mark}", *argv], timeout=60)
        deadline = time.monotonic() + _FOUND_WITHIN
        while (process := self.find(mark)) is None:
            if time.monotonic() > deadline:
                raise DriverError(f"{program} ended right after its start: the system log has its words")
            await asyncio.sleep(0.01)
        return process

    def watch(self, process: Process, ended: Callable[[], None]) -> None:
        """Call back once when it ends."""
        if self._watched is not None:
            return
        loop = asyncio.get_running_loop()
        self._watched = open_process(process.pid)
        if self._watched is None:
            loop.call_soon(ended)
            return

        def readable() -> None:
            self.unwatch()
            ended()

        loop.add_reader(self._watched, readable)

    def unwatch(self) -> None:
        if self._watched is not None:
            asyncio.get_running_loop().remove_reader(self._watched)
            os.close(self._watched)
            self._watched = None


async def end(processes: Iterable[Process], within: float = _END_WITHIN) -> None:
    """SIGTERM to all, SIGKILL to those that take longer; afterwards none is there. Raises DriverError."""
    errors = await asyncio.gather(*(_end(process, within) for process in processes), return_exceptions=True)
    for error in errors:
        if error is not None:
            raise error


async def _end(process: Process, within: float) -> None:
    descriptor = open_process(process.pid)
    if descriptor is None:
        return
    try:
        # Only now the number cannot go to another process.
        if not process.alive:
            return
        for number, patience in ((signal.SIGTERM, within), (signal.SIGKILL, _KILLED_WITHIN)):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await _exit_of(descriptor)
                return
    finally:
        os.close(descriptor)
    raise DriverError(f"process {process.pid} does not end, not even by SIGKILL")


async def _exit_of(descriptor: int) -> None:
    """A pidfd is readable from the end of its process on."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
