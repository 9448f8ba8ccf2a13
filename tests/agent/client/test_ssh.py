"""`connect --protocol ssh`: the real program, against the sshd that a node runs."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from agent.client.profile import Profile
from agent.drivers.ssh import Ssh
from tests.support.netns import wait_until
from tests.support.openssh import ECHO_PORT, FAR, NODE, PASSWORD, PORT, Net, connect
from tests.support.openssh import driver as driver
from tests.support.openssh import net as net

from .conftest import (
    Cli,
    FakeController,
    in_arguments,
    left_by_programs,
    readable_by_others,
    report,
    server,
)

PROXY = "127.0.0.1:1080"


def through_proxy(net: Net) -> bytes:
    """What the echo server behind the node sends back (RFC 1928)."""
    with connect(net.client, 1080) as opened:
        opened.sendall(bytes([5, 1, 0]))
        assert opened.recv(2) == bytes([5, 0])
        opened.sendall(bytes([5, 1, 0, 1]) + socket.inet_aton(FAR) + ECHO_PORT.to_bytes(2))
        assert opened.recv(10, socket.MSG_WAITALL)[1] == 0
        opened.sendall(b"hello")
        return opened.recv(5, socket.MSG_WAITALL)


async def material(driver: Ssh, **changes: Any) -> dict[str, Any]:
    return {
        "protocol": "ssh",
        "host": NODE,
        "port": PORT,
        "username": "alice",
        "password": PASSWORD,
        "host_keys": await driver.host_keys(),
        "tcp_forwarding": True,
        "tun": False,
    } | changes


def nothing_is_left(net: Net, controller: FakeController, home: Path) -> bool:
    assert ":1080" not in net.client.run("ss", "-Htln")
    assert in_arguments(str(home / "state")) == []
    assert left_by_programs(home) == []
    assert controller.connections == []
    return Profile.of_user().tunnels() == []


@pytest.mark.netns
async def test_connected_shown_and_taken_down_again(
    net: Net, driver: Ssh, logged_in: Cli, controller: FakeController, home: Path
) -> None:
    controller.servers = [server("s1", name="fra1")]
    controller.config = await material(driver)
    report(controller)

    outcome = await logged_in("-o", "json", "connect", "fra1", "--protocol", "ssh", "--netns", net.client.name)

    assert outcome.status == 0, outcome.err
    assert (outcome.json["interface"], outcome.json["endpoint"]) == (PROXY, f"[{NODE}]:{PORT}")
    assert await asyncio.to_thread(through_proxy, net) == b"hello"
    assert in_arguments(PASSWORD) == []
    assert readable_by_others(home / "state") == []
    assert [path for path in left_by_programs(home) if PASSWORD in path.read_text(errors="replace")] == []

    (row,) = (await logged_in("-o", "json", "status")).json
    assert (row["protocol"], row["interface"]) == ("ssh", PROXY)
    assert row["local"] is not None
    again = await logged_in("connect", "fra1", "--protocol", "ssh", "--netns", net.client.name)
    assert again.status == 1 and f"connected to fra1 already by {PROXY}" in again.err

    assert (await logged_in("disconnect", "fra1")).status == 0
    assert nothing_is_left(net, controller, home)


@pytest.mark.netns
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"password": "a wrong one"}, "Permission denied"),
        ({"host_keys": []}, "Host key verification failed"),
        ({"port": 9}, "Connection refused"),
        ({"tcp_forwarding": False}, "tun devices only"),
        ({"username": "-oProxyCommand=x"}, "cannot be used"),
        ({"host": "-oProxyCommand=x"}, "cannot be used"),
        ({"host_keys": ["ssh-ed25519 x\n* ssh-rsa y"]}, "cannot be used"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_a_refusal_is_one_line_and_leaves_nothing(
    net: Net,
    driver: Ssh,
    logged_in: Cli,
    controller: FakeController,
    home: Path,
    changes: dict[str, Any],
    words: str,
) -> None:
    controller.servers = [server("s1", name="fra1")]
    controller.config = await material(driver, **changes)

    outcome = await logged_in("connect", "--protocol", "ssh", "--netns", net.client.name)

    assert outcome.status == 1
    assert words in outcome.err.splitlines()[-1], outcome.err
    assert outcome.err.splitlines()[-1].startswith("skynetvpn: ")
    assert nothing_is_left(net, controller, home)


@pytest.mark.netns
async def test_interrupted_it_leaves_nothing(net: Net, logged_in: Cli, controller: FakeController, home: Path) -> None:
    with socket.create_server((NODE, PORT)) as silent:  # it accepts, and never says a word
        controller.servers = [server("s1", name="fra1")]
        controller.config = {"host": NODE, "port": PORT, "username": "alice", "password": PASSWORD, "host_keys": []}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "agent.client", "connect", "--protocol", "ssh", "--netns", net.client.name),
            stderr=asyncio.subprocess.PIPE,
            env=os.environ,
        )
        await asyncio.to_thread(wait_until, lambda: in_arguments(str(home / "state")), 30)
        process.send_signal(signal.SIGINT)
        await asyncio.sleep(0)
        silent.accept()[0].close()
        _, words = await process.communicate()

    assert process.returncode == 130 and b"Traceback" not in words
    assert nothing_is_left(net, controller, home)
