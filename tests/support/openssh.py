"""SSH's other end for tests: a host with accounts of its own, clients on one side of it, a server on the other."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import os
import re
import shutil
import socket
import subprocess
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import pytest

from agent.drivers.base import Admit, LiveSession, Notify, ServiceDriver
from agent.drivers.nftables import Nftables
from agent.drivers.ssh import Ssh
from agent.services import tunnels_of
from shared import crypt
from shared.access import Credential
from shared.resource import Protocol
from shared.services import SshServer
from tests.support.netns import Namespace, wait_until

NODE, CLIENT = "192.0.2.1", "192.0.2.2"
NODE6, CLIENT6 = "2001:db8::1", "2001:db8::2"
NODE_INSIDE, FAR = "198.51.100.1", "198.51.100.2"
PORT, ECHO_PORT = 2222, 7000
PASSWORD = "correct horse"
SPEC = SshServer(port=PORT, ipv4_pool="10.70.0.0/24")
TUN = msgspec.structs.replace(SPEC, tcp_forwarding=False, tun=True)
NUMBER = 7  # of alice's tun device

_CLONE_FS, _CLONE_NEWNS, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x200, 0x20000, 4096, 16384, 1 << 18
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def own_etc(directory: Path) -> Iterator[None]:
    """Give the calling thread, and what it starts, a copy of /etc; nobody else sees what is changed there."""
    shutil.copytree("/etc", directory, symlinks=True)
    shadow = Path("/etc/shadow").stat()
    os.chown(directory / "shadow", shadow.st_uid, shadow.st_gid)
    directory.chmod(0o755)
    shutil.rmtree(directory / "skynetvpn-ssh", ignore_errors=True)  # should this host be a node
    for path in (directory / "group", directory / "gshadow"):
        path.write_text(re.sub(r"(?m)^skynetvpn-ssh:.*\n", "", path.read_text()))
    where = Path.cwd()
    before = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    _checked(_libc.unshare(_CLONE_NEWNS))
    try:
        _checked(_libc.mount(b"", b"/", b"", _MS_REC | _MS_PRIVATE, b""))
        _checked(_libc.mount(bytes(directory), b"/etc", b"", _MS_BIND, b""))
        yield
    finally:
        _checked(_libc.unshare(_CLONE_FS))  # from threads that the test has started, else the way back is refused
        _checked(_libc.setns(before, _CLONE_NEWNS))
        os.close(before)
        os.chdir(where)


def _checked(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@dataclass
class Net:
    """The three hosts; the test itself is on `node`."""

    node: Namespace
    client: Namespace
    far: Namespace
    directory: Path
    boot_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    refusals: dict[str, str] = field(default_factory=dict)  # what `admit` says
    notified: int = 0
    opened: list[Ssh] = field(default_factory=list)

    def driver(self) -> Ssh:
        made = Ssh(self.directory / "ssh", boot_id=self.boot_id, admit=self.refusals.get, notify=self._count)
        self.opened.append(made)
        return made

    def _count(self) -> None:
        self.notified += 1

    def argv(
        self, *options: str, user: str = "alice", key: Path | None = None, port: int = PORT, host: str = NODE
    ) -> tuple[str, ...]:
        by_key = ("-i", str(key), "-o", "IdentitiesOnly=yes", "-o", "PreferredAuthentications=publickey")
        return (
            *("ssh", "-F", "none", "-p", str(port), "-o", "StrictHostKeyChecking=no", "-o", "LogLevel=ERROR"),
            *("-o", "UserKnownHostsFile=/dev/null", "-o", "GlobalKnownHostsFile=/dev/null"),
            *("-o", "NumberOfPasswordPrompts=1", "-o", "ExitOnForwardFailure=yes", "-o", "ConnectTimeout=10"),
            *(by_key if key is not None else ("-o", "PubkeyAuthentication=no")),
            *options,
            f"{user}@{host}",
        )

    def ssh(
        self,
        *options: str,
        user: str = "alice",
        password: str = PASSWORD,
        key: Path | None = None,
        port: int = PORT,
        host: str = NODE,
    ) -> subprocess.Popen[Any]:
        """A client that stays: `-N` with these options."""
        argv = self.argv("-N", *options, user=user, key=key, port=port, host=host)
        return self.client.popen(
            *(("sshpass", "-e") if key is None else ()),
            *argv,
            env={"SSHPASS": password},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def sshds(self) -> list[str]:
        """The titles of the node's sshd processes, with their numbers."""
        listed = self.node.run("ps", "-ww", "-o", "pid=,args=", "-p", ",".join(map(str, self.node.pids())), check=False)
        return [line.strip() for line in listed.splitlines() if "sshd" in line]

    async def denied(self, **login: str) -> bool:
        """Whether sshd refuses the login."""
        code, words = await self.try_ssh("-N", **login)
        return code != 0 and "Permission denied" in words

    async def try_ssh(
        self, *options: str, command: tuple[str, ...] = (), user: str = "alice", password: str = PASSWORD
    ) -> tuple[int, str]:
        """Run a client to its end; return how it ended, and what it said."""
        process = await asyncio.create_subprocess_exec(
            *("ip", "netns", "exec", self.client.name, "sshpass", "-e"),
            *self.argv(*options, user=user),
            *command,
            env={**os.environ, "SSHPASS": password},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(20):
                output, _ = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise
        assert process.returncode is not None
        return process.returncode, output.decode(errors="replace")


def text_of(*names: str) -> str:
    """What these files of the node's /etc say."""
    return "".join(Path("/etc", name).read_text() for name in names)


def alice(name: str = "alice", *, keys: tuple[str, ...] = (), password: bool = True, tunnel: int = 0) -> Credential:
    return Credential(
        protocol=Protocol.SSH,
        username=name,
        account=1,
        secret=_hash() if password else "",
        public_keys=keys,
        tunnel=tunnel,
    )


_HASHES: list[str] = []


def _hash() -> str:
    if not _HASHES:
        _HASHES.append(crypt.hash_password(PASSWORD))
    return _HASHES[0]


async def eventually(condition: Callable[[], Awaitable[object]], timeout: float = 20) -> None:
    async with asyncio.timeout(timeout):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def begun(driver: Ssh, count: int = 1) -> list[LiveSession]:
    """The sessions, once there are so many."""
    found: list[LiveSession] = []

    async def enough() -> bool:
        nonlocal found
        found = [session for session in await driver.sessions() if not session.ended]
        return len(found) == count

    await eventually(enough)
    return found


def new_key(directory: Path) -> tuple[Path, str]:
    path = directory / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path, " ".join(path.with_suffix(".pub").read_text().split()[:2])


@contextlib.contextmanager
def echo_server(namespace: Namespace, address: str, port: int) -> Iterator[None]:
    """Sends back what it gets, in this namespace."""
    with namespace.entered():
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, port), family=family)

    def accept() -> None:
        while True:
            try:
                opened, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=_echo, args=(opened,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def _echo(opened: socket.socket) -> None:
    with opened, contextlib.suppress(OSError):
        while data := opened.recv(65536):
            opened.sendall(data)


@contextlib.contextmanager
def name_server(namespace: Namespace, address: str) -> Iterator[None]:
    """Says of every name that it is FAR, in this namespace (RFC 1035)."""
    with namespace.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.bind((address, 53))
        opened = made.dup()

    def serve() -> None:
        while True:
            query, client = opened.recvfrom(512)
            if not query:
                return
            question = query[12 : query.index(0, 12) + 5]
            wants_ipv4 = question[-4:-2] == b"\0\1"
            answer = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + socket.inet_aton(FAR) if wants_ipv4 else b""
            counts = b"\0\1" + (b"\0\1" if wants_ipv4 else b"\0\0") + bytes(4)
            opened.sendto(query[:2] + b"\x81\x80" + counts + question + answer, client)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        with namespace.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", (address, 53))
        thread.join()
        opened.close()


def connect(namespace: Namespace, port: int, host: str = "127.0.0.1", *, timeout: float = 10) -> socket.socket:
    """A connection from inside this namespace."""
    with namespace.entered():
        return socket.create_connection((host, port), timeout=timeout)


@contextlib.contextmanager
def network(directory: Path) -> Iterator[Net]:
    """The test is on the node while it is entered."""
    with (
        own_etc(directory / "etc"),
        Namespace("node") as node,
        Namespace("client") as client,
        Namespace("far") as far,
    ):
        node.connect(client, f"{NODE}/24", f"{CLIENT}/24", (f"{NODE6}/64", f"{CLIENT6}/64"))
        node.connect(far, f"{NODE_INSIDE}/24", f"{FAR}/24")
        with node.entered(), echo_server(far, FAR, ECHO_PORT):
            yield Net(node, client, far, directory)


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    with network(tmp_path) as made:
        yield made


@pytest.fixture
async def driver(net: Net) -> AsyncIterator[Ssh]:
    """Serving, with one login: alice."""
    made = net.driver()
    await made.ensure(SPEC)
    assert await made.put([alice()]) == {}
    yield made
    for opened in net.opened:
        await opened.close()


@pytest.fixture
async def tun(driver: Ssh) -> Ssh:
    """Serving tun devices only, with the packet filter of the agent, and alice's device."""
    tunnels = tunnels_of(TUN)
    assert tunnels is not None
    await Nftables().apply([], [tunnels])
    await driver.ensure(TUN)
    assert await driver.put([alice(tunnel=NUMBER)]) == {}
    return driver


class Client:
    """A client program with a tunnel to the echo server."""

    _ports = itertools.count(10_000)

    def __init__(self, net: Net, username: str, password: str) -> None:
        self._net = net
        self._username = username
        self._password = password
        self._port = next(self._ports)
        self._process: subprocess.Popen[Any] | None = None

    def connect(self) -> None:
        self._start()
        wait_until(self.passes, 30)

    def refused(self) -> bool:
        process = self._start()
        wait_until(lambda: process.poll() is not None or self.passes(), 30)
        return process.poll() is not None

    def passes(self) -> bool:
        with contextlib.suppress(OSError), connect(self._net.client, self._port) as opened:
            opened.sendall(b"hello")
            return opened.recv(5) == b"hello"
        return False

    def end(self) -> None:
        if self._process is not None:
            self._net.client.end(self._process)

    def _start(self) -> subprocess.Popen[Any]:
        forward = f"127.0.0.1:{self._port}:{FAR}:{ECHO_PORT}"
        self._process = self._net.ssh("-L", forward, user=self._username, password=self._password)
        return self._process


class SshRig:
    """All log in by password."""

    asks = False  # sshd cannot ask; a session that is not admitted ends after it began

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._exit = contextlib.ExitStack()
        self.net: Net

    def __enter__(self) -> Self:
        self.net = self._exit.enter_context(network(self._directory))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    def driver(self, admit: Admit, notify: Notify) -> Ssh:
        return Ssh(self._directory / "ssh", boot_id=self.net.boot_id, admit=admit, notify=notify)

    async def prepare(self, driver: ServiceDriver) -> None:
        """sshd makes what it needs by itself."""

    def spec(self) -> SshServer:
        return SPEC

    def changed_spec(self) -> SshServer:
        return msgspec.structs.replace(SPEC, keepalive=SPEC.keepalive + 1)

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        with socket.create_server((NODE, PORT)):
            yield

    def credential(self, username: str) -> Credential:
        return alice(username)

    def client(self, username: str, *, wrong: bool = False) -> Client:
        return Client(self.net, username, "wrong" if wrong else PASSWORD)
