"""Threat 30: settings that are wrong, exposed or insecure stop the start, and all of them are named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from agent import config
from agent.errors import AgentError
from shared.resource import Protocol
from shared.settings import SettingsError

ROOT = Path(__file__).parents[2]


def written(directory: Path, text: str) -> Path:
    path = directory / "agent.yaml"
    path.write_text(text)
    return path


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    text = "controller: http://controller\nguard_share: 2\nbackend: magic\nrecheck_seconds: -1\nsecret: x\n"
    with pytest.raises(SettingsError) as caught:
        config.load(written(tmp_path, text), {})
    named = " ".join(caught.value.problems)
    for word in ("directory", "controller", "guard_share", "backend", "recheck_seconds", "secret"):
        assert word in named


@pytest.mark.parametrize(
    "address", ["http://c:8443", "https://c:8443", "c", "c:", "c:0", "c:70000", "::1:8443", ":8443", "c/x:1", ""]
)
def test_controller_is_host_and_port_and_no_url(address: str) -> None:
    with pytest.raises(ValueError, match="not"):
        config.split_address(address)


@pytest.mark.parametrize(("text", "host"), [("c.example:8443", "c.example"), ("[::1]:8443", "::1")])
def test_names_and_addresses_of_both_kinds_are_taken(text: str, host: str) -> None:
    assert config.split_address(text) == (host, 8443)


def test_environment_overrides_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, f"controller: c:8443\ndirectory: {tmp_path}\n")
    loaded = config.load(path, {"SKYNETVPN_AGENT_METRICS": "", "SKYNETVPN_AGENT_GUARD_MINIMUM": "3"})
    assert (loaded.metrics, loaded.guard_minimum) == ("", 3)


def test_protocols_are_named_and_each_once(tmp_path: Path) -> None:
    path = written(tmp_path, f"controller: c:8443\ndirectory: {tmp_path}\n")
    assert config.load(path, {}).protocols == (Protocol.WIREGUARD,)
    assert config.load(path, {"SKYNETVPN_AGENT_PROTOCOLS": "ssh, l2tp"}).protocols == (Protocol.SSH, Protocol.L2TP)
    for wrong in ("ssh,ssh", "ssh,pptp"):
        with pytest.raises(SettingsError, match="protocols"):
            config.load(path, {"SKYNETVPN_AGENT_PROTOCOLS": wrong})
    assert config.parse_protocols("wireguard,openvpn") == (Protocol.WIREGUARD, Protocol.OPENVPN)
    with pytest.raises(ValueError, match="'pptp' is not one of wireguard, openvpn, ssh, l2tp"):
        config.parse_protocols("ssh,pptp")


def test_enrolment_writes_the_protocols_it_was_told_and_keeps_those_that_are_there(tmp_path: Path) -> None:
    path = tmp_path / "agent.yaml"
    path.write_bytes(config.render(path, directory=tmp_path, controller="c:1", protocols=(Protocol.SSH,)))
    path.write_bytes(config.render(path, directory=tmp_path, controller="c:2"))
    loaded = config.load(path, {})
    assert (loaded.controller, loaded.protocols) == ("c:2", (Protocol.SSH,))


def test_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="enrol this host first"):
        config.load(tmp_path / "agent.yaml", {})


def test_text_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="not YAML"):
        config.load(written(tmp_path, "a: [b\n"), {})


def test_command_ends_with_words_and_no_traceback(tmp_path: Path) -> None:
    path = written(tmp_path, "controller: http://c\n")
    done = subprocess.run(
        [sys.executable, "-m", "agent", "run", "--config", str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "controller:" in done.stderr
    assert "directory: missing" in done.stderr
    assert "Traceback" not in done.stderr
