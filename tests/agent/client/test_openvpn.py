"""`connect --protocol openvpn`: the real program, against the server that a node runs."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agent.client import programs
from agent.client.errors import Failure
from agent.client.openvpn import _check
from agent.client.profile import LocalTunnel, Profile
from agent.drivers.openvpn import OpenVpn
from controller.access.openvpn import OpenVpnConfig
from tests.support.netns import unique, wait_until
from tests.support.openvpn import Material, OpenVpnRig

from .conftest import (
    Cli,
    FakeController,
    in_arguments,
    left_by_programs,
    readable_by_others,
    report,
    server,
)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[OpenVpnRig]:
    with OpenVpnRig(tmp_path) as made:
        yield made


@pytest.fixture
async def driver(rig: OpenVpnRig) -> AsyncIterator[OpenVpn]:
    """Serving, with one login: alice."""
    made = rig.driver(lambda username: None, lambda: None)
    await rig.prepare(made)
    await made.ensure(rig.spec())
    await made.put([rig.credential("alice")])
    yield made
    await made.stop()
    await made.close()


@pytest.fixture
def interface() -> str:
    return unique("cli")


def profile_of(rig: OpenVpnRig, material: Material, *, port: int = 1194) -> str:
    return OpenVpnConfig(
        name="fra1",
        host="192.0.2.1",
        port=port,
        transports=("udp", "tcp"),
        server_name="node",
        username="alice",
        ca=rig.authority.pem,
        certificate=material.certificate.decode(),
        private_key=material.key.decode(),
        tls_crypt=rig.authority.tls_crypt_client(rig.directory),
    ).to_conf()


def names(rig: OpenVpnRig) -> str:
    return Path("/etc/netns", rig.far.name, "resolv.conf").read_text()


def nothing_is_left(rig: OpenVpnRig, controller: FakeController, home: Path, interface: str) -> bool:
    assert interface not in rig.far.run("ip", "-o", "link")
    assert not Path("/etc/netns", rig.far.name).exists()
    assert in_arguments(str(home / "state")) == []
    assert left_by_programs(home) == []
    assert controller.connections == []
    return Profile.of_user().tunnels() == []


@pytest.mark.netns
async def test_connected_shown_and_taken_down_again(
    rig: OpenVpnRig, driver: OpenVpn, logged_in: Cli, controller: FakeController, home: Path, interface: str
) -> None:
    controller.servers = [server("s1", name="fra1")]
    controller.conf = profile_of(rig, rig.material("alice"))
    report(controller)
    routes = rig.far.run("ip", "route")

    outcome = await logged_in(
        *("-o", "json", "connect", "fra1", "--protocol", "openvpn"), "--netns", rig.far.name, "--interface", interface
    )

    assert outcome.status == 0, outcome.err
    assert outcome.json["status"] == "connected" and outcome.json["interface"] == interface
    assert outcome.json["addresses"] == ["10.70.0.2/32", "fd70::1000/128"]
    assert outcome.json["endpoint"] == "192.0.2.1:1194"
    assert "nameserver 10.70.0.1" in names(rig)
    assert f"dev {interface}" in rig.far.run("ip", "route", "get", "203.0.113.9")
    rig.far.run("ping", "-c", "1", "-W", "5", "10.70.0.1")
    assert readable_by_others(home / "state") == []
    body = rig.material("alice").key.decode().splitlines()[1]
    assert in_arguments(body) == []

    (row,) = (await logged_in("-o", "json", "status")).json
    assert (row["protocol"], row["interface"]) == ("openvpn", interface)
    assert row["local"]["rx"] > 0 and row["local"]["tx"] > 0
    again = await logged_in("connect", "fra1", "--protocol", "openvpn", "--netns", rig.far.name)
    assert again.status == 1 and f"connected to fra1 already by {interface}" in again.err

    assert (await logged_in("disconnect", "fra1")).status == 0
    assert nothing_is_left(rig, controller, home, interface)
    assert rig.far.run("ip", "route") == routes


@pytest.mark.netns
@pytest.mark.parametrize("wrong", ["login", "port"])
async def test_a_refusal_is_one_line_and_leaves_nothing(
    rig: OpenVpnRig,
    driver: OpenVpn,
    logged_in: Cli,
    controller: FakeController,
    home: Path,
    interface: str,
    wrong: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agent.client.openvpn._SECONDS", 8.0)
    controller.servers = [server("s1", name="fra1")]
    unknown = rig.authority.client("mallory")
    controller.conf = profile_of(rig, unknown) if wrong == "login" else profile_of(rig, rig.material("alice"), port=9)

    outcome = await logged_in(
        "connect", "--protocol", "openvpn", "--netns", rig.far.name, "--interface", interface, "--no-routes"
    )

    assert outcome.status == 1
    words = "fra1 refuses the login: wrong user name" if wrong == "login" else "did not let us in within"
    assert words in outcome.err.splitlines()[-1], outcome.err
    assert nothing_is_left(rig, controller, home, interface)


@pytest.mark.netns
async def test_interrupted_it_leaves_nothing(
    rig: OpenVpnRig, logged_in: Cli, controller: FakeController, home: Path, interface: str
) -> None:
    controller.servers = [server("s1", name="fra1")]
    controller.conf = profile_of(rig, rig.material("alice"))  # nobody listens there
    arguments = ("connect", "--protocol", "openvpn", "--netns", rig.far.name, "--interface", interface)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "agent.client", *arguments, stderr=asyncio.subprocess.PIPE, env=os.environ
    )
    await asyncio.to_thread(wait_until, lambda: in_arguments(f"--dev {interface}"), 30)
    process.send_signal(signal.SIGINT)
    _, words = await process.communicate()

    assert process.returncode == 130 and b"Traceback" not in words
    assert nothing_is_left(rig, controller, home, interface)


@pytest.mark.parametrize(
    "line",
    [
        "up /tmp/x",
        " plugin /usr/lib/x.so",
        "\tscript-security 2",
        "<up>",
        "<ca>\n </ca>x\nup /tmp/x\n</ca>",
        "<ca>\n</ca>\nlog /etc/passwd",
        f"remote {'x' * 300} up /tmp/x",
        "remote a 1 udp\0",
    ],
)
def test_a_profile_that_could_start_programs_is_refused(line: str) -> None:
    with pytest.raises(Failure, match="cannot be used"):
        _check(f"client\ndev tun\n{line}\n".encode())


def test_a_pid_file_that_is_empty_is_not_written_yet(tmp_path: Path) -> None:
    local = LocalTunnel("c1", "s1", "fra1", "skyvpn0", "openvpn", str(tmp_path / "c1"))
    assert not programs.noted(local)
    programs.file_of(local, ".pid").touch()
    assert not programs.noted(local)
    programs.write(local, b"12\n", ".pid")
    assert programs.noted(local)
