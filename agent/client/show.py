"""servers, status and config: what there is."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import msgspec

from agent import files
from agent.client import means, tunnel
from agent.client.account import open_api
from agent.client.api import Api, Connection, Server
from agent.client.connect import choose_server
from agent.client.errors import Failure, Misuse, NotLoggedIn, Unreachable
from agent.client.output import age, clean, json_text, moment, size, table
from agent.client.profile import LocalTunnel, Profile, load_or_make_key

_WATCH_SECONDS = 2.0
_CLEAR = "\x1b[H\x1b[J"
_BINARY = "png"


class Local(msgspec.Struct, frozen=True):
    """The tunnel as this end counts it; null where its program does not tell."""

    rx: int | None
    tx: int | None
    latest_handshake: str | None  # of other protocols than WireGuard: when it began

    @classmethod
    def of(cls, counted: tunnel.Counters | None) -> Self | None:
        return cls(counted.rx, counted.tx, moment(counted.latest_handshake)) if counted is not None else None


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A line of `status`: what the controller says, and what this machine knows when the tunnel is its own."""

    connection_id: str
    server_id: str
    server: str
    protocol: str
    status: str
    created_at: str | None
    addresses: tuple[str, ...]
    rx: int | None  # as the server counts: received from the client
    tx: int | None
    latest_handshake: str | None
    interface: str | None
    netns: str | None
    refusal: str | None  # what keeps it out now
    local: Local | None  # None: it is not there any more, or never was on this machine


async def servers(arguments: argparse.Namespace, profile: Profile) -> int:
    async with open_api(profile.require_session()) as api:
        found = await api.servers()
    if arguments.output == "json":
        print(json_text([{name: getattr(server, name) for name in _SERVER_FIELDS} for server in found]))
    elif found:
        rows = [[server.name, server.country, server.ip, server.status, server.id] for server in found]
        print(table(["NAME", "COUNTRY", "ADDRESS", "STATUS", "ID"], rows))
    else:
        print("there is no server for this account yet", file=sys.stderr)
    return 0


_SERVER_FIELDS = ("id", "name", "country", "ip", "status")


async def status(arguments: argparse.Namespace, profile: Profile) -> int:
    """Fails where the controller does not answer, but shows this machine's tunnels first; a watch goes on."""
    clear = arguments.watch and arguments.output == "text" and sys.stdout.isatty()
    while True:
        failure = await _print_status(arguments, profile, clear=clear)
        if failure is not None and not arguments.watch:
            raise failure
        if not arguments.watch:
            return 0
        if failure is not None:
            print(f"skynetvpn: {failure}", file=sys.stderr)
        await asyncio.sleep(_WATCH_SECONDS)


async def config(arguments: argparse.Namespace, profile: Profile) -> int:
    format = arguments.format or ("json" if arguments.output == "json" else "conf")
    if arguments.with_key and format != "conf":
        raise Misuse("--with-key goes with --format conf")
    if arguments.with_key and arguments.new:
        raise Misuse("--with-key is for a tunnel of this machine, --new for another device")
    if format == _BINARY and arguments.file is None and sys.stdout.isatty():
        raise Misuse("png is no text: name a file with --file")
    if arguments.file is not None:
        _check_writable(arguments.file)
    async with open_api(profile.require_session()) as api, AsyncExitStack() as undo:
        id = arguments.id
        if arguments.new:
            id = await _new_connection(api, arguments)
            undo.push_async_callback(_end_again, api, id)
        data = await api.config(id or await _only_connection(api, profile), format)
        if arguments.with_key:
            data = _with_key(data.decode(), profile, arguments.id).encode()
        _write(data if format == _BINARY else data.rstrip(b"\n") + b"\n", arguments.file)
        undo.pop_all()
    return 0


async def _print_status(arguments: argparse.Namespace, profile: Profile, *, clear: bool) -> Failure | None:
    local = {item.connection_id: item for item in profile.tunnels()}
    counters = {id: await means.of(item).counters(item) for id, item in local.items()}
    failure = None
    try:
        async with open_api(profile.require_session()) as api:
            connections, known = await asyncio.gather(api.connections(), api.servers())
        rows = status_rows(connections, {server.id: server for server in known}, local, counters)
    except (Unreachable, NotLoggedIn) as error:
        failure = error
        rows = [_local_row(item, "unknown", counters[id]) for id, item in local.items()]
    if arguments.output == "json":
        print(json_text(rows), flush=True)
    elif rows:
        refusals = sorted({row.refusal for row in rows if row.refusal is not None})
        text = "\n".join([_status_table(rows, datetime.now(UTC)), *map(clean, refusals)])
        print(_CLEAR + text if clear else text, flush=True)
    elif failure is None:
        print("no live connection: skynetvpn connect makes one", flush=True)
    return failure


def status_rows(
    connections: Sequence[Connection],
    servers: Mapping[str, Server],
    local: Mapping[str, LocalTunnel],
    counters: Mapping[str, tunnel.Counters | None],
) -> list[Row]:
    """Join what the controller lists with this machine's tunnels; one that the controller ended is `disconnected`."""
    rows = []
    for connection in connections:
        item = local.get(connection.connection_id)
        server = servers.get(connection.server_id)
        rows.append(
            Row(
                connection_id=connection.connection_id,
                server_id=connection.server_id,
                server=server.name if server else connection.server_id,
                protocol=connection.protocol,
                status=connection.status,
                created_at=connection.created_at,
                addresses=connection.addresses or (item.addresses if item else ()),
                rx=connection.rx,
                tx=connection.tx,
                latest_handshake=connection.latest_handshake,
                interface=item.interface if item else None,
                netns=item.netns if item else None,
                refusal=connection.refusal,
                local=Local.of(counters.get(connection.connection_id)),
            )
        )
    listed = {connection.connection_id for connection in connections}
    rows += [_local_row(item, "disconnected", counters[id]) for id, item in local.items() if id not in listed]
    return rows


def _local_row(item: LocalTunnel, status: str, counters: tunnel.Counters | None) -> Row:
    return Row(
        connection_id=item.connection_id,
        server_id=item.server_id,
        server=item.server,
        protocol=item.protocol,
        status=status,
        created_at=None,
        addresses=item.addresses,
        rx=None,
        tx=None,
        latest_handshake=None,
        interface=item.interface,
        netns=item.netns,
        refusal=None,
        local=Local.of(counters),
    )


def _status_table(rows: Sequence[Row], now: datetime) -> str:
    return table(
        ["SERVER", "PROTOCOL", "STATUS", "ADDRESSES", "SENT", "RECEIVED", "HANDSHAKE", "INTERFACE", "CONNECTION"],
        [
            [
                row.server,
                row.protocol,
                row.status,
                ", ".join(row.addresses) or "-",
                "-" if row.rx is None else size(row.rx),
                "-" if row.tx is None else size(row.tx),
                "-" if row.rx is None else age(row.latest_handshake, now),
                _place(row),
                row.connection_id,
            ]
            for row in rows
        ],
    )


def _place(row: Row) -> str:
    if row.interface is None:
        return "-"
    place = f"{row.interface}@{row.netns}" if row.netns else row.interface
    return place if row.local is not None else f"{place} (gone)"


async def _new_connection(api: Api, arguments: argparse.Namespace) -> str:
    connection = await api.connect((await choose_server(api, arguments.id)).id, arguments.protocol)
    id = connection.connection_id
    print(f"opened connection {id}; skynetvpn disconnect {id} ends it", file=sys.stderr)
    return id


async def _end_again(api: Api, id: str) -> None:
    try:
        await api.disconnect(id)
    except Failure as error:  # what went wrong before is what ends the command
        print(f"connection {id} could not be ended again: {error}", file=sys.stderr)
    else:
        print(f"ended connection {id} again", file=sys.stderr)


def _check_writable(path: Path) -> None:
    """Raise Failure, before a connection is opened for what then cannot be kept."""
    if path.is_dir():
        raise Failure(f"{path} is a directory: name a file in it")
    if _is_device(path):
        return
    folder = path.resolve().parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise Failure(f"{path} cannot be written: {folder}: {error.strerror}") from error


def _write(data: bytes, path: Path | None) -> None:
    if path is None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    elif _is_device(path):
        try:
            path.write_bytes(data)
        except OSError as error:
            raise Failure(f"{path}: {error.strerror}") from error
    else:
        files.write_private(path.resolve(), data)  # a link stays one


def _is_device(path: Path) -> bool:
    """Whether it is a device or a pipe, which is written to and never replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


async def _only_connection(api: Api, profile: Profile) -> str:
    ids = [item.connection_id for item in profile.tunnels()]
    ids = ids or [connection.connection_id for connection in await api.connections()]
    if len(ids) == 1:
        return ids[0]
    raise Misuse("name the connection's ID: skynetvpn status lists them") if ids else Failure("there is no connection")


def _with_key(conf: str, profile: Profile, connection_id: str | None) -> str:
    """Put the private key of this machine's tunnel where the server's text has only a comment."""
    tunnels = [item for item in profile.tunnels() if item.protocol == "wireguard"]
    found = [item for item in tunnels if connection_id in (None, item.connection_id)]
    if not found:
        raise Failure("the connection is no tunnel of this machine, so its private key is not here")
    key = load_or_make_key(Path(found[0].key_file))
    lines = []
    for line in conf.splitlines():
        if "PrivateKey" not in line:
            lines.append(line)
        if line.strip() == "[Interface]":
            lines.append(f"PrivateKey = {key.reveal()}")
    return "\n".join(lines) + "\n"
