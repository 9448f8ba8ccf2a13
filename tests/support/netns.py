"""Network namespaces as hosts: made for one test, gone after it, together with every process started inside.

    with Namespace("node") as node, Namespace("client") as client:
        node.connect(client, "192.0.2.1/24", "192.0.2.2/24")
        node.run("ping", "-c1", "192.0.2.2")

The files are those of the machine, also /var/run/wireguard: interface names must be unique per test (`unique`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self, TypeVar

T = TypeVar("T")

# Between two looks: asking without a pause would take the time that the slow processor needs to come to an answer.
_PAUSE = 0.01 * int(os.environ.get("SKYNETVPN_TEST_SLOWDOWN", "1")) ** 2
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def unique(prefix: str) -> str:
    """A name that no other test uses, short enough for an interface (15 characters) when the prefix has up to 6."""
    return f"{prefix}-{secrets.token_hex(4)}"


def wait_until(condition: Callable[[], object], timeout: float = 30) -> None:
    """Poll until the condition is true; raise TimeoutError where it is not in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not true within {timeout} s")
        time.sleep(_PAUSE)


class Running(Protocol):
    """A program of ours that runs: what is used of subprocess.Popen."""

    pid: int
    stdin: IO[Any] | None
    stdout: IO[Any] | None
    stderr: IO[Any] | None

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


class CommandFailed(AssertionError):
    """A command of the test's own set-up failed; the text is what it said."""


def _run(argv: tuple[str, ...], *, stdin: str | None = None, timeout: float = 30, check: bool = True) -> str:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)
    if check and done.returncode:
        raise CommandFailed(f"{' '.join(argv)}: exit {done.returncode}: {done.stderr.strip()} {done.stdout.strip()}")
    return done.stdout


class Namespace:
    """One network namespace with loopback up; a context manager that leaves nothing behind."""

    def __init__(self, prefix: str = "ns") -> None:
        self.name = unique(prefix)
        self._children: list[subprocess.Popen[Any]] = []

    @property
    def path(self) -> Path:
        return Path("/run/netns") / self.name

    def __enter__(self) -> Self:
        _run(("ip", "netns", "add", self.name))
        self.run("ip", "link", "set", "lo", "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End what runs inside, also daemons that left their parent, and delete the namespace with its links."""
        for child in self._children:
            self.end(child)
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            with contextlib.suppress(TimeoutError):
                wait_until(lambda: not self.pids(), timeout=5)
        _run(("ip", "netns", "del", self.name), check=False)
        shutil.rmtree(Path("/etc/netns", self.name), ignore_errors=True)  # its resolv.conf, where a client ended early

    def pids(self) -> list[int]:
        """The processes inside, without the test's own."""
        text = _run(("ip", "netns", "pids", self.name), check=False)
        return [int(pid) for pid in text.split() if int(pid) != os.getpid()]

    def programs(self) -> dict[int, str]:
        """The names of those processes; one that ends meanwhile is left out."""
        found = {}
        for pid in self.pids():
            with contextlib.suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/comm").read_text().strip()
        return found

    def run(self, *argv: str, stdin: str | None = None, timeout: float = 30, check: bool = True) -> str:
        """Run a command inside and return what it printed; raise CommandFailed with its words."""
        return _run(("ip", "netns", "exec", self.name, *argv), stdin=stdin, timeout=timeout, check=check)

    def popen(self, *argv: str, env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[Any]:
        """Start a process inside; it is ended with the namespace at the latest."""
        environ = {**os.environ, **env} if env is not None else None
        child: subprocess.Popen[Any] = subprocess.Popen(
            ("ip", "netns", "exec", self.name, *argv), env=environ, start_new_session=True, **options
        )
        self._children.append(child)
        return child

    def end(self, child: Running, timeout: float = 10) -> None:
        """Stop a child of `popen`: SIGTERM, then SIGKILL when the time is over."""
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(timeout)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        for stream in (child.stdin, child.stdout, child.stderr):
            if stream is not None:
                stream.close()

    def connect(self, other: Namespace, here: str, there: str, *more: tuple[str, str]) -> tuple[str, str]:
        """Join both by a veth pair with these addresses (address/prefix); return the names of its two ends."""
        link, peer = unique("ve"), unique("ve")
        _run(("ip", "link", "add", link, "netns", self.name, "type", "veth", "peer", peer, "netns", other.name))
        for local, remote in ((here, there), *more):
            self.add_address(link, local)
            other.add_address(peer, remote)
        self.run("ip", "link", "set", link, "up")
        other.run("ip", "link", "set", peer, "up")
        for end, name in ((self, link), (other, peer)):  # packets sent before the carrier is noticed are lost
            wait_until(lambda end=end, name=name: "state UP" in end.run("ip", "-o", "link", "show", name))  # type: ignore[misc]
        return link, peer

    def add_address(self, link: str, address: str) -> None:
        nodad = ("nodad",) if ":" in address else ()
        self.run("ip", "address", "add", address, "dev", link, *nodad)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Move the calling thread inside for a while; threads and processes that it starts then are inside as well.

        Threads that were there before (a pool that has run something already) stay outside: enter before the event
        loop starts, or use `call`.
        """
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        inside = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(inside)
            try:
                yield
            finally:
                _setns(before)
        finally:
            os.close(inside)
            os.close(before)

    def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Run a coroutine function inside, on an event loop and a thread of its own, and return its result.

        Blocks: from a running event loop use `await asyncio.to_thread(namespace.call, function)`.
        """
        results: list[T] = []
        errors: list[BaseException] = []

        async def main() -> None:
            results.append(await function())

        def body() -> None:
            try:
                with self.entered():
                    asyncio.run(main())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=body, name=f"in {self.name}")
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"setns: {os.strerror(code)}")
