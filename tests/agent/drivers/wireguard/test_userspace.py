"""What only the userspace backend can meet: a program that dies, a stale socket, another namespace's program."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agent.drivers.base import DeviceMissing, DriverError, Unsupported
from agent.drivers.wireguard import uapisocket
from agent.drivers.wireguard.userspace import SOCKETS, UserspaceWireGuard
from shared.desired import Interface, Peer
from shared.keys import PrivateKey
from tests.support.netns import Namespace, unique

pytestmark = pytest.mark.netns


@pytest.fixture
def host() -> Iterator[Namespace]:
    with Namespace("host") as namespace, namespace.entered():
        yield namespace


@pytest.fixture
async def driver(host: Namespace) -> AsyncIterator[UserspaceWireGuard]:
    opened = UserspaceWireGuard()
    yield opened
    await opened.close()


@pytest.fixture
def spec() -> Interface:
    return Interface(name=unique("wgt"), listen_port=51820, addresses=("10.66.0.1/16",))


def a_peer() -> Peer:
    return Peer(public_key=os.urandom(32), allowed_ips=("10.66.0.2/32",))


def program(host: Namespace, name: str) -> int:
    """The pid of the program that serves the interface."""
    found = []
    for pid in host.pids():
        with contextlib.suppress(FileNotFoundError):  # a short-lived command of the test itself
            if name in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
    (pid,) = found
    return pid


def pipes(pid: int) -> set[str]:
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of this very listing
            found.add(str(path.readlink()))
    return {link for link in found if link.startswith("pipe:")}


async def kill_program(host: Namespace, name: str) -> None:
    """Kill the program, and wait until the kernel has taken its interface away."""
    os.kill(program(host, name), signal.SIGKILL)
    async with asyncio.timeout(10):
        while name in host.run("ip", "-br", "link"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_killed_program_is_missing_and_started_again_over_its_stale_socket(
    driver: UserspaceWireGuard, host: Namespace, spec: Interface
) -> None:
    key, peer = PrivateKey.generate(), a_peer()
    await driver.ensure(spec, key)
    await driver.apply_peers(spec.name, [peer])
    first = await driver.observe(spec.name)

    await kill_program(host, spec.name)
    assert (SOCKETS / f"{spec.name}.sock").exists()
    assert await driver.observe(spec.name) is None
    with pytest.raises(DeviceMissing, match=r"no program answers|closed the connection"):
        await driver.apply_peers(spec.name, [peer])

    await driver.ensure(spec, key)
    await driver.apply_peers(spec.name, [peer])
    second = await driver.observe(spec.name)
    assert first is not None
    assert second is not None
    assert second.peers == (peer,)
    assert second.generation != first.generation
    await driver.remove(spec.name)


async def test_the_program_outlives_the_driver_in_a_session_of_its_own(
    driver: UserspaceWireGuard, host: Namespace, spec: Interface
) -> None:
    await driver.ensure(spec, PrivateKey.generate())
    await driver.close()

    pid = program(host, spec.name)
    assert os.getsid(pid) != os.getsid(0)
    assert not pipes(pid) & pipes(os.getpid())


async def test_a_host_without_tun_devices_is_told_so(
    driver: UserspaceWireGuard, host: Namespace, spec: Interface, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "tun"
    monkeypatch.setattr("agent.drivers.wireguard.userspace.TUN", missing)

    with pytest.raises(Unsupported, match=rf"{missing} cannot be opened \(No such file or directory\).*--device"):
        await driver.ensure(spec, PrivateKey.generate())

    assert spec.name not in host.run("ip", "-br", "link")


async def test_a_program_of_another_namespace_is_not_adopted(
    driver: UserspaceWireGuard, host: Namespace, spec: Interface
) -> None:
    with Namespace("other") as other:
        other.run("wireguard-go", spec.name)

        with pytest.raises(DriverError, match="not in this network namespace"):
            await driver.ensure(spec, PrivateKey.generate())


async def test_an_interface_whose_program_does_not_answer_is_not_touched(
    driver: UserspaceWireGuard, host: Namespace, spec: Interface
) -> None:
    host.run("ip", "tuntap", "add", spec.name, "mode", "tun")

    with pytest.raises(DriverError, match="no program answers"):
        await driver.ensure(spec, PrivateKey.generate())
    with pytest.raises(DriverError, match="no program answers"):
        await driver.remove(spec.name)

    assert spec.name in host.run("ip", "-br", "link")


async def test_a_missing_program_is_unsupported(host: Namespace, spec: Interface) -> None:
    driver = UserspaceWireGuard(program="no-such-program")
    with pytest.raises(Unsupported, match="no-such-program"):
        await driver.ensure(spec, PrivateKey.generate())
    await driver.close()


async def test_a_program_that_answers_something_else_is_an_error(host: Namespace, tmp_path: Path) -> None:
    """A fake program at the wire: it answers what it likes."""
    answers = [b"hello\n\n", b"public_key=zz\nerrno=0\n\n", b"errno=-1\n\n"]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\n\n"):
            writer.write(answers.pop(0))
            if not answers:
                break
        writer.close()

    server = await asyncio.start_unix_server(serve, tmp_path / "wg0.sock")
    driver = UserspaceWireGuard(sockets=tmp_path)
    with pytest.raises(DriverError, match="without errno"):
        await driver.stats("wg0")
    with pytest.raises(DriverError, match="something else than the UAPI protocol"):
        await driver.stats("wg0")
    with pytest.raises(DriverError, match="Operation not permitted"):
        await driver.stats("wg0")
    await driver.close()
    server.close()


async def test_a_large_operation_that_is_refused_at_once_is_told_with_its_reason(
    driver: UserspaceWireGuard, spec: Interface
) -> None:
    """The program answers and goes away while most of the text is still to be sent."""
    await driver.ensure(spec, PrivateKey.generate())
    bad = Peer(public_key=os.urandom(32), allowed_ips=("10.66.0.0/33",))
    many = [a_peer() for _ in range(5000)]
    with pytest.raises(DriverError, match=f"set 5001 peers of {spec.name}: Invalid argument"):
        await driver.apply_peers(spec.name, [bad, *many])
    await driver.apply_peers(spec.name, many[:1])
    assert many[0].public_key in [peer.public_key for peer in await driver.stats(spec.name)]
    await driver.remove(spec.name)


async def test_a_program_that_takes_and_says_nothing_is_an_error(
    host: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uapisocket, "_TIMEOUT", 0.1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "wg0.sock"))
        listener.listen()
        driver = UserspaceWireGuard(sockets=tmp_path)
        for count in (1, 5000):
            with pytest.raises(DriverError, match=r"wg0: .*wg0.sock: nothing within 0.1 seconds"):
                await driver.apply_peers("wg0", [a_peer()] * count)
        await driver.close()


async def test_an_operation_that_was_cancelled_does_not_confuse_the_next(host: Namespace, tmp_path: Path) -> None:
    asked = asyncio.Event()
    late = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\n\n")
        if not asked.is_set():
            asked.set()
            await late.wait()
            writer.write(b"errno=-1\n\n")
        else:
            writer.write(b"errno=0\n\n")
        writer.close()

    server = await asyncio.start_unix_server(serve, tmp_path / "wg0.sock")
    driver = UserspaceWireGuard(sockets=tmp_path)
    first = asyncio.create_task(driver.apply_peers("wg0", [a_peer()]))
    await asked.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    late.set()

    await driver.apply_peers("wg0", [a_peer()])
    await driver.close()
    server.close()


async def test_a_socket_file_without_a_program_is_not_an_interface(
    driver: UserspaceWireGuard, host: Namespace, spec: Interface
) -> None:
    SOCKETS.mkdir(mode=0o755, parents=True, exist_ok=True)
    path = SOCKETS / f"{spec.name}.sock"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))

    assert await driver.observe(spec.name) is None
    await driver.ensure(spec, PrivateKey.generate())
    assert await driver.observe(spec.name) is not None
    await driver.remove(spec.name)
    assert not path.exists()
