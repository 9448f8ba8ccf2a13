"""Our sshd with real clients in network namespaces."""

from __future__ import annotations

import pytest

from agent.drivers.ssh import Ssh
from tests.agent.drivers.ssh.conftest import ECHO_PORT, FAR, Net, connect, eventually

pytestmark = pytest.mark.netns


async def test_a_password_lets_in_and_forwards(net: Net, driver: Ssh) -> None:
    net.ssh("-L", f"127.0.0.1:9000:{FAR}:{ECHO_PORT}")

    await eventually(driver.sessions)
    (session,) = await driver.sessions()
    with connect(net.client, 9000) as opened:
        opened.sendall(b"hello")
        assert opened.recv(5) == b"hello"
    assert session.username == "alice"
    assert session.remote.startswith("192.0.2.2:")
    print(session, await driver.sessions())
