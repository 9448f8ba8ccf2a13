"""The controller's settings: D/controller.yaml and SKYNETVPN_* in the environment."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from importlib.util import find_spec
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import yaml
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from controller.accounts.principal import Plan
from controller.secretbox import SecretBox
from shared.addresses import check_name_server
from shared.settings import SettingsError, check, load

ENVIRONMENT_PREFIX = "SKYNETVPN"
CONTRACTS = ("skynet", "skypanel", "prime", "cloudvps", "irssh")
_SECRET_BYTES = 32
T = TypeVar("T")
_DRIVERS = {"sqlite+aiosqlite": "aiosqlite", "postgresql+asyncpg": "asyncpg"}  # scheme of a URL -> its package


def _listen(value: str) -> str:
    host, port = split_address(value)
    if host != "localhost":
        ip_address(host)
    if not 0 <= port <= 65535:
        raise ValueError("the port is not between 0 and 65535")
    return value


def _dial(value: str) -> str:
    host, port = split_address(value)
    if not host or not 1 <= port <= 65535:
        raise ValueError("expected host:port")
    return value


def _database(value: str) -> str:
    """The URL may hold a password: no problem repeats any of it but the scheme."""
    scheme = value.partition(":")[0]
    if scheme not in _DRIVERS:
        raise ValueError(f"expected a URL that begins with {' or '.join(f'{known}://' for known in _DRIVERS)}")
    try:
        url = make_url(value)
    except (ArgumentError, ValueError):
        raise ValueError(f"is no URL; expected {scheme}://…, with %XX for special characters in it") from None
    if not url.database:
        raise ValueError("names no database")
    if find_spec(_DRIVERS[scheme]) is None:
        raise ValueError(
            f"{_DRIVERS[scheme]} is not installed; run pip install {_DRIVERS[scheme]} in the controller's environment"
        )
    return value


def _pool4(value: str) -> str:
    network = ip_network(value)
    if not isinstance(network, IPv4Network) or not 16 <= network.prefixlen <= 28:
        raise ValueError("expected an IPv4 network of /16 to /28")
    return value


def _pool6(value: str) -> str:
    network = ip_network(value)
    if not isinstance(network, IPv6Network) or not 64 <= network.prefixlen <= 112:
        raise ValueError("expected an IPv6 network of /64 to /112")
    return value


def _port(value: int) -> int:
    if not 1 <= value <= 65535:
        raise ValueError("expected a port between 1 and 65535")
    return value


def _positive(value: int) -> int:
    if value <= 0:
        raise ValueError("expected a number above 0")
    return value


def _name_servers(value: tuple[str, ...]) -> tuple[str, ...]:
    for item in value:
        check_name_server(item)
    return value


def _networks(value: tuple[str, ...]) -> tuple[str, ...]:
    for item in value:
        ip_network(item)
    return value


def _known_contracts(value: Mapping[str, Any]) -> Mapping[str, Any]:
    unknown = sorted(set(value) - set(CONTRACTS))
    if unknown:
        raise ValueError(f"unknown contract {', '.join(unknown)}; expected one of {', '.join(CONTRACTS)}")
    return value


def _known_plans(value: Mapping[str, Any]) -> Mapping[str, Any]:
    unknown = sorted(set(value) - set(Plan))
    if unknown:
        raise ValueError(f"unknown plan {', '.join(unknown)}; expected one of {', '.join(Plan)}")
    return value


def _contract_values(value: Mapping[str, str]) -> Mapping[str, str]:
    _known_contracts(dict.fromkeys(value.values()))
    return value


def _one_contract(value: str) -> str:
    _known_contracts({value: None})
    return value


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Passwords:
    """Argon2id (RFC 9106); the defaults are the least that is still considered safe."""

    memory_kib: int = field(default=19_456, metadata=check(_positive))
    time_cost: int = field(default=2, metadata=check(_positive))
    parallelism: int = field(default=1, metadata=check(_positive))
    workers: int = field(default=2, metadata=check(_positive))
    queue: int = field(default=64, metadata=check(_positive))  # logins that may wait; more answer 503


@dataclass(frozen=True, slots=True)
class Tunnel:
    """What every node's WireGuard interface and every client config gets."""

    ipv4_pool: str = field(default="10.66.0.0/16", metadata=check(_pool4))
    ipv6_pool: str = field(default="fd66:6b79::/112", metadata=check(_pool6))
    port: int = field(default=51820, metadata=check(_port))
    mtu: int = field(default=1420, metadata=check(_positive))
    dns: tuple[str, ...] = field(default=("1.1.1.1", "2606:4700:4700::1111"), metadata=check(_name_servers))
    cool_down_seconds: int = field(default=600, metadata=check(_positive))
    max_bytes_per_second: int = field(default=12_500_000_000, metadata=check(_positive))  # more is a broken counter


@dataclass(frozen=True, slots=True)
class OpenVpnPools:
    ipv4_pool: str = field(default="10.67.0.0/16", metadata=check(_pool4))
    ipv6_pool: str = field(default="fd66:6b7a::/112", metadata=check(_pool6))


@dataclass(frozen=True, slots=True)
class SshPools:
    ipv4_pool: str = field(default="10.68.0.0/16", metadata=check(_pool4))


@dataclass(frozen=True, slots=True)
class L2tpPools:
    ipv4_pool: str = field(default="10.69.0.0/16", metadata=check(_pool4))


@dataclass(frozen=True, slots=True)
class Protocols:
    """Clients' networks beside WireGuard's, the same on every node; all else is set in the running controller."""

    openvpn: OpenVpnPools = OpenVpnPools()
    ssh: SshPools = SshPools()
    l2tp: L2tpPools = L2tpPools()


@dataclass(frozen=True, slots=True)
class RateLimit:
    """Requests per client address (IPv6: per /64) in a sliding window; 0 requests = no limit."""

    requests: int = 0
    window_seconds: int = field(default=900, metadata=check(_positive))
    auth_requests: int = 10
    auth_window_seconds: int = field(default=60, metadata=check(_positive))


@dataclass(frozen=True, slots=True)
class Contracts:
    hosts: dict[str, str] = field(default_factory=dict, metadata=check(_contract_values))  # host name -> contract
    default_api: str = field(default="skynet", metadata=check(_one_contract))
    default_v1: str = field(default="prime", metadata=check(_one_contract))
    cors_origins: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Retention:
    """Days that history is kept."""

    sessions_days: int = field(default=90, metadata=check(_positive))  # since their end; connections, too
    usage_days: int = field(default=400, metadata=check(_positive))
    events_days: int = field(default=30, metadata=check(_positive))


@dataclass(frozen=True, slots=True)
class PlanLimits:
    max_connections: int = field(metadata=check(_positive))


@dataclass(frozen=True, slots=True)
class Config:
    database_url: str = field(repr=False, metadata=check(_database))
    ca_directory: Path
    secret_key_file: Path
    listen: str = field(default="127.0.0.1:8080", metadata=check(_listen))
    node_listen: str = field(default="0.0.0.0:8443", metadata=check(_listen))  # mutual TLS guards it
    node_address: str | None = field(default=None, metadata=check(_dial))  # that nodes dial; goes into join tokens
    log_level: LogLevel = LogLevel.INFO
    login_hours: int = field(default=24, metadata=check(_positive))
    certificate_days: int = field(default=30, metadata=check(_positive))
    trusted_proxies: tuple[str, ...] = field(default=(), metadata=check(_networks))
    metrics_from: tuple[str, ...] = field(default=("127.0.0.0/8", "::1/128"), metadata=check(_networks))
    passwords: Passwords = Passwords()
    tunnel: Tunnel = Tunnel()
    protocols: Protocols = Protocols()
    contracts: Contracts = Contracts()
    retention: Retention = Retention()
    rate_limits: dict[str, RateLimit] = field(default_factory=dict, metadata=check(_known_contracts))
    plans: dict[str, PlanLimits] = field(default_factory=dict, metadata=check(_known_plans))

    def max_connections(self, plan: Plan) -> int:
        return self.plans[plan].max_connections if plan in self.plans else _MAX_CONNECTIONS[plan]

    def dialled_address(self) -> str:
        """host:port of the node channel as nodes reach it."""
        if self.node_address is not None:
            return self.node_address
        host, port = split_address(self.node_listen)
        if host != "localhost" and ip_address(host).is_unspecified:
            host = _own_address()
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


_MAX_CONNECTIONS = {Plan.FREE: 2, Plan.PRO: 10, Plan.ENTERPRISE: 100}


def read_config(path: Path, environ: Mapping[str, str]) -> Config:
    """Read the file and the environment; raise SettingsError that lists all that is wrong with either."""
    try:
        mapping = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise SettingsError(str(path), [f"{error.strerror}; name the controller's settings with --config"]) from error
    except OSError as error:
        raise SettingsError(str(path), [f"cannot be read: {error.strerror}"]) from error
    except yaml.YAMLError as error:
        raise SettingsError(str(path), [f"is not YAML: {error}"]) from error
    base = path.resolve().parent
    config, problems = None, []
    try:
        config = load(Config, mapping, environ=environ, prefix=ENVIRONMENT_PREFIX, source=str(path))
    except SettingsError as error:
        problems = error.problems
    if isinstance(mapping, Mapping):  # what else there is to say of settings that can be read, whatever the others are
        if (keys := _read_part(_Keys, mapping, environ)) is not None:
            problems += _dangers(base / keys.secret_key_file, base / keys.ca_directory / "ca.key")
        problems += _exposed(path, mapping, environ)
        if (networks := _read_part(_Networks, mapping, environ)) is not None:
            problems += _overlaps(networks)
    if config is None or problems:
        raise SettingsError(str(path), problems)
    return replace(
        config,
        ca_directory=base / config.ca_directory,
        secret_key_file=base / config.secret_key_file,
        database_url=_absolute_sqlite(config.database_url, base),
    )


def read_secrets(path: Path) -> SecretBox:
    """Read the keys that seal secrets in the database; the first line's key seals, all of them open."""
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    keys: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        key_id, _, text = line.partition(":")
        try:
            key = bytes.fromhex(text)
        except ValueError:
            key = b""
        if not key_id or len(key) != _SECRET_BYTES or len(set(key)) < _SECRET_BYTES // 2:
            raise SettingsError(str(path), [f"line {number}: expected `id:` and {_SECRET_BYTES} random bytes in hex"])
        keys[key_id] = key
    if not keys:
        raise SettingsError(str(path), ["holds no key; make a new directory with `skynetvpn-controller init`"])
    return SecretBox(keys, next(iter(keys)))


def new_secret_line() -> str:
    return f"k1:{os.urandom(_SECRET_BYTES).hex()}\n"


def split_address(text: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` in two; raise ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit():
        raise ValueError("expected host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


@dataclass(frozen=True, slots=True)
class _Keys:
    ca_directory: Path
    secret_key_file: Path


@dataclass(frozen=True, slots=True)
class _Networks:
    tunnel: Tunnel = Tunnel()
    protocols: Protocols = Protocols()


def _read_part(cls: type[T], mapping: Mapping[str, Any], environ: Mapping[str, str]) -> T | None:
    """Some of the settings; None where one of them cannot be read."""
    part = {name: mapping[name] for name in cls.__annotations__ if name in mapping}
    try:
        return load(cls, part, environ=environ, prefix=ENVIRONMENT_PREFIX)
    except SettingsError:
        return None


def _dangers(secret_key_file: Path, ca_key: Path) -> list[str]:
    problems = []
    for name, path in (("secret_key_file", secret_key_file), ("ca_directory", ca_key)):
        try:
            mode = path.stat().st_mode
        except OSError as error:
            problems.append(f"{name}: {path} cannot be read: {error.strerror}")
            continue
        if stat.S_IMODE(mode) & 0o077:
            problems.append(f"{name}: {path} can be read by others; run chmod 600 {path}")
    try:
        if secret_key_file.is_file():
            read_secrets(secret_key_file)
    except SettingsError as error:
        problems += [f"secret_key_file: {problem}" for problem in error.problems]
    except OSError as error:
        problems.append(f"secret_key_file: {secret_key_file} cannot be read: {error.strerror}")
    return problems


def _exposed(path: Path, mapping: Mapping[str, Any], environ: Mapping[str, str]) -> list[str]:
    """The settings are no secret, but for a database's password."""
    url = mapping.get("database_url")
    if f"{ENVIRONMENT_PREFIX}_DATABASE_URL" in environ or not isinstance(url, str) or not path.stat().st_mode & 0o077:
        return []
    try:
        if make_url(url).password is None:
            return []
    except (ArgumentError, ValueError):
        return []
    return [f"database_url: holds a password, and {path} can be read by others; run chmod 600 {path}"]


def _overlaps(networks: _Networks) -> list[str]:
    """One packet filter and one routing table of a node serve all its protocols."""
    tunnel, protocols = networks.tunnel, networks.protocols
    pools = {
        "tunnel.ipv4_pool": tunnel.ipv4_pool,
        "tunnel.ipv6_pool": tunnel.ipv6_pool,
        "protocols.openvpn.ipv4_pool": protocols.openvpn.ipv4_pool,
        "protocols.openvpn.ipv6_pool": protocols.openvpn.ipv6_pool,
        "protocols.ssh.ipv4_pool": protocols.ssh.ipv4_pool,
        "protocols.l2tp.ipv4_pool": protocols.l2tp.ipv4_pool,
    }
    return [
        f"{name}: {pools[name]} overlaps {pools[other]} of {other}; give one of them another network"
        for other, name in combinations(pools, 2)
        if _overlap(pools[other], pools[name])
    ]


def _overlap(one: str, other: str) -> bool:
    first, second = ip_network(one), ip_network(other)
    return first.version == second.version and first.overlaps(second)


def _absolute_sqlite(url: str, base: Path) -> str:
    scheme, separator, path = url.partition(":///")
    if not scheme.startswith("sqlite") or not separator or path.startswith("/"):
        return url
    return f"{scheme}:///{base / path}"


def _own_address() -> str:
    """The address that this machine would use towards the internet; asks the routing table, sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
