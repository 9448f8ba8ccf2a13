"""connect and disconnect: a connection on the controller and its tunnel on this machine, both or neither."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from agent.client import ending, means, namespace, selection, tunnel
from agent.client.account import open_api
from agent.client.api import Api, Connection, Server
from agent.client.errors import Failure, Misuse, NotLoggedIn, Refused, Unreachable
from agent.client.output import Progress, fields, json_text
from agent.client.profile import LocalTunnel, Profile, load_or_make_key
from agent.drivers.base import DriverError
from shared.desired import INTERFACE_NAME
from shared.resource import Protocol

_DETAILS_AT_ONCE = 8
_POLL_SECONDS = 0.1
_CONNECTED = "connected"


class Summary(msgspec.Struct, frozen=True):
    connection_id: str
    server_id: str
    server: str
    protocol: str
    status: str
    interface: str
    netns: str | None
    backend: str
    addresses: tuple[str, ...]
    endpoint: str
    resolver: str | None  # what sends names through the tunnel; null: they are resolved as before
    latency_ms: float | None  # round trip to the server by ICMP; null where it does not answer


async def connect(arguments: argparse.Namespace, profile: Profile) -> int:
    session = profile.require_session()
    if arguments.tun and arguments.protocol != Protocol.SSH:
        raise Misuse("--tun goes with --protocol ssh: the others have an interface in any case")
    if not _wants_proxy(arguments) or arguments.netns is not None:
        tunnel.require_privilege()
    if arguments.netns is not None and not namespace.exists(arguments.netns):
        raise Misuse(f"there is no network namespace {arguments.netns!r}: ip netns add {arguments.netns}")
    progress = Progress()
    try:
        async with open_api(session) as api, AsyncExitStack() as turn:
            progress.show(f"asking {session.url} for the servers")
            server = await choose_server(api, arguments.server or arguments.server_option)
            routes = not arguments.no_routes and not _wants_proxy(arguments)
            await tunnel.check_way(server.ip, arguments.netns, routes=routes)
            await turn.enter_async_context(
                profile.alone(lambda: progress.show("waiting: another skynetvpn connect brings a tunnel up"))
            )
            await _clear_leftovers(api, profile, server, arguments.protocol)
            summary = await _connect(arguments, profile, api, server, progress, turn)
    finally:
        progress.done()
    if summary.status != _CONNECTED:
        print(
            f"skynetvpn: the tunnel is up, but not {_CONNECTED} on the controller yet: skynetvpn status follows it",
            file=sys.stderr,
        )
    print(json_text(summary) if arguments.output == "json" else _text(summary))
    return 0


async def disconnect(arguments: argparse.Namespace, profile: Profile) -> int:
    """Takes the tunnel down first, also when the controller cannot be told: that is what the person sees."""
    found = selection.tunnels_by_name(profile.tunnels(), arguments.id)
    if not found and arguments.id is None:
        print("no tunnel of this machine is up; skynetvpn status lists all connections", file=sys.stderr)
    ended = [item.connection_id for item in found] or ([arguments.id] if arguments.id else [])
    await ending.take_down(found)
    try:
        if ended:
            async with open_api(profile.require_session()) as api:
                await (ending.end(api, profile, found) if found else api.disconnect(arguments.id))
    except NotLoggedIn as error:
        if not found:
            raise
        ending.forget(profile, found)
        words = f"if the account is still there, log in and skynetvpn disconnect {' '.join(ended)}"
        raise NotLoggedIn(
            f"down here, and nothing is left of it; not ended on the controller ({error}): {words}"
        ) from error
    except Unreachable as error:
        if not found:
            raise
        words = f"the tunnel is down here, but its connection still counts: {error}; then skynetvpn disconnect again"
        raise Unreachable(words) from error
    if arguments.output == "json":
        print(json_text({"disconnected": ended}))
    else:
        for id in ended:
            print(f"disconnected {next((item.server for item in found if item.connection_id == id), id)}")
    return 0


async def choose_server(api: Api, wanted: str | None) -> Server:
    """The server of this name or id, or the one with the least load."""
    servers = await api.servers()
    if wanted is not None:
        return selection.server_by_name(servers, wanted)
    limit = asyncio.Semaphore(_DETAILS_AT_ONCE)

    async def details(server: Server) -> Server:
        async with limit:
            return await api.server(server.id)

    online = [server for server in servers if server.status == selection.ONLINE]
    best = selection.least_loaded(await asyncio.gather(*map(details, online)))
    if best is None:
        raise Failure("no server is online for this account: try again later, skynetvpn servers shows their state")
    return best


async def _clear_leftovers(api: Api, profile: Profile, server: Server, protocol: str) -> None:
    """Refuse a second tunnel to the same server; end what a crash or a reboot left of an earlier one."""
    for item in profile.tunnels():
        if (item.server_id, item.protocol) != (server.id, protocol):
            continue
        if await means.of(item).counters(item) is not None:
            raise Failure(
                f"connected to {server.name} already by {item.interface}: "
                f"skynetvpn disconnect {item.interface} ends it, skynetvpn status shows it"
            )
        await _abandon(api, profile, item)


async def _connect(
    arguments: argparse.Namespace,
    profile: Profile,
    api: Api,
    server: Server,
    progress: Progress,
    turn: AsyncExitStack,
) -> Summary:
    """Closes `turn` as soon as the tunnel can be seen by others: the wait for the handshake may be long."""
    protocol: str = arguments.protocol
    public_key = None
    if protocol == Protocol.WIREGUARD:
        key_file: Path = (arguments.key_file or profile.key_file(server.id)).absolute()
        public_key = str(load_or_make_key(key_file).public())
    interface = arguments.proxy if _wants_proxy(arguments) else await _interface(arguments, profile)
    progress.show(f"opening a connection to {server.name}")
    started = time.monotonic()
    connection = await api.connect(server.id, protocol, public_key)
    if public_key is None:
        key_file = profile.program_file(connection.connection_id).absolute()
    local = LocalTunnel(
        connection_id=connection.connection_id,
        server_id=server.id,
        server=server.name,
        interface=interface,
        backend=arguments.backend if public_key is not None else protocol,
        key_file=str(key_file),
        netns=arguments.netns,
        protocol=protocol,
    )
    by = means.of(local)

    def save(noted: LocalTunnel) -> None:
        nonlocal local
        local = noted
        profile.save_tunnel(noted)

    try:
        save(local)
        progress.show(f"bringing up {interface}")
        local = await by.up(local, api, routes=not arguments.no_routes, save=save)
        await turn.aclose()
        connection = await _wait(api, local, connection, progress, started + arguments.timeout)
        latency = await by.latency(local)
    except BaseException as error:
        try:
            # Asked before the connection ends: the server says only that it lets nobody in.
            refusal = await _refusal(api, local) if isinstance(error, Failure | DriverError) else None
        finally:
            progress.show(f"taking {local.interface} down again")
            await _abandon(api, profile, local)
        if refusal is not None:
            raise Failure(f"{refusal} ({error})") from error
        raise
    return Summary(
        connection_id=local.connection_id,
        server_id=server.id,
        server=server.name,
        protocol=protocol,
        status=connection.status,
        interface=local.interface,
        netns=local.netns,
        backend=local.backend,
        addresses=local.addresses,
        endpoint=local.endpoint,
        resolver=local.resolver,
        latency_ms=latency,
    )


def _wants_proxy(arguments: argparse.Namespace) -> bool:
    return arguments.protocol == Protocol.SSH and not arguments.tun


async def _interface(arguments: argparse.Namespace, profile: Profile) -> str:
    if arguments.interface is None:
        taken = [item.interface for item in profile.tunnels()]
        return await tunnel.free_interface(arguments.netns, taken)
    interface: str = arguments.interface
    if not INTERFACE_NAME.fullmatch(interface):
        raise Misuse(f"{interface!r} is no interface name: 1 to 15 of A-Z a-z 0-9 _ -")
    await tunnel.check_free(interface, arguments.netns)
    return interface


async def _wait(
    api: Api, local: LocalTunnel, connection: Connection, progress: Progress, deadline: float
) -> Connection:
    """Until the handshake is done here and reported there; without the report in time the tunnel still counts."""
    handshake = False
    while True:
        counters = await means.of(local).counters(local)
        if counters is None:
            raise Failure(f"the tunnel to {local.server} has ended again")
        handshake = handshake or counters.latest_handshake > 0
        if handshake:
            progress.show(f"{local.server} answers; waiting for its report to the controller")
            try:
                connection = await api.connection(local.connection_id)
            except Unreachable:
                progress.show(f"{local.server} answers; the controller does not, through the tunnel")
            if connection.status == _CONNECTED:
                return connection
        else:
            progress.show(f"waiting for the handshake with {local.endpoint}")
        if time.monotonic() > deadline:
            if handshake:
                return connection
            raise Failure(
                f"{local.server} did not answer at {local.endpoint} in time: does a firewall on the way block UDP? "
                "The tunnel was taken down again"
            )
        await asyncio.sleep(_POLL_SECONDS)


async def _refusal(api: Api, local: LocalTunnel) -> str | None:
    """Why the account may not come in, by the controller."""
    try:
        connections = await api.connections()
    except Failure:
        return None
    return next((one.refusal for one in connections if one.connection_id == local.connection_id), None)


async def _abandon(api: Api, profile: Profile, local: LocalTunnel) -> None:
    """Undo both halves as far as possible; what could not be told to the controller stays noted for `disconnect`."""
    try:
        await means.of(local).down(local)
    except DriverError as error:
        print(f"skynetvpn: {local.interface} could not be taken down: {error}", file=sys.stderr)
        return
    try:
        await api.disconnect(local.connection_id)
    except Refused as error:
        if error.status != 404:
            return
    except (Unreachable, NotLoggedIn):
        return
    profile.forget_tunnel(local.connection_id)


def _text(summary: Summary) -> str:
    pairs = [
        ("server", f"{summary.server} ({summary.endpoint})"),
        ("status", summary.status),
        ("addresses", ", ".join(summary.addresses) or "those of this machine"),
        _way(summary),
        ("names", "resolved as before" if summary.resolver is None else f"through the tunnel, by {summary.resolver}"),
        ("latency", "no answer to ping" if summary.latency_ms is None else f"{summary.latency_ms:.1f} ms"),
        ("connection", summary.connection_id),
    ]
    return fields(pairs)


def _way(summary: Summary) -> tuple[str, str]:
    place = f"{summary.interface} in namespace {summary.netns}" if summary.netns else summary.interface
    match summary.protocol:
        case Protocol.SSH if not summary.addresses:
            return "proxy", f"socks5://{place}"
        case Protocol.WIREGUARD:
            return "interface", f"{place}, {summary.backend} WireGuard"
        case _:
            return "interface", f"{place}, {summary.protocol}"
