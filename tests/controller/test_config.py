from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import yaml

from controller.accounts.principal import Plan
from controller.config import Config, RateLimit, new_secret_line, read_config, read_secrets, split_address
from controller.fleet.settings import ProtocolPools
from shared.settings import SettingsError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "ca").mkdir(mode=0o700)
    for name, text in (("ca/ca.key", "key"), ("secret.key", new_secret_line())):
        path = tmp_path / name
        path.write_text(text)
        path.chmod(0o600)
    return tmp_path


def read(directory: Path, environ: dict[str, str] | None = None, **settings: object) -> Config:
    chosen = {
        "database_url": "sqlite+aiosqlite:///controller.db",
        "ca_directory": "ca",
        "secret_key_file": "secret.key",
    } | settings
    path = directory / "controller.yaml"
    path.write_text(yaml.safe_dump(chosen))
    return read_config(path, environ or {})


def problems(directory: Path, environ: dict[str, str] | None = None, **settings: object) -> str:
    with pytest.raises(SettingsError) as refused:
        read(directory, environ, **settings)
    return "\n".join(refused.value.problems)


def test_paths_are_relative_to_the_file(directory: Path) -> None:
    config = read(directory)
    assert config.ca_directory == directory / "ca"
    assert config.secret_key_file == directory / "secret.key"
    assert config.database_url == f"sqlite+aiosqlite:///{directory}/controller.db"
    assert read(directory, database_url="sqlite+aiosqlite:////srv/x.db").database_url.endswith(":////srv/x.db")


POSTGRESQL = "postgresql+asyncpg://skynetvpn:s3cr3t@db.example.org/skynetvpn"


def test_a_password_of_the_database_is_for_the_owner_of_the_file(directory: Path) -> None:
    with pytest.raises(SettingsError, match=f"chmod 600 {directory}/controller.yaml"):
        read(directory, database_url=POSTGRESQL)
    (directory / "controller.yaml").chmod(0o600)
    config = read(directory, database_url=POSTGRESQL)
    assert config.database_url == POSTGRESQL
    assert "s3cr3t" not in repr(config)
    (directory / "controller.yaml").chmod(0o644)
    assert read(directory, {"SKYNETVPN_DATABASE_URL": POSTGRESQL}).database_url == POSTGRESQL  # it is not in the file


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("postgresql://u:s3cr3t@h/d", "begins with sqlite+aiosqlite:// or postgresql+asyncpg://"),
        ("mysql://u:s3cr3t@h/d", "begins with sqlite+aiosqlite:// or postgresql+asyncpg://"),
        ("s3cr3t", "begins with sqlite+aiosqlite:// or postgresql+asyncpg://"),
        ("postgresql+asyncpg://u:s3cr3t@h:s3cr3t/d", "is no URL"),
        ("postgresql+asyncpg://u:s3cr3t@h", "names no database"),
    ],
)
def test_a_database_that_cannot_be_used_is_told_without_its_password(directory: Path, url: str, reason: str) -> None:
    told = problems(directory, database_url=url)
    assert told.startswith("database_url: ") and reason in told
    assert "s3cr3t" not in told


def test_a_missing_driver_is_told(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asyncpg", None)  # as if it were not installed
    told = problems(directory, {"SKYNETVPN_DATABASE_URL": POSTGRESQL})
    assert told == (
        "database_url (from SKYNETVPN_DATABASE_URL): asyncpg is not installed; "
        "run pip install asyncpg in the controller's environment"
    )


def test_the_defaults_are_the_documented_ones(directory: Path) -> None:
    config = read(directory)
    assert (config.listen, config.node_listen) == ("127.0.0.1:8080", "0.0.0.0:8443")
    assert config.rate_limits == {}
    assert [config.max_connections(plan) for plan in Plan] == [2, 10, 100]
    limited = read(directory, rate_limits={"skynet": {"requests": 5}}, plans={"free": {"max_connections": 7}})
    assert limited.rate_limits == {"skynet": RateLimit(requests=5)}
    assert limited.max_connections(Plan.FREE) == 7


def test_the_networks_of_protocols_lie_beside_each_other(directory: Path) -> None:
    protocols = read(directory).protocols
    pools = [protocols.openvpn.ipv4_pool, protocols.ssh.ipv4_pool, protocols.l2tp.ipv4_pool]
    assert (pools, protocols.openvpn.ipv6_pool) == (["10.67.0.0/16", "10.68.0.0/16", "10.69.0.0/16"], "fd66:6b7a::/112")
    assert pools == [getattr(ProtocolPools(), f"{name}_ipv4") for name in ("openvpn", "ssh", "l2tp")]


@pytest.mark.parametrize(
    ("settings", "problems"),
    [
        (
            {"tunnel": {"ipv4_pool": "10.68.128.0/17"}},
            ["protocols.ssh.ipv4_pool: 10.68.0.0/16 overlaps 10.68.128.0/17 of tunnel.ipv4_pool"],
        ),
        (
            {"protocols": {"openvpn": {"ipv4_pool": "10.70.0.0/16"}, "l2tp": {"ipv4_pool": "10.70.9.0/24"}}},
            ["protocols.l2tp.ipv4_pool: 10.70.9.0/24 overlaps 10.70.0.0/16 of protocols.openvpn.ipv4_pool"],
        ),
        (
            {"protocols": {"openvpn": {"ipv6_pool": "fd66:6b79::/64"}, "ssh": {"ipv4_pool": "10.66.0.0/24"}}},
            [
                "protocols.openvpn.ipv6_pool: fd66:6b79::/64 overlaps fd66:6b79::/112 of tunnel.ipv6_pool",
                "protocols.ssh.ipv4_pool: 10.66.0.0/24 overlaps 10.66.0.0/16 of tunnel.ipv4_pool",
            ],
        ),
    ],
)
def test_networks_that_overlap_are_told(directory: Path, settings: dict[str, object], problems: list[str]) -> None:
    with pytest.raises(SettingsError) as refused:
        read(directory, **settings)
    advice = "; give one of them another network"
    assert sorted(refused.value.problems) == [problem + advice for problem in problems]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"protocols": {"l2tp": {"ipv4_pool": "fd66::/112"}}}, "protocols.l2tp.ipv4_pool: expected an IPv4 network"),
        ({"protocols": {"ssh": {"port": 22}}}, "protocols.ssh.port: unknown setting"),
        ({"listen": "8080"}, "listen: expected host:port"),
        ({"listen": "example.org:8080"}, "listen: "),
        ({"listen": "127.0.0.1:99999"}, "listen: the port is not between"),
        ({"node_address": "host"}, "node_address: expected host:port"),
        ({"tunnel": {"ipv4_pool": "10.0.0.0/8"}}, "tunnel.ipv4_pool: expected an IPv4 network of /16 to /28"),
        ({"tunnel": {"ipv4_pool": "10.66.0.1/16"}}, "tunnel.ipv4_pool: "),
        ({"tunnel": {"ipv6_pool": "fd66::/48"}}, "tunnel.ipv6_pool: expected an IPv6 network"),
        ({"tunnel": {"port": 0}}, "tunnel.port: "),
        ({"tunnel": {"dns": ["one.one.one.one"]}}, "tunnel.dns: "),
        ({"tunnel": {"dns": ["fe80::1%eth0"]}}, "tunnel.dns: "),
        ({"rate_limits": {"skynot": {}}}, "rate_limits: unknown contract skynot"),
        ({"plans": {"gold": {"max_connections": 1}}}, "plans: unknown plan gold"),
        ({"contracts": {"default_api": "soap"}}, "contracts.default_api: unknown contract soap"),
        ({"contracts": {"hosts": {"vpn.example.org": "soap"}}}, "contracts.hosts: unknown contract soap"),
        ({"trusted_proxies": ["everyone"]}, "trusted_proxies: "),
        ({"debug": True}, "debug: unknown setting"),
        ({"passwords": {"memory_kib": 0}}, "passwords.memory_kib: expected a number above 0"),
    ],
)
def test_a_wrong_setting_is_named(directory: Path, settings: dict[str, object], expected: str) -> None:
    assert expected in problems(directory, **settings)


def test_all_problems_are_told_at_once(directory: Path) -> None:
    (directory / "secret.key").chmod(0o644)
    (directory / "secret.key").write_text("changeme")
    (directory / "ca/ca.key").unlink()
    told = problems(
        directory,
        {"SKYNETVPN_LOGIN_HOURS": "-1"},
        listen="8080",
        colour="red",
        database_url=POSTGRESQL,
        tunnel={"ipv4_pool": "10.67.0.0/24"},
    )
    for expected in (
        "listen: ",
        "colour: unknown setting",
        "login_hours (from SKYNETVPN_LOGIN_HOURS): ",
        "secret.key can be read by others",
        "secret_key_file: line 1: ",
        "ca.key cannot be read: No such file",
        "database_url: holds a password",
        "protocols.openvpn.ipv4_pool: 10.67.0.0/16 overlaps 10.67.0.0/24 of tunnel.ipv4_pool",
    ):
        assert expected in told


def test_a_problem_is_told_once(directory: Path) -> None:
    wrong = {"database_url": "mysql://u@h/d", "secret_key_file": 7, "tunnel": {"ipv4_pool": "everywhere"}}
    told = problems(directory, None, **wrong).splitlines()
    assert [problem.partition(":")[0] for problem in told] == ["database_url", "secret_key_file", "tunnel.ipv4_pool"]


@pytest.mark.parametrize("name", ["secret.key", "ca/ca.key"])
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_key_that_others_can_read_is_refused(directory: Path, name: str, mode: int) -> None:
    (directory / name).chmod(mode)
    assert f"{directory / name} can be read by others; run chmod 600" in problems(directory)


@pytest.mark.parametrize("name", ["secret.key", "ca/ca.key"])
def test_a_missing_key_is_told(directory: Path, name: str) -> None:
    (directory / name).unlink()
    assert f"{directory / name} cannot be read: No such file" in problems(directory)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "changeme",
        "k1:changeme",
        "k1:" + "00" * 32,
        "k1:" + "ab" * 32,
        "k1:" + bytes(range(16)).hex(),
        ":" + bytes(range(32)).hex(),
        "k1:" + bytes(range(32)).hex() + "\nk2:secret",
    ],
)
def test_a_default_or_short_secret_is_refused_and_not_repeated(directory: Path, line: str) -> None:
    (directory / "secret.key").write_text(line)
    told = problems(directory)
    assert "secret_key_file: " in told
    assert "changeme" not in told


def test_the_first_key_seals_and_all_of_them_open(directory: Path) -> None:
    old = read_secrets(directory / "secret.key")
    sealed = old.seal(b"secret", table="t", column="c", row="r")
    text = (directory / "secret.key").read_text()
    (directory / "secret.key").write_text(f"k2:{os.urandom(32).hex()}\n{text}")
    new = read_secrets(directory / "secret.key")
    assert new.open(sealed, table="t", column="c", row="r") == b"secret"
    assert new.seal(b"x", table="t", column="c", row="r") != sealed


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"node_address": "vpn.example.org:443"}, "vpn.example.org:443"),
        ({"node_listen": "192.0.2.7:8443"}, "192.0.2.7:8443"),
        ({"node_listen": "[2001:db8::7]:8443"}, "[2001:db8::7]:8443"),
        ({"node_listen": "localhost:1"}, "localhost:1"),
    ],
)
def test_nodes_dial_what_was_set(directory: Path, settings: dict[str, object], expected: str) -> None:
    assert read(directory, **settings).dialled_address() == expected


def test_a_wildcard_is_nothing_to_dial(directory: Path) -> None:
    host, port = split_address(read(directory, node_listen="0.0.0.0:8443").dialled_address())
    assert port == 8443
    assert host != "0.0.0.0"


@pytest.mark.parametrize("text", ["[", "a: b: c", "- 1"])
def test_a_file_that_is_no_settings_is_told(directory: Path, text: str) -> None:
    path = directory / "controller.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"controller\.yaml"):
        read_config(path, {})
