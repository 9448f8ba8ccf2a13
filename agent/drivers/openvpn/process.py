"""An OpenVPN process that outlives the agent: started detached, told apart by its start time, ended for sure."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from agent.drivers import commands
from agent.drivers.base import DriverError
from agent.drivers.pidfd import open_process

_FAREWELL = 0.3  # seconds in which it tells its clients; the second signal ends it at once
_PATIENCE = 5.0


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    started: int  # clock ticks after boot: with it a number that is used again is another process


async def start(program: str, directory: Path, config: str, socket: str) -> None:
    """Return when it has read its configuration, found no fault in it, and gone to the background.

    It holds still then until it is told to go on: no port is open, no interface is there.
    """
    options = ["--management", socket, "unix", "--daemon", f"openvpn-{config.partition('.')[0]}"]
    await commands.run([program, "--cd", str(directory), "--config", config, *options])


def find(pid: int, directory: Path, config: str) -> Process | None:
    """The process of this number, where it is one that `start` started with this configuration."""
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    started = _started(pid)
    ours = argv[1:5] == ["--cd", str(directory), "--config", config]
    return Process(pid, started) if ours and started is not None else None


def alive(process: Process) -> bool:
    return _started(process.pid) == process.started


async def end(process: Process) -> None:
    """SIGTERM, which it tells its clients of; again, which it obeys at once; SIGKILL. Raise DriverError if it lives."""
    for number, patience in ((signal.SIGTERM, _FAREWELL), (signal.SIGTERM, _PATIENCE), (signal.SIGKILL, _PATIENCE)):
        if await _signalled(process, number, patience):
            return
    raise DriverError(f"openvpn (process {process.pid}) does not end")


async def gone(process: Process, patience: float) -> bool:
    """Wait for its end; return whether it came in time."""
    return await _signalled(process, None, patience)


async def _signalled(process: Process, number: signal.Signals | None, patience: float) -> bool:
    """Send a signal, if any, and wait; return whether the process is gone."""
    try:
        descriptor = open_process(process.pid)
    except OSError as error:
        raise DriverError(f"process {process.pid}: {error.strerror}") from error
    if descriptor is None:
        return True
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        if not alive(process):  # asked after the descriptor is open: it is the same process, or there is none
            return True
        if number is not None:
            signal.pidfd_send_signal(descriptor, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await ended.wait()
        return ended.is_set()
    except OSError as error:
        raise DriverError(f"process {process.pid} cannot be signalled: {error.strerror}") from error
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _started(pid: int) -> int | None:
    """The start time of a process that runs, proc(5); None where there is none, or only its exit status is left."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])
