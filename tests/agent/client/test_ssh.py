"""`connect --protocol ssh`: the real program, against the sshd that a node runs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from agent.client.profile import Profile
from agent.drivers.ssh import Ssh
from controller.access.ssh import SshConfig
from shared.services import SshServer
from tests.support.netns import wait_until
from tests.support.openssh import ECHO_PORT, FAR, NODE, NUMBER, PASSWORD, PORT, TUN, Net, connect
from tests.support.openssh import driver as driver
from tests.support.openssh import net as net
from tests.support.openssh import tun as tun

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
FOUND = TUN.tunnel(NUMBER)
assert FOUND is not None
OWN = {
    "number": FOUND.number,
    "address": str(FOUND.client),
    "server_address": str(FOUND.server),
    "dns": ["203.0.113.53"],
}
BOTH = msgspec.structs.replace(TUN, tcp_forwarding=True)


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
        "tunnel": None,
    } | changes


def through_tunnel(net: Net) -> bytes:
    with connect(net.client, ECHO_PORT, FAR) as opened:
        opened.sendall(b"hello")
        return opened.recv(5, socket.MSG_WAITALL)


def names(net: Net) -> str:
    return Path("/etc/netns", net.client.name, "resolv.conf").read_text()


def nothing_is_left(net: Net, controller: FakeController, home: Path) -> bool:
    assert ":1080" not in net.client.run("ss", "-Htln")
    assert json.loads(net.client.run("ip", "-j", "link", "show", "type", "tun")) == []
    assert "proto 117" not in net.client.run("ip", "route")
    assert not Path("/etc/netns", net.client.name).exists()
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
    assert (outcome.json["interface"], outcome.json["endpoint"]) == (PROXY, f"{NODE}:{PORT}")
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
@pytest.mark.parametrize(("spec", "options"), [(TUN, ()), (BOTH, ("--tun",))], ids=["by itself", "asked"])
async def test_a_tunnel_connected_shown_and_taken_down_again(
    net: Net,
    tun: Ssh,
    logged_in: Cli,
    controller: FakeController,
    home: Path,
    spec: SshServer,
    options: tuple[str, ...],
) -> None:
    await tun.ensure(spec)
    controller.servers = [server("s1", name="fra1")]
    controller.config = await material(tun, tcp_forwarding=spec.tcp_forwarding, tun=True, tunnel=OWN)
    report(controller)
    netns = ("--netns", net.client.name)

    outcome = await logged_in("-o", "json", "connect", "fra1", "--protocol", "ssh", *options, *netns)

    assert outcome.status == 0, outcome.err
    interface = outcome.json["interface"]
    assert interface.startswith("skyvpn")
    assert (outcome.json["endpoint"], outcome.json["addresses"]) == (f"{NODE}:{PORT}", [f"{OWN['address']}/32"])
    assert outcome.json["latency_ms"] is not None
    assert await asyncio.to_thread(through_tunnel, net) == b"hello"
    assert f"dev {interface}" in net.client.run("ip", "route", "get", "203.0.113.9")
    assert "nameserver 203.0.113.53" in names(net)
    assert in_arguments(PASSWORD) == []
    assert readable_by_others(home / "state") == []

    (row,) = (await logged_in("-o", "json", "status")).json
    assert (row["protocol"], row["interface"]) == ("ssh", interface)
    assert row["local"]["rx"] > 0 and row["local"]["tx"] > 0
    again = await logged_in("connect", "fra1", "--protocol", "ssh", *options, *netns)
    assert again.status == 1 and f"connected to fra1 already by {interface}" in again.err

    assert (await logged_in("disconnect", interface)).status == 0
    assert nothing_is_left(net, controller, home)


@pytest.mark.netns
async def test_a_tunnel_of_a_given_name_without_routes(
    net: Net, tun: Ssh, logged_in: Cli, controller: FakeController, home: Path
) -> None:
    controller.servers = [server("s1", name="fra1")]
    controller.config = await material(tun, tcp_forwarding=False, tun=True, tunnel=OWN)
    report(controller)
    routes = net.client.run("ip", "route")

    outcome = await logged_in(
        *("connect", "--protocol", "ssh", "--tun", "--no-routes"), *("--interface", "mine", "--netns", net.client.name)
    )

    assert outcome.status == 0, outcome.err
    assert "mine in namespace" in outcome.out and "socks5" not in outcome.out
    assert [
        line for line in net.client.run("ip", "route").splitlines() if "dev mine" not in line
    ] == routes.splitlines()
    net.client.run("ping", "-c", "1", "-W", "5", OWN["server_address"])
    assert (await logged_in("disconnect")).status == 0
    assert nothing_is_left(net, controller, home)


@pytest.mark.netns
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tunnel": None}, "no tun device for this login"),
        ({"tunnel": OWN | {"number": OWN["number"] + 1}}, "refuses the tunnel"),
        ({"password": "a wrong one"}, "Permission denied"),
        ({"tunnel": OWN | {"dns": []}, "username": "nobody"}, "Permission denied"),
    ],
    ids=["none", "another's", "password", "user"],
)
async def test_a_refused_tunnel_is_one_line_and_leaves_nothing(
    net: Net,
    tun: Ssh,
    logged_in: Cli,
    controller: FakeController,
    home: Path,
    changes: dict[str, Any],
    words: str,
) -> None:
    controller.servers = [server("s1", name="fra1")]
    controller.config = await material(tun, **{"tunnel": OWN, **changes})

    outcome = await logged_in("connect", "--protocol", "ssh", "--tun", "--netns", net.client.name)

    assert outcome.status == 1
    assert words in outcome.err.splitlines()[-1], outcome.err
    assert nothing_is_left(net, controller, home)


@pytest.mark.netns
async def test_a_controller_that_never_reports_leaves_nothing_of_the_tunnel_when_interrupted(
    net: Net, tun: Ssh, logged_in: Cli, controller: FakeController, home: Path
) -> None:
    controller.servers = [server("s1", name="fra1")]
    controller.config = await material(tun, tcp_forwarding=False, tun=True, tunnel=OWN)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "agent.client", "connect", "--protocol", "ssh", "--netns", net.client.name),
        stderr=asyncio.subprocess.PIPE,
        env=os.environ,
    )
    await asyncio.to_thread(wait_until, lambda: "proto 117" in net.client.run("ip", "route"), 30)
    process.send_signal(signal.SIGINT)
    _, error = await process.communicate()

    assert process.returncode == 130 and b"Traceback" not in error
    assert nothing_is_left(net, controller, home)


@pytest.mark.netns
@pytest.mark.parametrize("spec", [TUN, BOTH], ids=["alone", "beside the proxy"])
async def test_the_commands_of_the_fragment_are_all_that_it_takes(net: Net, tun: Ssh, spec: SshServer) -> None:
    await tun.ensure(spec)
    fragment = SshConfig(
        name="SkynetVPN fra1",
        host=NODE,
        port=PORT,
        username="alice",
        password=PASSWORD,
        host_keys=tuple(await tun.host_keys()),
        tcp_forwarding=spec.tcp_forwarding,
        tun=True,
        tunnel=FOUND,
        keepalive=15,
    ).to_conf()
    config, known = net.directory / "config", net.directory / "known_hosts"
    config.write_text(fragment)
    known.write_text("".join(f"{line[4:]}\n" for line in fragment.splitlines() if line.startswith("#   ")))
    ask = net.directory / "ask"
    ask.write_text(f"#!/bin/sh\necho '{PASSWORD}'\n")
    ask.chmod(0o700)
    asking = ("env", f"SSH_ASKPASS={ask}", "SSH_ASKPASS_REQUIRE=force")
    ssh = (*asking, "ssh", "-F", str(config), "-o", f"UserKnownHostsFile={known}", "-E", str(net.directory / "said"))
    commands = [line[4:] for line in fragment.splitlines() if line.startswith("# $ ")]
    assert len(commands) == 5
    for command in commands:
        if "GATEWAY" in command:  # the node is in the same network
            continue
        for words in command.split(" && "):
            program, *arguments = words.split()
            net.client.run(*(ssh if program == "ssh" else (program,)), *arguments)
    assert await asyncio.to_thread(through_tunnel, net) == b"hello"


async def test_tun_is_for_ssh(logged_in: Cli) -> None:
    outcome = await logged_in("connect", "--protocol", "openvpn", "--tun")

    assert outcome.status == 2 and "--tun goes with --protocol ssh" in outcome.err


@pytest.mark.netns
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"password": "a wrong one"}, "Permission denied"),
        ({"host_keys": []}, "Host key verification failed"),
        ({"port": 9}, "Connection refused"),
        ({"tcp_forwarding": False}, "tun devices only, and has none for this login"),
        ({"tunnel": OWN | {"number": 0}}, "cannot be used"),
        ({"tunnel": OWN | {"number": 2**31 - 1}}, "cannot be used"),
        ({"tunnel": OWN | {"number": "-oProxyCommand=x"}}, "cannot be used"),
        ({"tunnel": OWN | {"address": "0.0.0.0"}}, "cannot be used"),
        ({"tunnel": OWN | {"server_address": "127.0.0.1"}}, "cannot be used"),
        ({"tunnel": OWN | {"address": "2001:db8::1"}}, "cannot be used"),
        ({"tunnel": OWN | {"dns": ["1.1.1.1\noptions x"]}}, "cannot be used"),
        ({"tunnel": OWN | {"dns": ["1.1.1.1"] * 9}}, "cannot be used"),
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


REASON = "the account may not connect now: 1 of 1 sessions are in use; end one of them"


@pytest.mark.netns
@pytest.mark.parametrize("where", ["at the login", "after it"])
async def test_what_keeps_the_account_out_is_told_in_the_controllers_words(
    net: Net, driver: Ssh, logged_in: Cli, controller: FakeController, home: Path, where: str
) -> None:
    controller.servers = [server("s1", name="fra1")]
    controller.config = await material(driver, **({"password": "of nobody"} if where == "at the login" else {}))
    controller.answers["GET /connections"] = lambda: web.json_response(
        [{**connection, "refusal": REASON} for connection in controller.connections]
    )
    net.refusals["alice"] = "too many sessions"

    outcome = await logged_in("connect", "--protocol", "ssh", "--netns", net.client.name)

    assert outcome.status == 1
    last = outcome.err.splitlines()[-1]
    assert last.startswith(f"skynetvpn: {REASON} (")
    assert ("Permission denied" if where == "at the login" else "has ended again") in last
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
