"""charon and xl2tpd as the driver starts them, in a namespace; what needs PPP is in tests/kernel."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agent.drivers.base import DriverError, Unsupported
from agent.drivers.l2tp import L2tp, xl2tpd
from agent.drivers.l2tp.charon import Charon
from agent.drivers.l2tp.xl2tpd import Xl2tpd
from shared.access import Credential
from shared.resource import Protocol
from shared.services import L2tpServer, SshServer
from tests.support.netns import Namespace, wait_until

pytestmark = pytest.mark.netns

SPEC = L2tpServer(psk="a pre-shared key", ipv4_pool="10.71.0.0/24")


@pytest.fixture
def host() -> Iterator[Namespace]:
    with Namespace("l2tp") as namespace, namespace.entered():
        yield namespace


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short, for it holds a socket."""
    with tempfile.TemporaryDirectory(prefix="l2tp-") as name:
        yield Path(name)


@pytest.fixture
async def charon(host: Namespace, directory: Path) -> AsyncIterator[Charon]:
    made = Charon(directory)
    yield made
    await made.stop()


@pytest.fixture
async def tunnels(host: Namespace, directory: Path) -> AsyncIterator[Xl2tpd]:
    made = Xl2tpd(directory / "ppp")
    made.directory.mkdir()
    yield made
    await made.stop()


def driver(directory: Path) -> L2tp:
    return L2tp(directory, boot_id="boot", admit=lambda _name: None, notify=lambda: None)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def holding(directory: Path, words: bytes) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file() and words in path.read_bytes()]


def login(name: str, secret: str) -> Credential:
    return Credential(protocol=Protocol.L2TP, username=name, account=7, secret=secret)


async def test_charon_runs_with_our_connection_and_is_adopted(host: Namespace, directory: Path, charon: Charon) -> None:
    ended = asyncio.Event()
    await charon.ensure("the first key", ended.set)
    listing = host.run("swanctl", "--list-conns", "--uri", f"unix://{directory}/charon.vici")
    assert "l2tp: IKEv1" in listing
    assert "l2tp: TRANSPORT" in listing
    assert "/run/charon" not in host.run("ss", "-Hxl")
    pid = (directory / "charon.pid").read_text()
    charon.close()

    second = Charon(directory)
    assert second.running()
    await second.ensure("another key", ended.set)
    await second.ensure("another key", ended.set)
    assert (directory / "charon.pid").read_text() == pid
    assert not ended.is_set()
    os.kill(int(pid), signal.SIGKILL)
    async with asyncio.timeout(10):
        await ended.wait()
    assert not second.running()
    await second.ensure("another key", ended.set)
    assert second.running()
    second.close()


async def test_the_pre_shared_key_is_in_no_file(directory: Path, charon: Charon) -> None:
    await charon.ensure("not to be found", lambda: None)
    assert not holding(directory, b"not to be found")


async def test_a_path_that_no_socket_can_have_is_told(host: Namespace, directory: Path) -> None:
    deep = directory / ("d" * 100)
    deep.mkdir()
    with pytest.raises(DriverError, match="choose a shorter directory"):
        await Charon(deep).ensure("a pre-shared key", lambda: None)


async def test_xl2tpd_sees_our_directory_as_etc_ppp_and_is_adopted(directory: Path, tunnels: Xl2tpd) -> None:
    await tunnels.start(SPEC)
    pid = int((directory / "ppp" / "xl2tpd.pid").read_text())
    wait_until((directory / "ppp" / "xl2tpd.control").exists)
    (directory / "ppp" / "seen").touch()
    assert "seen" in names(Path(f"/proc/{pid}/root/etc/ppp"))
    assert "seen" not in names(Path("/etc/ppp"))

    second = Xl2tpd(directory / "ppp")
    assert second.running(SPEC)
    assert not second.running(L2tpServer(psk=SPEC.psk, ipv4_pool="10.72.0.0/24"))
    assert second.running(L2tpServer(psk="charon's business", ipv4_pool=SPEC.ipv4_pool))
    ended = asyncio.Event()
    second.watch(ended.set)
    await tunnels.stop()
    async with asyncio.timeout(10):
        await ended.wait()
    assert not second.running(SPEC)


async def test_files_are_readable_by_root_alone(directory: Path, tunnels: Xl2tpd) -> None:
    await tunnels.start(SPEC)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (directory / "ppp").iterdir() if path.is_file()}
    assert modes["ip-pre-up"] == modes["ip-down"] == 0o700
    assert modes["options.l2tp"] == modes["xl2tpd.conf"] == 0o600


async def test_a_kernel_without_l2tp_is_told_at_once(host: Namespace, directory: Path) -> None:
    try:
        socket.socket(24, socket.SOCK_DGRAM, 1).close()
    except OSError:
        began = time.monotonic()
        tested = driver(directory)
        with pytest.raises(Unsupported, match="needs the modules l2tp_ppp and esp4"):
            await tested.ensure(SPEC)
        assert time.monotonic() - began < 5
        assert await tested.sessions() == []
        await tested.stop()
        await tested.close()
    else:
        pytest.skip("this kernel has L2TP: tests/kernel/test_l2tp.py")


async def test_a_missing_program_is_told(host: Namespace, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = directory / "xl2tpd"
    monkeypatch.setattr(xl2tpd, "PROGRAM", str(moved))
    monkeypatch.setattr("agent.drivers.l2tp.driver._PACKAGES", {str(moved): "xl2tpd"})
    tested = driver(directory / "state")
    with pytest.raises(Unsupported, match="install the Debian package xl2tpd"):
        await tested.ensure(SPEC)
    await tested.close()


async def test_another_protocols_server_is_refused(host: Namespace, directory: Path) -> None:
    with pytest.raises(DriverError):
        await driver(directory).ensure(SshServer(port=22, ipv4_pool="10.72.0.0/24"))


async def test_logins_are_put_read_back_changed_and_removed(host: Namespace, directory: Path) -> None:
    tested = driver(directory)
    assert await tested.credentials() == {}
    alice, bob = login("alice", 'a "quoted" \\ # one'), login("bob", "x" * 255)
    assert await tested.put([alice, bob]) == {}
    refused = await tested.put([login("alice", "changed"), login("carol", "@/etc/shadow")])
    assert list(refused) == ["carol"]

    found = await driver(directory).credentials()
    assert {name: each.digest() for name, each in found.items()} == {
        "alice": login("alice", "changed").digest(),
        "bob": bob.digest(),
    }
    path = directory / "ppp" / "chap-secrets"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert await tested.remove(["alice", "nobody"]) == {}
    assert set(await tested.credentials()) == {"bob"}


async def test_a_line_that_somebody_added_is_no_login(host: Namespace, directory: Path) -> None:
    tested = driver(directory)
    await tested.put([login("alice", "password")])
    path = directory / "ppp" / "chap-secrets"
    path.write_text(path.read_text() + "mallory * password *\n")
    assert set(await tested.credentials()) == {"alice"}
    await tested.put([login("bob", "password")])
    assert "mallory" not in path.read_text()


async def test_ten_thousand_logins_are_put_in_a_moment(host: Namespace, directory: Path) -> None:
    tested = driver(directory)
    many = [login(f"user{number}", f"password {number}") for number in range(10_000)]
    began = time.monotonic()
    await tested.put(many)
    assert len(await tested.credentials()) == len(many)
    assert time.monotonic() - began < 5


def test_the_programs_are_those_of_debian() -> None:
    assert shutil.which("charon-systemd") == "/usr/sbin/charon-systemd"
