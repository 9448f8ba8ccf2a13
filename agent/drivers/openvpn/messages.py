"""What the management socket says: answers, notifications and the table of clients; pure.

management-notes.txt of OpenVPN 2.6. Notifications begin with `>` and may come between the lines of an answer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address

MAX_LINE_BYTES = 64 * 1024
MAX_VARIABLES = 1000
END = "END"
_CLIENT = ">CLIENT:"
_ENV = ">CLIENT:ENV,"
_EVENTS_WITH_VARIABLES = ("CONNECT", "REAUTH", "ESTABLISHED", "DISCONNECT", "CR_RESPONSE")


class MalformedMessage(ValueError):
    """Not what the management protocol allows."""


@dataclass(frozen=True, slots=True)
class ClientEvent:
    """`kind` is CONNECT, REAUTH, ESTABLISHED, DISCONNECT or CR_RESPONSE; `variables` may hold a password."""

    kind: str
    cid: int
    kid: int | None
    variables: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Notice:
    """Any other notification: STATE, FATAL, HOLD, INFO, …"""

    source: str
    text: str


@dataclass(frozen=True, slots=True)
class AnswerLine:
    text: str


Message = ClientEvent | Notice | AnswerLine


class Reader:
    """Bytes in, whole messages out. One that raised MalformedMessage is of no more use."""

    def __init__(self) -> None:
        self._rest = b""
        self._head: tuple[str, int, int | None] | None = None
        self._variables: dict[str, str] = {}

    def feed(self, data: bytes) -> Iterator[Message]:
        whole, newline, rest = data.rpartition(b"\n")
        if newline:
            # What a client typed need not be UTF-8, and must come out as it went in: it may be a password.
            text = (self._rest + whole).decode("utf-8", "surrogateescape")
            self._rest = rest
            for line in text.split("\n"):
                message = self._message(line.removesuffix("\r"))
                if message is not None:
                    yield message
        else:
            self._rest += rest
        if len(self._rest) > MAX_LINE_BYTES:
            raise MalformedMessage("a line does not end")

    def _message(self, line: str) -> Message | None:
        if line.startswith(_ENV):
            return self._variable(line[len(_ENV) :])
        if line.startswith(_CLIENT):
            return self._client(line[len(_CLIENT) :])
        if line.startswith(">"):
            source, _, text = line[1:].partition(":")
            return Notice(source, text)
        return AnswerLine(line)

    def _client(self, text: str) -> Message | None:
        kind, *rest = text.split(",")
        if kind not in _EVENTS_WITH_VARIABLES:
            return Notice("CLIENT", text)
        try:
            # More numbers may follow in newer versions.
            self._head = (kind, _number(rest[0]), _number(rest[1]) if len(rest) > 1 else None)
        except (ValueError, IndexError) as error:
            raise MalformedMessage(f"a {kind} without a client") from error
        self._variables = {}
        return None

    def _variable(self, text: str) -> ClientEvent | None:
        if self._head is None:
            raise MalformedMessage("variables of no client")
        if text == END:
            (kind, cid, kid), self._head = self._head, None
            return ClientEvent(kind, cid, kid, self._variables)
        name, _, value = text.partition("=")
        self._variables[name] = value
        if len(self._variables) > MAX_VARIABLES:
            raise MalformedMessage("the variables of a client do not end")
        return None


@dataclass(frozen=True, slots=True)
class Row:
    """A client in the answer to `status 3`. Without an address it has not been let in."""

    cid: int
    username: str
    remote: str
    address: str
    address6: str
    since: int
    rx: int
    tx: int


def table(lines: Iterable[str]) -> list[Row]:
    """The clients in an answer to `status 3`; the header says which column is which. Raise MalformedMessage."""
    columns: dict[str, int] = {}
    rows: list[Row] = []
    try:
        for line in lines:
            kind, *cells = line.split("\t")
            if kind == "HEADER" and cells[0] == "CLIENT_LIST":
                columns = {name: number for number, name in enumerate(cells[1:])}
            elif kind == "CLIENT_LIST":
                rows.append(_row({name: cells[number] for name, number in columns.items()}))
    except (KeyError, IndexError, ValueError) as error:
        raise MalformedMessage("not a table of clients") from error
    return rows


def offloaded(lines: Collection[str]) -> bool:
    """Whether the kernel passes the data, as an answer to `status 3` tells."""
    return "GLOBAL_STATS\tdco_enabled\t1" in lines


def _row(cells: Mapping[str, str]) -> Row:
    return Row(
        cid=_number(cells["Client ID"]),
        username=login_name(_defined(cells["Username"]), _defined(cells["Common Name"])),
        remote=remote(*_host_and_port(cells["Real Address"])),
        address=cells["Virtual Address"],
        address6=cells["Virtual IPv6 Address"],
        since=_number(cells["Connected Since (time_t)"]),
        rx=_number(cells["Bytes Received"]),
        tx=_number(cells["Bytes Sent"]),
    )


def login_name(username: str, common_name: str) -> str:
    """Who a client says that it is: the name that it typed, else the one in its certificate."""
    return username or common_name


def remote(host: str, port: str) -> str:
    """host:port, as it was before a server of both IP versions mapped it."""
    try:
        address = ip_address(host)
    except ValueError:
        return f"{host}:{port}"
    if isinstance(address, IPv6Address):
        return f"{address.ipv4_mapped}:{port}" if address.ipv4_mapped else f"[{address}]:{port}"
    return f"{address}:{port}"


def _host_and_port(text: str) -> tuple[str, str]:
    """The table shows an IPv6 client without its port."""
    host, _, port = text.rpartition(":")
    return (host, port) if "." in host else (text, "0")


def _defined(text: str) -> str:
    return "" if text == "UNDEF" else text


def _number(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise ValueError("not a number")
    return int(text)
