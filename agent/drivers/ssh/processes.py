"""sshd's processes as /proc shows them (proc(5)), and the one call that tells who is at the far end of one.

Reading /proc starts nothing and waits for nobody, but a host has many processes: call these in a thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import signal
import socket
import time
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from agent.drivers.base import DriverError
from agent.drivers.pidfd import open_process
from agent.drivers.ssh.passwd import UIDS
from agent.drivers.ssh.rules import Client

_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")
_TITLE = re.compile(r"sshd(?:-session|-auth)?: ([a-z0-9_-]+)(?:@\S+)?(?: \[(?:priv|net)\])?")
_PIDFD_GETFD = 438  # the same on all architectures
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class Process:
    """A process held by a descriptor, so that its number cannot become another's."""

    pid: int
    started: int  # clock ticks since boot
    descriptor: int

    def kill(self) -> None:
        with _killing(self.pid):
            signal.pidfd_send_signal(self.descriptor, signal.SIGKILL)

    def close(self) -> None:
        os.close(self.descriptor)


@dataclass(slots=True)
class Found:
    """A session: the user's process, and root's that watches over it (None where that one has ended)."""

    uid: int
    name: str  # as the monitor's title says it, "" without one
    client: Client
    since: int
    process: Process
    monitor: Process | None


def hold(pid: int) -> Process | None:
    """None where it has ended."""
    try:
        descriptor = open_process(pid)
    except OSError as error:
        raise DriverError(f"process {pid} of sshd cannot be watched: {error.strerror}") from error
    if descriptor is None:
        return None
    started = _start(pid)
    if started is None:
        os.close(descriptor)
        return None
    return Process(pid, started, descriptor)


def kill(pid: int) -> None:
    with _killing(pid):
        os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def _killing(pid: int) -> Iterator[None]:
    try:
        yield
    except ProcessLookupError:
        return  # it has ended
    except OSError as error:
        raise DriverError(f"process {pid} of sshd cannot be ended: {error.strerror}") from error


def children(pid: int) -> list[int]:
    text = _read(f"{pid}/task/{pid}/children")
    return [int(each) for each in text.split()]


def find_listener(config: Path) -> int | None:
    """The sshd that was started with this file, in this network namespace."""
    for pid in _pids():
        title = _title(pid)
        if "[listener]" in title and f"-f {config} " in title and _is_here(pid):
            return pid
    return None


def is_listener(pid: int, config: Path) -> bool:
    title = _title(pid)
    return "[listener]" in title and f"-f {config} " in title


def lives(pid: int) -> bool:
    return _status(pid) != _Status()


def user_of(pid: int) -> str:
    """The user name in the title of one of sshd's processes, from when its client has given it; "" = none yet."""
    found = _TITLE.fullmatch(_title(pid).rstrip())
    return found[1] if found else ""


def of_users(names: Set[str], uids: Set[int]) -> list[int]:
    """Every process of sshd, whosever, that serves these users: sessions, and clients about to be let in."""
    found: list[int] = []
    for pid in _pids():
        process = _status(pid)
        if process.is_sshd and (process.uid in uids or user_of(pid) in names) and _is_here(pid):
            found.append(pid)
    return found


def session_of(monitor: int) -> Found | None:
    """The session that this child of the listener watches over; None where its client is not in (yet)."""
    for pid in children(monitor):
        if _status(pid).uid in UIDS:
            return _found(pid, monitor)
    return None


def all_sessions() -> list[Found]:
    """All of this network namespace, also those whose listener has ended: looks at every process of the host."""
    found: list[Found] = []
    for pid in _pids():
        process = _status(pid)
        if process.uid in UIDS and _is_here(pid):
            session = _found(pid, process.parent if user_of(process.parent) else None)
            if session is not None:
                found.append(session)
    return found


def is_of_another(found: Found, config: Path) -> bool:
    """Whether a listener that was not started with this file accepted the session; the admin's own sshd, that is."""
    if found.monitor is None:
        return False
    listener = _status(found.monitor.pid).parent
    return "[listener]" in _title(listener) and not is_listener(listener, config)


def tun_of(pid: int) -> str | None:
    """The name of the tun device that the process has open."""
    try:
        for path in (_PROC / f"{pid}/fd").iterdir():
            if str(path.readlink()) == "/dev/net/tun":
                fields = dict(
                    line.split(":", 1) for line in _read(f"{pid}/fdinfo/{path.name}").split("\n") if ":" in line
                )
                return fields.get("iff", "").strip() or None
    except OSError:
        return None  # it has just ended
    return None


def _found(pid: int, parent: int | None) -> Found | None:
    process = hold(pid)
    if process is None:
        return None
    uid, monitor, client = _status(pid).uid, None, None
    try:
        monitor = hold(parent) if parent is not None else None
        client = _client(process) or (_client(monitor) if monitor is not None else None)
    finally:
        if uid not in UIDS or client is None:
            for each in (process, monitor):
                if each is not None:
                    each.close()
    if uid not in UIDS or client is None:
        return None
    started = (monitor or process).started
    return Found(
        uid, user_of(parent) if parent is not None else "", client, _boot_time() + started // _TICKS, process, monitor
    )


def _client(process: Process) -> Client | None:
    """The far end of the connection that carries the session: accepted by root, as no forwarded one was."""
    try:
        for path in sorted((_PROC / f"{process.pid}/fd").iterdir(), key=lambda path: int(path.name)):
            if str(path.readlink()).startswith("socket:") and path.stat().st_uid == 0:
                client = _peer(process.descriptor, int(path.name))
                if client is not None:
                    return client
    except PermissionError as error:
        raise DriverError("the agent may not look into sshd's processes: it needs CAP_SYS_PTRACE") from error
    except OSError:
        return None  # it has just ended
    return None


def _peer(descriptor: int, number: int) -> Client | None:
    copy = _libc.syscall(_PIDFD_GETFD, descriptor, number, 0)
    if copy < 0:
        number = ctypes.get_errno()
        if number in (errno.EBADF, errno.ESRCH):
            return None  # it has just closed it, or ended
        raise DriverError(
            f"pidfd_getfd does not tell who is at the far end of a session ({os.strerror(number)}): the agent needs "
            "that system call, CAP_SYS_PTRACE, and a kernel.yama.ptrace_scope below 3"
        )
    with socket.socket(fileno=copy) as opened, contextlib.suppress(OSError):
        if opened.family in (socket.AF_INET, socket.AF_INET6) and opened.type == socket.SOCK_STREAM:
            host, port, *_ = opened.getpeername()
            return Client(host.removeprefix("::ffff:").partition("%")[0], port)
    return None


def _pids() -> list[int]:
    with os.scandir(_PROC) as entries:
        return [int(entry.name) for entry in entries if entry.name.isdecimal()]


@dataclass(frozen=True, slots=True)
class _Status:
    uid: int = -1  # the real one; not the owner of its directory: that is root for a process that changed its uid
    parent: int = 0
    is_sshd: bool = False


def _status(pid: int) -> _Status:
    fields = dict(line.split(":", 1) for line in _read(f"{pid}/status").split("\n") if ":" in line)
    if "Uid" not in fields or fields["State"].split()[0] == "Z":
        return _Status()  # it has ended
    return _Status(int(fields["Uid"].split()[0]), int(fields["PPid"]), fields["Name"].strip().startswith("sshd"))


def _start(pid: int) -> int | None:
    rest = _read(f"{pid}/stat").rpartition(")")[2].split()
    return int(rest[19]) if len(rest) > 19 else None


def _title(pid: int) -> str:
    return _read(f"{pid}/cmdline").replace("\0", " ")


def _is_here(pid: int) -> bool:
    try:
        return (_PROC / f"{pid}/ns/net").readlink() == (_PROC / "thread-self/ns/net").readlink()
    except OSError:
        return False


def _boot_time() -> int:
    return round(time.time() - time.clock_gettime(time.CLOCK_BOOTTIME))


def _read(name: str) -> str:
    """ "" for a process that has ended."""
    try:
        return (_PROC / name).read_text(errors="replace")
    except OSError:
        return ""
