"""What every client's configuration has in common, whatever its protocol; pure."""

from __future__ import annotations

import unicodedata
from typing import ClassVar, Protocol

from controller.fleet.nodes import is_host
from shared.access import USERNAME, check_chap_secret

_MAX_LABEL = 100


class InvalidClientConfig(ValueError):
    """A value that a client could misread; the text names no secret."""


class ClientConfig(Protocol):
    """A value whose every field has one meaning in what is written of it."""

    file_name: ClassVar[str]
    media: ClassVar[str]  # of the file

    def to_conf(self) -> str:
        """The file that the protocol's own clients read."""
        ...

    def to_json(self) -> dict[str, object]: ...


def check_endpoint(host: str, port: int) -> None:
    if not is_host(host):
        raise InvalidClientConfig(f"{host!r} is neither an address nor a host name")
    if not 1 <= port <= 65535:
        raise InvalidClientConfig(f"port {port} is not between 1 and 65535")


def check_username(username: str) -> None:
    if not USERNAME.fullmatch(username):
        raise InvalidClientConfig(f"{username!r} is no user name")


def check_typed(name: str, secret: str) -> None:
    """A secret that stands in a line of a file."""
    if not check_chap_secret(secret):
        raise InvalidClientConfig(f"the {name} is not one line of printable ASCII")


def join_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def comment(text: str) -> str:
    """Free text that stays on its line: no control, format, surrogate or separator character survives."""
    printable = (character if unicodedata.category(character)[0] not in "CZ" else " " for character in text)
    return " ".join("".join(printable).split())[:_MAX_LABEL]
