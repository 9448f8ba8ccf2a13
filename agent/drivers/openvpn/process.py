"""OpenVPN's processes outlive the agent: told apart by their start time, started by the agent itself or by another."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agent.drivers import commands
from agent.drivers.base import DriverError
from agent.drivers.openvpn.management import Management
from agent.drivers.pidfd import open_process

PROGRAM = "openvpn"
FAREWELL = 0.3  # seconds in which it tells its clients; the second signal ends it at once
PATIENCE = 5.0
ANSWER = 10.0  # seconds until a process that has begun answers


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    started: int  # clock ticks after boot: with it a number that is used again is another process


class Launcher(Protocol):
    """Who starts the processes. A configuration is `<name>.conf` in the agent's directory, named after its content."""

    async def start(self, name: str) -> Management:
        """Return when a process has read the configuration, found no fault in it, and answers; raise DriverError with
        its words. It holds still then until it is told to go on: no port is open, no interface is there."""
        ...

    def socket_path(self, name: str) -> Path:
        """Where the process of this configuration answers."""
        ...

    def find(self, pid: int, name: str) -> Process | None:
        """The process of this number, where it is one that was started with this configuration."""
        ...

    async def end(self, process: Process, tell: Callable[[str], None]) -> None:
        """Return when it is gone; `tell` sends it a command. Raise DriverError if it lives."""
        ...


class Detached:
    """The agent starts them itself, and they go to the background. Its sockets are beside the configurations."""

    def __init__(self, directory: Path, *, program: str = PROGRAM) -> None:
        self._directory = directory.absolute()
        self._program = program

    async def start(self, name: str) -> Management:
        socket = self.socket_path(name)
        await clear(self, name)
        options = ["--management", socket.name, "unix", "--daemon", f"openvpn-{name.partition('.')[0]}"]
        await commands.run([self._program, "--cd", str(self._directory), "--config", f"{name}.conf", *options])
        try:
            async with asyncio.timeout(ANSWER):
                while (management := await Management.connect(socket)) is None:  # noqa: ASYNC110 — it tells nobody
                    await asyncio.sleep(0.01)
        except TimeoutError as error:
            raise DriverError(f"openvpn opened no management socket at {socket}") from error
        socket.chmod(0o600)
        return management

    def socket_path(self, name: str) -> Path:
        return self._directory / f"{name}.sock"

    def find(self, pid: int, name: str) -> Process | None:
        return find(pid, ["--cd", str(self._directory), "--config", f"{name}.conf"])

    async def end(self, process: Process, tell: Callable[[str], None]) -> None:
        """SIGTERM, which it tells its clients of; again, which it obeys at once; SIGKILL."""
        for number, patience in ((signal.SIGTERM, FAREWELL), (signal.SIGTERM, PATIENCE), (signal.SIGKILL, PATIENCE)):
            if await _signalled(process, number, patience):
                return
        raise DriverError(f"openvpn (process {process.pid}) does not end")

    async def clear_all(self) -> None:
        """End all that an agent has started: they would keep the ports of those that systemd starts."""
        for socket in self._directory.glob("*.sock"):
            try:
                await clear(self, socket.stem)
            except DriverError as error:
                raise DriverError(f"an openvpn that the agent has started itself has to end first: {error}") from error


async def clear(launcher: Launcher, name: str) -> None:
    """End the process that answers for this configuration, and remove its socket: without it nobody could end it."""
    path = launcher.socket_path(name)
    management = await Management.connect(path)
    if management is not None:
        management.listen(lambda _: None, lambda: None)
        try:
            running = launcher.find(management.pid, name)
            if running is not None:
                await launcher.end(running, management.tell)
        finally:
            await management.close()
    path.unlink(missing_ok=True)


def find(pid: int, arguments: list[str]) -> Process | None:
    """The process of this number, where its command line begins with a program and these arguments."""
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    started = _started(pid)
    return Process(pid, started) if argv[1 : 1 + len(arguments)] == arguments and started is not None else None


def alive(process: Process) -> bool:
    return _started(process.pid) == process.started


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
