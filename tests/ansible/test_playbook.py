"""The playbook as an administrator runs it: by ssh, to a Debian 12 that systemd has booted and that reaches no index.

What the services do then is tested elsewhere; here is that they are there, and what a second run changes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.netns import Namespace
from tests.systemd.machine import PATIENCE, PROJECT, ROOT, Machine

pytestmark = [pytest.mark.netns, pytest.mark.timeout(int(8 * PATIENCE))]

AGENT, CONTROLLER = "skynetvpn-agent.service", "skynetvpn-controller.service"
HERE, ADMINISTRATOR = "192.0.2.1", "192.0.2.2"
SETTINGS = "/var/lib/skynetvpn-agent/agent.yaml"
PASSWORD = "tr0ub4dor and 3"
CHECKOUT = (
    "controller",
    "agent",
    "shared",
    "systemd",
    "requirements",
    "docs",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
WHEELS = ROOT.parent / "wheels"


class Fleet:
    """A machine that is to be controller and node, and an administrator with an inventory on another."""

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self.machine = stack.enter_context(Machine(empty=True))
        self._administrator = stack.enter_context(Namespace("admin"))
        self.machine.network.connect(self._administrator, f"{HERE}/24", f"{ADMINISTRATOR}/24")
        self.machine.boot()
        self._home, self._inventory = directory, directory / "inventory.json"
        (directory / "checkout").mkdir()
        key, known = directory / "key", directory / "known_hosts"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        self.machine.run(
            "install", "-D", "-m600", "/dev/stdin", "/root/.ssh/authorized_keys", stdin=_text(f"{key}.pub")
        )
        known.write_text(f"{HERE} {_text(ROOT / 'etc/ssh/ssh_host_ed25519_key.pub')}")
        self.machine.run("install", "-D", "/dev/null", "/var/lib/apt/periodic/update-success-stamp")  # no mirror here
        for part in CHECKOUT:
            copy = shutil.copytree if (PROJECT / part).is_dir() else shutil.copy
            copy(PROJECT / part, directory / "checkout" / part)
        self.host: dict[str, Any] = {
            "ansible_host": HERE,
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(key),
            "ansible_ssh_common_args": f"-o UserKnownHostsFile={known}",
            "program_source": str(directory / "checkout"),
            "program_wheels": str(WHEELS),
            "controller_settings": {"node_address": f"{HERE}:8443", "tunnel": {"mtu": 1380}},
            "controller_administrator": {"name": "boss", "email": "boss@example.org", "password": PASSWORD},
            "node_name": "fra1",
            "node_country": "DE",
            "node_city": "Frankfurt",
            "node_endpoint": HERE,
            "node_protocols": ["wireguard", "openvpn"],
            "node_settings": {"capacity_mbit": 10000},
        }

    def play(self, *playbook: str) -> list[str]:
        """Run it with these options; return the names of the tasks that changed something."""
        groups = {"controllers": {"hosts": {"one": self.host}}, "nodes": {"hosts": {"one": {}}}}
        self._inventory.write_text(json.dumps(groups))
        argv = (str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(self._inventory), *playbook)
        own = {"ANSIBLE_HOME": str(self._home), "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self._home / "cp")}
        done = subprocess.run(
            ("ip", "netns", "exec", self._administrator.name, *argv),
            cwd=PROJECT / "ansible",
            env=os.environ | {"LC_ALL": "C.UTF-8", "ANSIBLE_NOCOLOR": "1"} | own,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=5 * PATIENCE,
        )
        print(done.stdout)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{self.machine.logs()}"
        assert PASSWORD not in done.stdout + done.stderr
        parts = [part.splitlines() for part in done.stdout.split("\n\n") if "\nchanged: " in part]
        return [re.sub(r".*\[(?:\w+ : )?(.*)\] \*+", r"\1", part[0]) for part in parts]

    def node(self) -> dict[str, Any]:
        (node,) = json.loads(self.controller("node", "list", "--output", "json"))
        assert isinstance(node, dict)
        return node

    def controller(self, *argv: str) -> str:
        return self.machine.run("/opt/skynetvpn/.venv/bin/skynetvpn-controller", *argv, user="skynetvpn")

    def settings(self, path: str) -> dict[str, Any]:
        found = yaml.safe_load(self.machine.run("cat", path))
        assert isinstance(found, dict)
        return found

    def starts(self) -> dict[str, str]:
        """When which service was started the last time."""
        return {unit: self.machine.unit(unit, "ActiveEnterTimestampMonotonic")[0] for unit in (AGENT, CONTROLLER)}


def _text(path: str | Path) -> str:
    return Path(path).read_text()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with ExitStack() as stack:
        yield Fleet(stack, tmp_path_factory.mktemp("fleet"))


def test_a_new_host_can_be_checked_before(fleet: Fleet) -> None:
    assert "The release has a folder" in fleet.play("site.yml", "--check")
    assert fleet.machine.run("find", "/opt", "/etc", "/var/lib", "-name", "*skynetvpn*") == ""


def test_a_new_host_becomes_controller_and_node(fleet: Fleet) -> None:
    machine = fleet.machine
    fleet.play("site.yml")
    node = fleet.node()
    assert (node["name"], node["country"], node["city"], node["endpoint"]) == ("fra1", "DE", "Frankfurt", HERE)
    assert (node["status"], set(node["protocols"]), node["problem"]) == ("enabled", {"wireguard", "openvpn"}, None)
    for unit in (AGENT, CONTROLLER):
        assert machine.unit(unit, "ActiveState", "UnitFileState") == ["active", "enabled"]
    assert len(machine.pids("openvpn")) == 2
    (account,) = json.loads(fleet.controller("user", "list", "--output", "json"))
    assert (account["username"], account["role"]) == ("boss", "admin")
    controller, agent = fleet.settings("/var/lib/skynetvpn/controller.yaml"), fleet.settings(SETTINGS)
    assert controller.items() >= fleet.host["controller_settings"].items()
    assert controller.keys() >= {"database_url", "ca_directory", "secret_key_file"}
    assert agent["capacity_mbit"] == 10000


def test_secrets_are_in_no_log_and_no_file_for_all(fleet: Fleet) -> None:
    told = fleet.machine.run("journalctl", "--no-pager", "--output=cat")
    assert "ansible" in told and PASSWORD not in told and "skyjoin1_" not in told
    homes = ("/var/lib/skynetvpn", "/var/lib/skynetvpn-agent")
    readable = fleet.machine.run("find", *homes, "-type", "f", "-size", "+0", "-perm", "/077")
    assert readable == ""


def test_a_second_run_changes_nothing(fleet: Fleet) -> None:
    assert fleet.play("site.yml") == []


def test_a_change_touches_what_it_concerns_and_nothing_else(fleet: Fleet) -> None:
    started = fleet.starts()
    fleet.host |= {"node_settings": {"capacity_mbit": 2500}, "node_protocols": ["wireguard"]}
    assert fleet.play("site.yml") == [
        "The controller has the node as the inventory has it, and a token for its host",
        "The settings are what the inventory says",
        "Restart skynetvpn-agent",
        "Nothing starts OpenVPN",
        "Nothing is there any more for openvpn",
        "Restart skynetvpn-agent",
    ]
    assert fleet.node()["protocols"] == ["wireguard"]
    assert fleet.settings(SETTINGS)["capacity_mbit"] == 2500
    now = fleet.starts()
    assert now[CONTROLLER] == started[CONTROLLER]
    assert now[AGENT] != started[AGENT]
    assert fleet.machine.pids("openvpn") == []
    assert fleet.machine.run("find", "/etc/systemd", "-name", "skynetvpn-openvpn*") == ""


def test_a_node_is_taken_out_of_service(fleet: Fleet) -> None:
    fleet.play("retire.yml", "--limit", "one")
    assert fleet.node()["status"] == "disabled"
    assert fleet.machine.unit(AGENT, "ActiveState", "UnitFileState") == ["inactive", "disabled"]
    assert fleet.machine.pids("wireguard-go") == []
    assert "skynetvpn" not in fleet.machine.run("nft", "list", "tables")
