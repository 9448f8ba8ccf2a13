"""The service files: systemd accepts them, they are as closed as promised, and they start what we install."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from shared.resource import Protocol

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "systemd"
INSTALLED = "/opt/skynetvpn/.venv/bin/"
COMMANDS = {
    "skynetvpn-controller": "skynetvpn-controller run --config /etc/skynetvpn/controller.yaml",
    "skynetvpn-agent": "skynetvpn-agent run --config /var/lib/skynetvpn-agent/agent.yaml",
}
EXPOSURE = {"skynetvpn-controller": 1.5, "skynetvpn-agent": 3.0, "skynetvpn-openvpn@": 2.0}
SERVICES = sorted(COMMANDS)
DROP_INS = sorted(path.stem for path in (UNITS / "protocols.d").glob("*.conf"))


def run(argv: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, timeout=60)


def settings(service: str) -> dict[str, list[str]]:
    """The unit's lines by key; a key may stand on several."""
    found: dict[str, list[str]] = {}
    for line in (UNITS / f"{service}.service").read_text().splitlines():
        key, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("service", SERVICES)
def test_systemd_has_nothing_to_say_about_the_unit(service: str, tmp_path: Path) -> None:
    # verify wants the program to be there, and it is not installed on the machine that tests.
    program = tmp_path / service
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / f"{service}.service"
    unit.write_text((UNITS / unit.name).read_text().replace(INSTALLED + service, str(program)))
    verified = run(["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", unit])
    assert (verified.returncode, verified.stderr) == (0, "")


def test_systemd_has_nothing_to_say_about_openvpns_units(tmp_path: Path) -> None:
    (tmp_path / "openvpn").touch(0o755)
    service = (UNITS / "skynetvpn-openvpn@.service").read_text()
    (tmp_path / "skynetvpn-openvpn@.service").write_text(service.replace("/usr/sbin/openvpn", f"{tmp_path}/openvpn"))
    shutil.copy(UNITS / "skynetvpn-openvpn.socket", tmp_path)
    verified = run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", tmp_path / "skynetvpn-openvpn.socket"]
    )
    assert (verified.returncode, verified.stderr) == (0, "")
    verified = run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", tmp_path / "skynetvpn-openvpn@x.service"]
    )
    assert (verified.returncode, verified.stderr) == (0, "")


@pytest.mark.parametrize("service", sorted(EXPOSURE))
def test_the_service_is_as_closed_as_promised(service: str) -> None:
    threshold = str(round(EXPOSURE[service] * 10))
    argv = ["systemd-analyze", "security", "--offline=true", "--no-pager", f"--threshold={threshold}"]
    checked = run([*argv, UNITS / f"{service}.service"])
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("service", SERVICES)
def test_the_unit_starts_the_command_that_is_installed(service: str) -> None:
    assert settings(service)["ExecStart"] == [INSTALLED + COMMANDS[service]]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert service in scripts


@pytest.mark.parametrize("service", SERVICES)
def test_the_manager_watches_and_restarts_the_service(service: str) -> None:
    found = settings(service)
    assert found["Type"] == ["notify"]
    assert found["WatchdogSec"] == ["30s"]
    assert found["Restart"][0] in ("always", "on-failure")
    assert found["RestartSec"] == ["2s"]
    assert found["StartLimitIntervalSec"] == ["0"]


@pytest.mark.parametrize("service", ["skynetvpn-agent", "skynetvpn-openvpn@"])
def test_clients_do_not_run_into_the_limit_of_descriptors(service: str) -> None:
    assert settings(service)["LimitNOFILE"] == ["65536"]


def test_only_the_agent_has_a_capability_and_only_one() -> None:
    assert settings("skynetvpn-agent")["CapabilityBoundingSet"] == ["CAP_NET_ADMIN"]
    assert settings("skynetvpn-agent")["AmbientCapabilities"] == ["CAP_NET_ADMIN"]
    assert settings("skynetvpn-controller")["CapabilityBoundingSet"] == [""]


def test_tunnels_outlive_the_agents_service() -> None:
    found = settings("skynetvpn-agent")
    assert found["KillMode"] == ["process"]
    assert (found["RuntimeDirectory"], found["RuntimeDirectoryPreserve"]) == (["wireguard"], ["yes"])


@pytest.mark.parametrize("service", SERVICES)
def test_users_and_directories_are_made_as_the_unit_wants_them(service: str, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    made = run(["systemd-sysusers", f"--root={tmp_path}", UNITS / "sysusers.d" / f"{service}.conf"])
    assert made.returncode == 0, made.stderr
    (user,) = settings(service)["User"]
    accounts = [line.split(":") for line in (tmp_path / "etc/passwd").read_text().splitlines()]
    assert {entry[6] for entry in accounts} == {"/usr/sbin/nologin"}
    (entry,) = (entry for entry in accounts if entry[0] == user)
    made = run(["systemd-tmpfiles", f"--root={tmp_path}", "--create", UNITS / "tmpfiles.d" / f"{service}.conf"])
    assert made.returncode == 0, made.stderr
    (state,) = settings(service)["StateDirectory"]
    home = tmp_path / "var/lib" / state
    assert entry[5] == f"/var/lib/{state}"
    status = home.stat()
    assert (status.st_mode & 0o7777, status.st_uid) == (0o700, int(entry[2]))


def test_the_controllers_settings_are_found_through_the_link(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    run(["systemd-sysusers", f"--root={tmp_path}", UNITS / "sysusers.d" / "skynetvpn-controller.conf"])
    run(["systemd-tmpfiles", f"--root={tmp_path}", "--create", UNITS / "tmpfiles.d" / "skynetvpn-controller.conf"])
    link = tmp_path / "etc/skynetvpn/controller.yaml"
    assert str(link.readlink()) == "/var/lib/skynetvpn/controller.yaml"


def test_the_host_is_told_to_route() -> None:
    lines = (UNITS / "sysctl.d/90-skynetvpn-agent.conf").read_text().splitlines()
    values = dict(line.lstrip("-").split(" = ") for line in lines if line and not line.startswith("#"))
    assert values == {
        "net.ipv4.ip_forward": "1",
        "net.ipv6.conf.all.forwarding": "1",
        "net.ipv6.conf.*.accept_ra": "2",
    }


@pytest.mark.parametrize("chosen", [[name] for name in DROP_INS] + [DROP_INS], ids="+".join)
def test_systemd_has_nothing_to_say_about_the_agent_with_other_protocols(chosen: list[str], tmp_path: Path) -> None:
    program = tmp_path / "skynetvpn-agent"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / "skynetvpn-agent.service"
    unit.write_text((UNITS / unit.name).read_text().replace(INSTALLED + program.name, str(program)))
    directory = tmp_path / "skynetvpn-agent.service.d"
    directory.mkdir()
    for name in chosen:
        (directory / f"{name}.conf").write_text((UNITS / "protocols.d" / f"{name}.conf").read_text())
    verified = run(["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", unit])
    assert (verified.returncode, verified.stderr) == (0, "")


def test_every_protocol_beside_wireguard_has_its_drop_in() -> None:
    assert sorted(set(Protocol) - {Protocol.WIREGUARD}) == DROP_INS
