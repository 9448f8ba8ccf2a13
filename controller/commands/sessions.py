"""session: who is on, and out with them."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from controller.commands.command import Commands, add, add_group, services
from controller.commands.output import add_output, amount, moment, say, table, tell

if TYPE_CHECKING:
    from controller.services import Services
    from controller.usage.sessions import Session

Record = Mapping[str, Any]

_LIST = """\
The live sessions of all protocols, oldest first. They are what the running controller has stored: a session that began
or ended is there a second or two later, its bytes are some seconds old; where no controller runs, all is as it was at
its end. RX is what came from the client. Sessions of WireGuard are inferred from handshakes."""

_KICK = """\
Ends all live sessions of the account. The running controller tells the nodes within a quarter of a second, and a node
that is away when it is back. Clients of OpenVPN, SSH and L2TP may come back (user set NAME --active no keeps them out);
a WireGuard connection has ended for good."""


def register(commands: Commands) -> None:
    session = add_group(commands, "session", "who is connected")
    shown = add(session, "list", _list, "list the live sessions of all protocols", _LIST)
    shown.add_argument("--user", metavar="NAME", help="only of this account")
    shown.add_argument("--node", metavar="NAME", help="only on this node")
    add_output(shown)
    kick = add(session, "kick", _kick, "end all sessions of an account", _KICK)
    kick.add_argument("name", metavar="NAME")
    add(session, "end", _end, "end one session, as kick does").add_argument("id", metavar="ID")


async def _list(arguments: argparse.Namespace) -> None:
    async with services(arguments) as opened:
        user_id = (await opened.members.named(arguments.user)).user.id if arguments.user is not None else None
        node_id = (await opened.fleet.node(arguments.node))[0].id if arguments.node is not None else None
        found = await records(opened, user_id, node_id)
    tell(arguments, found, lambda: lines(found))


async def _kick(arguments: argparse.Namespace) -> None:
    from controller.services import stored_sessions

    async with services(arguments) as opened:
        member = await opened.members.named(arguments.name)
        count = await (await stored_sessions(opened.database)).kick(user_id=member.user.id)
    say(f"{member.user.username}: {count} session{'' if count == 1 else 's'} to end")


async def _end(arguments: argparse.Namespace) -> None:
    from controller.services import stored_sessions

    async with services(arguments) as opened:
        sessions = await stored_sessions(opened.database)
        await sessions.kick(session=sessions.find(arguments.id))
    say(f"{arguments.id} is to end")


async def records(opened: Services, user_id: str | None = None, node_id: str | None = None) -> list[Record]:
    """The live sessions as they are stored, with the names of accounts and nodes."""
    from controller.services import stored_sessions

    live = (await stored_sessions(opened.database)).live(user_id, node_id)
    users = {user.id: user.username for user in await opened.administration.list_users()}
    nodes = {node.id: node.name for node in await opened.fleet.nodes()}
    connections = [session.connection_id for session in live if session.connection_id and not session.address]
    async with opened.database.read() as reading:
        addresses = await opened.peers.addresses_of(reading, connections)
    return [_record(session, users, nodes, addresses) for session in live]


def lines(found: Sequence[Record]) -> str:
    header = ["USER", "PROTOCOL", "NODE", "ADDRESS", "FROM", "SINCE", "RX", "TX", "ID"]
    return table(header, [_line(record) for record in found])


def _record(
    session: Session, users: Mapping[str, str], nodes: Mapping[str, str], addresses: Mapping[str, Collection[str]]
) -> Record:
    inside = [session.address] if session.address else addresses.get(session.connection_id or "", ())
    return {
        "id": session.id,
        "user": users.get(session.user_id, session.user_id),
        "protocol": session.protocol,
        "node": nodes.get(session.node_id, session.node_id),
        "addresses": [address.split("/")[0] for address in inside],
        "remote": session.remote,
        "since": moment(session.started_at),
        "rx": session.rx,
        "tx": session.tx,
        "connection_id": session.connection_id,
    }


def _line(record: Record) -> list[str]:
    return [
        record["user"],
        record["protocol"],
        record["node"],
        ",".join(record["addresses"]) or "-",
        record["remote"] or "-",
        record["since"],
        amount(record["rx"]),
        amount(record["tx"]),
        record["id"],
    ]
