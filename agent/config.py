"""Typed settings of the agent: a YAML file and the environment, every problem reported at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from agent.drivers.wireguard import Backend as Backend
from agent.errors import AgentError
from shared import settings
from shared.resource import Protocol

PREFIX = "SKYNETVPN_AGENT"


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def split_address(text: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port`, and nothing else: a URL would say how to connect, and there is one way only."""
    host, _, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare or "/" in host or (":" in bare and bare == host) or not (port.isascii() and port.isdigit()):
        raise ValueError(f"{text!r} is not host:port")
    if not 1 <= int(port) <= 65535:
        raise ValueError(f"port {port} is not between 1 and 65535")
    return bare, int(port)


def _address(text: str) -> str:
    split_address(text)
    return text


def _address_or_off(text: str) -> str:
    return _address(text) if text else text


def _positive(value: float) -> float:
    if value <= 0:
        raise ValueError("must be more than 0")
    return value


def _share(value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError("must be more than 0 and at most 1")
    return value


def _protocols(value: tuple[Protocol, ...]) -> tuple[Protocol, ...]:
    if not value or len(set(value)) != len(value):
        raise ValueError("must name one protocol at least, and each once")
    return value


def parse_protocols(text: str) -> tuple[Protocol, ...]:
    """The protocols of a list such as `wireguard,openvpn`; raise ValueError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = ", ".join(Protocol)
    for name in names:
        if name not in list(Protocol):
            raise ValueError(f"{name!r} is not one of {known}")
    return _protocols(tuple(Protocol(name) for name in names))


@dataclass(frozen=True, slots=True)
class Config:
    directory: Path  # keys, certificates and the stored desired state
    controller: str = field(metadata=settings.check(_address))  # host:port of the node channel
    protocols: tuple[Protocol, ...] = field(default=(Protocol.WIREGUARD,), metadata=settings.check(_protocols))
    backend: Backend = Backend.AUTO
    openvpn_units: Path | None = None  # where systemd starts OpenVPN for the agent; None: the agent starts it itself
    openvpn_dco: bool = False  # the kernel passes OpenVPN's UDP data; read docs/operations.md first
    metrics: str = field(default="127.0.0.1:9586", metadata=settings.check(_address_or_off))  # "" = off
    capacity_mbit: int = field(default=1000, metadata=settings.check(_positive))
    max_peers: int = field(default=1000, metadata=settings.check(_positive))
    recheck_seconds: float = field(default=30, metadata=settings.check(_positive))
    poll_seconds: float = field(default=5, metadata=settings.check(_positive))
    guard_share: float = field(default=0.5, metadata=settings.check(_share))
    guard_minimum: int = field(default=10, metadata=settings.check(_positive))
    log_level: LogLevel = LogLevel.INFO


def load(path: Path, environ: Mapping[str, str] = os.environ) -> Config:
    """Read the file `enroll` wrote; raise AgentError or SettingsError with everything that is wrong."""
    return settings.load(Config, _read(path), environ=environ, prefix=PREFIX, source=str(path))


def render(path: Path, *, directory: Path, controller: str, protocols: tuple[Protocol, ...] = ()) -> bytes:
    """The file for `enroll` to write at this path: what it knows, and every other setting that is there already.

    Raises AgentError where what is there cannot be kept.
    """
    known: dict[str, Any] = {"controller": controller, "directory": str(directory)}
    if protocols:
        known["protocols"] = [str(protocol) for protocol in protocols]
    kept = _read(path) if path.exists() else {}
    if not isinstance(kept, dict):
        raise AgentError(f"{path} has no settings in it: correct it, or remove it")
    return yaml.safe_dump(kept | known).encode()


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise AgentError(f"{path}: {error.strerror}; enrol this host first: skynetvpn-agent enroll") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise AgentError(f"{path} is not YAML: {error}") from error
