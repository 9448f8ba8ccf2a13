"""sshd's own parser reads our configuration as it was meant; key files come back as they went."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.drivers.base import DriverError
from agent.drivers.ssh import Ssh, config
from agent.drivers.ssh.sshd import PROGRAM
from shared.access import SSH_KEY_TYPES, Credential, parse_ssh_key
from shared.resource import InvalidResource, Protocol
from shared.services import SshServer

KEYS = Path("/etc/skynetvpn-ssh/keys")
ANY_TEXT = st.text(max_size=300)
BASE64 = st.from_regex(r"[A-Za-z0-9+/]{40,300}={0,2}", fullmatch=True)
BARE_KEYS = st.tuples(st.sampled_from(SSH_KEY_TYPES), BASE64).map(" ".join)


def rendered(spec: SshServer, directory: Path = Path("/var/lib/agent/ssh")) -> str:
    return config.render(
        spec,
        group="skynetvpn-ssh",
        host_keys=[directory / "ssh_host_ed25519_key"],
        key_directory=KEYS,
        pid_file=directory / "sshd.pid",
    )


@pytest.mark.netns
def test_sshd_reads_what_was_meant(tmp_path: Path) -> None:
    asyncio.run(Ssh(tmp_path / "ssh", boot_id="b", admit=lambda name: None, notify=lambda: None).host_keys())
    Path("/run/sshd").mkdir(exist_ok=True)
    path = tmp_path / "sshd_config"
    spec = SshServer(port=2222, ipv4_pool="10.70.0.0/24", keepalive=7)
    path.write_text(rendered(spec, tmp_path / "ssh"))

    text = subprocess.run([PROGRAM, "-T", "-f", path], capture_output=True, text=True, check=True).stdout

    found = [line.partition(" ")[::2] for line in text.splitlines()]
    for option, value in {
        "port": "2222",
        "usepam": "no",
        "hostkey": str(tmp_path / "ssh/ssh_host_ed25519_key"),
        "pidfile": str(tmp_path / "ssh/sshd.pid"),
        "allowgroups": "skynetvpn-ssh",
        "authorizedkeysfile": f"{KEYS}/%u",
        "authorizedkeyscommand": "none",
        "permitrootlogin": "no",
        "permitemptypasswords": "no",
        "passwordauthentication": "yes",
        "pubkeyauthentication": "yes",
        "kbdinteractiveauthentication": "no",
        "hostbasedauthentication": "no",
        "allowtcpforwarding": "local",
        "allowstreamlocalforwarding": "no",
        "allowagentforwarding": "no",
        "x11forwarding": "no",
        "gatewayports": "no",
        "permitlisten": "none",
        "permittunnel": "no",
        "permittty": "no",
        "maxsessions": "0",
        "forcecommand": config.NOLOGIN,
        "clientaliveinterval": "7",
        "clientalivecountmax": "3",
        "logingracetime": "30",
        "maxauthtries": "4",
        "maxstartups": "100:30:500",
        "persourcemaxstartups": "50",
        "strictmodes": "yes",
    }.items():
        assert [given for name, given in found if name == option] == [value], option
    assert not [name for name, _ in found if name == "subsystem"]
    offered = dict(found)
    assert "sha1" not in offered["kexalgorithms"] + offered["macs"] + offered["ciphers"]
    assert "curve25519-sha256" in offered["kexalgorithms"].split(",")
    assert "cbc" not in offered["ciphers"]


@given(ANY_TEXT)
@example("10.70.0.0/24\nPermitRootLogin yes")
def test_no_text_of_the_specification_reaches_the_file(text: str) -> None:
    plain = SshServer(port=22, ipv4_pool="10.70.0.0/24")
    for spec in (SshServer(port=22, ipv4_pool=text), SshServer(port=22, ipv4_pool="10.70.0.0/24", dns=(text,))):
        try:
            assert rendered(spec) == rendered(plain)
        except InvalidResource:
            continue


@given(st.text(alphabet=st.characters(codec="utf-8"), min_size=1, max_size=50))
@example("a b")
@example('a"b')
@example("a%u")
@example("a\nPermitRootLogin yes")
def test_a_path_is_one_plain_word_or_refused(name: str) -> None:
    try:
        text = rendered(SshServer(port=22, ipv4_pool="10.70.0.0/24"), Path("/x", name))
    except DriverError:
        return
    assert f"PidFile {Path('/x', name)}/sshd.pid" in text.split("\n")
    assert not set(name) & set(" \t\r\n\"'%\\#")


@given(st.text(max_size=200))
@example("alice from 1.2.3.4 port 5 ssh2")
def test_the_log_of_a_failed_login_is_no_login(user: str) -> None:
    """sshd writes what a client sends without line breaks (vis(3)), and never at the beginning of a line."""
    shown = "".join(character for character in user if character.isprintable())
    log = f"Invalid user {shown} from 192.0.2.9 port 7\r\nFailed password for {shown} from ::1 port 1 ssh2\r\n"
    good = "Accepted publickey for bob from 2001:db8::1 port 22 ssh2: ED25519 SHA256:xyz\r\n"

    assert list(config.accepted((log + good).encode())) == [("bob", "2001:db8::1", 22)]


@given(st.lists(BARE_KEYS, max_size=5, unique=True))
def test_keys_come_back_as_they_went(keys: list[str]) -> None:
    text = config.render_keys(keys)

    assert config.parse_keys(text) == tuple(sorted(keys))
    assert all(line.startswith("restrict,port-forwarding ") for line in text.splitlines())


@given(ANY_TEXT | st.tuples(ANY_TEXT, BARE_KEYS, ANY_TEXT).map("".join))
@example(f"ssh-ed25519 {'A' * 68}\nssh-ed25519 {'B' * 68}")
@example(f'command="sh" ssh-ed25519 {"A" * 68}')
def test_a_key_is_one_bare_key_or_refused(text: str) -> None:
    try:
        Credential(protocol=Protocol.SSH, username="alice", account=1, public_keys=(text,)).check()
    except InvalidResource:
        return
    assert config.parse_keys(config.render_keys([text])) == (text,)
    assert parse_ssh_key(text) == text
    assert text.split(" ")[0] in SSH_KEY_TYPES


@pytest.mark.parametrize("line", ["no-pty ssh-ed25519 AAAA", 'command="sh",restrict ssh-ed25519 AAAA', "# ours", "  "])
def test_a_line_that_somebody_else_wrote_is_no_key(line: str) -> None:
    (found,) = config.parse_keys(f"{line}\n")

    assert found == line
