"""The connection to the management socket, against a socket that says what a test wants."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.drivers.base import DriverError
from agent.drivers.openvpn import management
from agent.drivers.openvpn.management import Management
from agent.drivers.openvpn.messages import MAX_LINE_BYTES, ClientEvent, Notice


def bound(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind(os.path.relpath(path))  # shorter than the absolute name, which may be too long
    return made


class OpenVpn:
    """The other end."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "management.sock"
        self._listener = bound(self.path)
        self._listener.listen()
        self.heard: list[ClientEvent | Notice] = []
        self.ended = asyncio.Event()

    async def connected(self) -> Management:
        connection = await Management.connect(self.path)
        assert connection is not None
        connection.listen(self.heard.append, self.ended.set)
        self._listener.setblocking(False)
        self.socket, _ = await asyncio.get_running_loop().sock_accept(self._listener)
        return connection

    async def read(self) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self.socket, 4096)

    async def say(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    def close(self) -> None:
        self._listener.close()
        if hasattr(self, "socket"):
            self.socket.close()


@pytest.fixture
async def openvpn(tmp_path: Path) -> AsyncIterator[OpenVpn]:
    made = OpenVpn(tmp_path)
    yield made
    made.close()


async def test_answers_come_in_order_with_notifications_between_them(openvpn: OpenVpn) -> None:
    connection = await openvpn.connected()
    connection.tell("client-auth-nt 1 0")
    status = asyncio.create_task(connection.ask("status 3", listing=True))
    pid = asyncio.create_task(connection.ask("pid"))
    await asyncio.sleep(0)
    assert await openvpn.read() == b"client-auth-nt 1 0\nstatus 3\npid\n"
    await openvpn.say(b"SUCCESS: client-auth command succeeded\r\nTITLE\tx\r\n>STATE:1,CONNECTED\r\n")
    await openvpn.say(b">CLIENT:CONNECT,7,0\r\n>CLIENT:ENV,END\r\nROW\r\nEND\r\nSUCCESS: pid=5\r\n")
    assert await status == ["TITLE\tx", "ROW"]
    assert await pid == ["SUCCESS: pid=5"]
    assert openvpn.heard == [Notice("STATE", "1,CONNECTED"), ClientEvent("CONNECT", 7, 0, {})]
    await connection.close()


async def test_an_error_is_openvpns_own_words(openvpn: OpenVpn) -> None:
    connection = await openvpn.connected()
    for listing in (False, True):
        asked = asyncio.create_task(connection.ask("status 3", listing=listing))
        await openvpn.read()
        await openvpn.say(b"ERROR: command failed\r\n")
        with pytest.raises(DriverError, match="openvpn: command failed"):
            await asked
    await connection.close()


async def test_the_peer_is_the_process_that_listens(openvpn: OpenVpn) -> None:
    connection = await openvpn.connected()
    assert connection.pid == os.getpid()
    await connection.close()


async def test_the_end_of_the_connection_is_told_and_ends_what_waits(openvpn: OpenVpn) -> None:
    connection = await openvpn.connected()
    asked = asyncio.create_task(connection.ask("pid"))
    await openvpn.read()
    await openvpn.say(b">FATAL:it is over\r\nhalf a li")
    openvpn.socket.close()
    with pytest.raises(DriverError, match="ended the connection"):
        await asked
    await asyncio.wait_for(openvpn.ended.wait(), 5)
    assert openvpn.heard == [Notice("FATAL", "it is over")]
    assert not connection.open
    with pytest.raises(DriverError, match="ended the connection"):
        connection.tell("pid")
    await connection.close()


@pytest.mark.parametrize("words", [b">CLIENT:CONNECT,nonsense\r\n", b"x" * (MAX_LINE_BYTES + 1)])
async def test_what_is_not_the_protocol_ends_the_connection(openvpn: OpenVpn, words: bytes) -> None:
    connection = await openvpn.connected()
    await openvpn.say(words)
    await asyncio.wait_for(openvpn.ended.wait(), 5)
    assert openvpn.heard == []
    await connection.close()


async def test_closing_it_ourselves_is_no_end(openvpn: OpenVpn) -> None:
    connection = await openvpn.connected()
    await connection.close()
    assert await openvpn.read() == b""
    assert not openvpn.ended.is_set()


async def test_a_command_is_one_line(openvpn: OpenVpn) -> None:
    connection = await openvpn.connected()
    with pytest.raises(DriverError, match="one line"):
        connection.tell("pid\nsignal SIGTERM")
    await connection.close()


async def test_no_answer_is_an_error(openvpn: OpenVpn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(management, "_TIMEOUT", 0.05)
    connection = await openvpn.connected()
    with pytest.raises(DriverError, match="did not answer within"):
        await connection.ask("pid")
    await connection.close()


async def test_an_answer_that_comes_too_late_is_not_taken_for_the_next_one(
    openvpn: OpenVpn, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = await openvpn.connected()
    monkeypatch.setattr(management, "_TIMEOUT", 0.05)
    with pytest.raises(DriverError):
        await connection.ask("pid")
    monkeypatch.setattr(management, "_TIMEOUT", 10)
    asked = asyncio.create_task(connection.ask("version"))
    await asyncio.sleep(0)
    await openvpn.say(b"SUCCESS: pid=5\r\nSUCCESS: version\r\n")
    assert await asked == ["SUCCESS: version"]
    await connection.close()


async def test_nobody_at_the_socket_is_none_however_deep_it_is(tmp_path: Path) -> None:
    assert await Management.connect(tmp_path / "none.sock") is None
    bound(tmp_path / "left.sock").close()
    assert await Management.connect(tmp_path / "left.sock") is None

    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    assert await Management.connect(deep / "none.sock") is None
    assert await Management.connect(tmp_path / "no" / "such.sock") is None
