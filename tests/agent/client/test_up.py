"""`up` as a person meets it: real children in a namespace that stands for the machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.netns import Namespace, wait_until

pytestmark = pytest.mark.netns

STARTED = 60.0  # seconds, on a busy machine


@pytest.fixture
def machine() -> Iterator[Namespace]:
    with Namespace("up") as namespace:
        yield namespace


def test_one_password_for_the_first_start_and_none_for_the_second(machine: Namespace, tmp_path: Path) -> None:
    first = Up(machine, tmp_path)
    told = first.told()
    assert login(machine, tmp_path, told["url"], told["password"]) == 0
    assert told["password"] not in everything(tmp_path / "up")
    assert first.end(signal.SIGTERM) == 0
    assert running(machine) == []

    second = Up(machine, tmp_path)
    again = second.told()
    assert again == told | {"password": None}
    assert login(machine, tmp_path, told["url"], told["password"]) == 0
    assert second.end(signal.SIGINT) == 0
    assert running(machine) == []


def test_a_child_that_ends_ends_all_with_its_last_words(machine: Namespace, tmp_path: Path) -> None:
    up = Up(machine, tmp_path)
    up.told()

    kill(machine, "skynetvpn-controller", signal.SIGKILL)

    assert up.process.wait(STARTED) == 1
    assert "the controller ended with signal 9; its last words" in up.words()
    assert running(machine) == []


def test_children_end_when_up_is_killed(machine: Namespace, tmp_path: Path) -> None:
    up = Up(machine, tmp_path)
    up.told()

    up.process.kill()

    wait_until(lambda: running(machine) == [], 20)


def test_a_second_up_in_the_same_directory_is_refused(machine: Namespace, tmp_path: Path) -> None:
    up = Up(machine, tmp_path)
    up.told()

    other = Up(machine, tmp_path)
    assert other.process.wait(STARTED) == 1
    assert "in use by another skynetvpn up" in other.words()

    assert up.end(signal.SIGTERM) == 0


def test_a_taken_port_is_told_in_the_controllers_words(machine: Namespace, tmp_path: Path) -> None:
    with machine.entered():
        import socket

        taken = socket.create_server(("127.0.0.1", 8080))
    with taken:
        up = Up(machine, tmp_path)
        assert up.process.wait(STARTED) == 1
    assert "the controller ended with" in up.words() and "8080" in up.words()


class Up:
    """`skynetvpn up` with its standard output and error."""

    def __init__(self, machine: Namespace, home: Path) -> None:
        argv = ("-o", "json", "up", "--dir", str(home / "up"), "--endpoint", "127.0.0.1")
        own = (sys.executable, "-m", "tests.support.ownrun", script("skynetvpn"), *argv)
        self.process = machine.popen(*own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def told(self) -> dict[str, Any]:
        """What it says when all is up."""
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if line == "}\n":
                told: dict[str, Any] = json.loads("".join(lines))
                return told
        raise AssertionError(self.words())

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(STARTED)

    def words(self) -> str:
        assert self.process.stderr is not None
        return str(self.process.stderr.read())


def script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def running(machine: Namespace) -> list[str]:
    """The command lines of our programs inside; the tunnel's own program stays, as on every node."""
    found = []
    for pid in machine.pids():
        try:
            command = Path("/proc", str(pid), "cmdline").read_bytes().decode().replace("\0", " ")
        except OSError:
            continue
        if "skynetvpn" in command:
            found.append(f"{pid} {command}")
    return found


def kill(machine: Namespace, program: str, number: signal.Signals) -> None:
    (line,) = [line for line in running(machine) if program in line]
    os.kill(int(line.split()[0]), number)


def login(machine: Namespace, home: Path, url: str, password: str) -> int:
    command = (
        "ip",
        "netns",
        "exec",
        machine.name,
        script("skynetvpn"),
        "login",
        "--url",
        url,
        "--password-stdin",
        "admin",
    )
    environ = os.environ | {"XDG_CONFIG_HOME": str(home / "config")}
    return subprocess.run(
        command, input=f"{password}\n", text=True, env=environ, timeout=STARTED, check=False
    ).returncode


def everything(directory: Path) -> str:
    return "".join(path.read_bytes().decode(errors="replace") for path in directory.rglob("*") if path.is_file())
