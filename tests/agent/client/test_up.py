"""`up` as a person meets it: real children in a namespace that stands for the machine."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.host import Host
from tests.support.netns import unique, wait_until

pytestmark = pytest.mark.netns

STARTED = 60.0  # seconds, on a busy machine


@pytest.fixture(scope="module")
def machine() -> Iterator[Host]:
    with Host("up") as host:
        yield host


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def first(machine: Host, home: Path) -> dict[str, Any]:
    """What the first start in the directory said; it is over."""
    up = Up(machine, home)
    told = up.told()

    other = Up(machine, home)
    assert other.process.wait(STARTED) == 1
    assert "in use by another skynetvpn up" in other.words()

    assert login(machine, home, told) == 0
    assert up.end(signal.SIGTERM) == 0
    assert running(machine) == []
    return told


def test_a_second_start_goes_on_with_what_is_there(machine: Host, home: Path, first: dict[str, Any]) -> None:
    assert first["password"] not in everything(home / "up")
    (interface,) = tunnels(machine)

    up = Up(machine, home)

    assert up.told() == first | {"password": None}
    assert login(machine, home, first) == 0
    assert tunnels(machine) == [interface], "a live interface is adopted, not made anew"
    wait_until(lambda: "skynetvpn_agent_failures 0" in agent_metrics(machine))
    assert up.end(signal.SIGINT) == 0
    assert running(machine) == []


@pytest.mark.parametrize("program", ["controller", "agent"])
def test_a_child_that_ends_ends_all_with_its_last_words(
    machine: Host, home: Path, first: dict[str, Any], program: str
) -> None:
    up = Up(machine, home)
    up.told()

    kill(machine, f"skynetvpn-{program}", signal.SIGKILL)

    assert up.process.wait(STARTED) == 1
    assert f"the {program} ended with signal 9; its last words" in up.words()
    assert running(machine) == []


def test_children_end_when_up_is_killed(machine: Host, home: Path, first: dict[str, Any]) -> None:
    up = Up(machine, home)
    up.told()

    up.process.kill()

    up.process.wait(STARTED)
    wait_until(lambda: running(machine) == [], 30)


def test_a_taken_port_is_told_before_anything_is_made(machine: Host, tmp_path: Path) -> None:
    for port, option in ((8080, "--listen"), (8443, "--node-listen")):
        with taken(machine, port):
            up = Up(machine, tmp_path)
            assert up.process.wait(STARTED) == 1
        assert f"cannot listen on 127.0.0.1:{port}: " in up.words()
        assert up.words().endswith(f"with {option}\n")
        assert not (tmp_path / "up" / "controller").exists()


def test_a_second_installation_does_not_take_over_the_first_ones_interface(
    machine: Host, tmp_path: Path, first: dict[str, Any]
) -> None:
    before = machine.run("wg", "show", "sky0", "public-key")
    up = Up(machine, tmp_path)
    assert up.process.wait(STARTED) == 1
    assert "an interface sky0 already, of another installation" in up.words()
    assert not (tmp_path / "up" / "controller").exists()
    assert machine.run("wg", "show", "sky0", "public-key") == before


def test_a_taken_port_is_told_in_the_controllers_words(machine: Host, home: Path, first: dict[str, Any]) -> None:
    with taken(machine, 8080):
        up = Up(machine, home)
        assert up.process.wait(STARTED) == 1
    assert "the controller ended with" in up.words() and "8080" in up.words()


def test_the_password_is_told_also_where_the_first_start_fails(tmp_path: Path) -> None:
    with Host("up") as machine:
        with taken(machine, 9586):  # the agent's metrics
            up = Up(machine, tmp_path)
            assert up.process.wait(STARTED) == 1
        (password,) = re.findall(r"administrator is made: admin, password (\S+)", up.words())

        up = Up(machine, tmp_path)
        assert login(machine, tmp_path, up.told() | {"password": password}) == 0


def test_a_protocol_that_fails_is_told_in_the_nodes_words_and_the_others_go_on(
    machine: Host, home: Path, first: dict[str, Any]
) -> None:
    def named() -> object:
        return yaml.safe_load((home / "up" / "agent" / "agent.yaml").read_text())["protocols"]

    assert first["protocols"] == {"wireguard": {"status": "running", "problem": None}}
    with taken(machine, 1194, "0.0.0.0"):
        up = Up(machine, home, "--protocols", "wireguard,openvpn")
        servers = up.told()["protocols"]
        assert servers["wireguard"]["status"] == "running"
        assert servers["openvpn"]["status"] == "failed"
        assert "1194" in servers["openvpn"]["problem"]
        assert up.process.poll() is None
        assert up.end(signal.SIGINT) == 0
    up = Up(machine, home)
    assert {server["status"] for server in up.told()["protocols"].values()} == {"running"}, "no word of the past"
    assert named() == ["wireguard", "openvpn"], "as the last start was told"
    assert up.end(signal.SIGINT) == 0
    up = Up(machine, home, "--protocols", "wireguard")
    assert up.told()["protocols"] == first["protocols"]
    assert named() == ["wireguard"]
    assert up.end(signal.SIGINT) == 0


def test_an_unknown_protocol_is_refused_before_anything_is_made(machine: Host, tmp_path: Path) -> None:
    up = Up(machine, tmp_path, "--protocols", "foo")

    assert up.process.wait(STARTED) == 2
    assert "'foo' is not one of wireguard, openvpn, ssh, l2tp" in up.words()
    assert not (tmp_path / "up").exists()


def test_other_addresses_than_the_directorys_are_wrong_usage(machine: Host, home: Path, first: dict[str, Any]) -> None:
    up = Up(machine, home, "--listen", "127.0.0.1:8081")

    assert up.process.wait(STARTED) == 2
    assert "says listen: 127.0.0.1:8080" in up.words()


class Up:
    """`skynetvpn up`, and all that it says."""

    def __init__(self, machine: Host, home: Path, *options: str) -> None:
        argv = ("-o", "json", "up", "--dir", str(home / "up"), "--endpoint", "127.0.0.1", *options)
        self._log = home / f"{unique('up')}.log"
        self.process = machine.start(self._log, script("skynetvpn"), *argv)

    def told(self) -> dict[str, Any]:
        """What it says when all is up."""
        wait_until(lambda: self.words().endswith("}\n") or self.process.poll() is not None, STARTED)
        assert self.process.poll() is None, self.words()
        told: dict[str, Any] = json.loads(self.words()[self.words().index("{\n") :])
        return told

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(STARTED)

    def words(self) -> str:
        return self._log.read_text()


def taken(machine: Host, port: int, host: str = "127.0.0.1") -> socket.socket:
    with machine.namespace.entered():
        return socket.create_server((host, port))


def script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def running(machine: Host) -> list[str]:
    """The command lines of our programs inside; the tunnel's own program stays, as on every node."""
    found = []
    for pid in machine.namespace.pids():
        try:
            command = Path("/proc", str(pid), "cmdline").read_bytes().decode().replace("\0", " ")
        except OSError:
            continue
        if "skynetvpn" in command:
            found.append(f"{pid} {command}")
    return found


def tunnels(machine: Host) -> list[str]:
    """The node's interfaces with their index, which is new for each new one."""
    lines = machine.run("ip", "-o", "link", "show", "type", "tun").splitlines()
    return [line.split(":")[0] + line.split(":")[1] for line in lines]


def agent_metrics(machine: Host) -> str:
    with machine.namespace.entered(), urllib.request.urlopen("http://127.0.0.1:9586/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def kill(machine: Host, program: str, number: signal.Signals) -> None:
    (line,) = [line for line in running(machine) if program in line]
    os.kill(int(line.split()[0]), number)


def login(machine: Host, home: Path, told: dict[str, Any]) -> int:
    program = ("ip", "netns", "exec", machine.namespace.name, script("skynetvpn"))
    return subprocess.run(
        (*program, "login", "--url", told["url"], "--password-stdin", told["user"]),
        input=f"{told['password']}\n",
        text=True,
        env=os.environ | {"XDG_CONFIG_HOME": str(home / "config")},
        timeout=STARTED,
        check=False,
    ).returncode


def everything(directory: Path) -> str:
    return "".join(path.read_bytes().decode(errors="replace") for path in directory.rglob("*") if path.is_file())
