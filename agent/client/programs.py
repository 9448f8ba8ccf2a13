"""Programs that carry a tunnel beside this one: their files, whether they run, how they end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from agent import files
from agent.client.profile import LocalTunnel

_TERM_SECONDS, _POLL_SECONDS = 5.0, 0.05
_LAST_WORDS = 3


def file_of(local: LocalTunnel, suffix: str = "") -> Path:
    return Path(f"{local.key_file}{suffix}")


def write(local: LocalTunnel, data: bytes, suffix: str = "", mode: int = 0o600) -> Path:
    path = file_of(local, suffix)
    files.make_private_directory(path.parent)
    files.write_private(path, data)
    path.chmod(mode)
    return path


def forget(local: LocalTunnel) -> None:
    """Take away all files of the connection's program, its secrets among them."""
    path = file_of(local)
    for each in path.parent.glob(f"{path.name}*"):
        each.unlink(missing_ok=True)


def running(local: LocalTunnel) -> int | None:
    """The process of the pid file, if it is still the program that was started with this connection's files."""
    try:
        pid = int(file_of(local, ".pid").read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if os.fsencode(local.key_file) in command else None


def noted(local: LocalTunnel) -> bool:
    """Whether the pid file has been written."""
    path = file_of(local, ".pid")
    return path.exists() and path.stat().st_size > 0


def note(local: LocalTunnel) -> None:
    """Write the pid file of a program that does not do it."""
    for pid in found(local):
        write(local, str(pid).encode(), ".pid")


def found(local: LocalTunnel) -> list[int]:
    """All processes of the program that were started with this connection's files, noted or not."""
    mark, pids = os.fsencode(local.key_file), []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            program, *arguments = (directory / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if Path(os.fsdecode(program)).name == local.protocol and any(mark in argument for argument in arguments):
            pids.append(int(directory.name))
    return pids


def traffic(pid: int, interface: str) -> tuple[int, int] | None:
    """Bytes in and out of an interface in the network namespace of the process; None where it is not there."""
    try:
        lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()
    except OSError:  # the process has just ended
        return None
    for line in lines:
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            columns = numbers.split()
            return int(columns[0]), int(columns[8])
    return None


def since(pid: int) -> int:
    """When the process began, in Unix seconds."""
    return int(Path(f"/proc/{pid}").stat().st_mtime)


async def end(local: LocalTunnel) -> None:
    """SIGTERM, so that it takes its interface and routes away; SIGKILL where it does not end."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in found(local):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + _TERM_SECONDS
        while found(local):
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(_POLL_SECONDS)
        else:
            return


def last_words(local: LocalTunnel) -> str:
    """What the program wrote at last."""
    try:
        lines: Sequence[str] = file_of(local, ".log").read_text(errors="replace").splitlines()
    except OSError:
        lines = ()
    return " | ".join(lines[-_LAST_WORDS:]) or "no message"
