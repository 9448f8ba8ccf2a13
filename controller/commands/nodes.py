"""node: VPN hosts."""

from __future__ import annotations

import argparse
from datetime import timedelta
from typing import TYPE_CHECKING

from controller.accounts.principal import Plan
from controller.commands import values
from controller.commands.command import Commands, add, add_group, services
from controller.commands.output import add_output, fields, moment, say, table, tell
from controller.fleet.nodes import INTERFACE, NodeSpec, NodeStatus

if TYPE_CHECKING:
    from controller.fleet.service import Node


def register(commands: Commands) -> None:
    node = add_group(commands, "node", "VPN hosts")
    token = add(node, "token", _token, "print a join token for a new host, or for one that joins again")
    token.add_argument("--name", required=True)
    token.add_argument("--country", required=True, help="ISO 3166 code of two letters")
    token.add_argument("--city", required=True)
    token.add_argument(
        "--endpoint", help="host that clients dial (default: as it is, for a new host the address it connects from)"
    )
    token.add_argument("--plan", choices=[plan.value for plan in Plan], help="lowest plan (default: as it is, or free)")
    token.add_argument(
        "--interface", metavar="NAME", help=f"of WireGuard on the host (default: as it is, or {INTERFACE})"
    )
    token.add_argument("--port", type=int, help="UDP port of WireGuard (default: as it is, or tunnel.port)")
    token.add_argument(
        "--protocols",
        type=values.protocols,
        metavar="P,P",
        help="that it may offer (default: as it is, for a new host all)",
    )
    token.add_argument(
        "--minutes", type=values.token_minutes, default=10, help="for how long the token is valid (default 10)"
    )
    delete = add(node, "delete", _delete, "delete a node that is disabled, with its connections")
    delete.add_argument("name", metavar="NAME")
    add_output(add(node, "list", _list, "list the nodes and what they say"))
    status = add(node, "status", _status, "show a node, or take it in or out of service")
    status.add_argument("name", metavar="NAME")
    status.add_argument("status", nargs="?", choices=[status.value for status in NodeStatus], help="none: show it")
    add_output(status)
    confirm = add(node, "confirm", _confirm, "allow the mass removal that a node refused")
    confirm.add_argument("name", metavar="NAME")


async def _token(arguments: argparse.Namespace) -> None:
    spec = NodeSpec(
        name=arguments.name,
        country=arguments.country,
        city=arguments.city,
        endpoint=arguments.endpoint,
        plan=Plan(arguments.plan) if arguments.plan is not None else None,
        interface=arguments.interface,
        port=arguments.port,
        protocols=tuple(arguments.protocols) if arguments.protocols is not None else None,
    )
    async with services(arguments) as opened:
        say(await opened.fleet.issue_join_token(spec, timedelta(minutes=arguments.minutes)))


async def _list(arguments: argparse.Namespace) -> None:
    async with services(arguments) as opened:
        nodes = await opened.fleet.nodes()

    def text() -> str:
        header = ["NAME", "STATUS", "PLACE", "ENDPOINT", "SEEN", "PROTOCOLS", "PROBLEM"]
        return table(header, [_line(node) for node in nodes])

    tell(arguments, [_record(node) for node in nodes], text)


async def _status(arguments: argparse.Namespace) -> None:
    async with services(arguments) as opened:
        if arguments.status is not None:
            await opened.fleet.set_status(arguments.name, NodeStatus(arguments.status))
            record = {"name": arguments.name, "status": arguments.status}
            tell(arguments, record, lambda: f"the status of {arguments.name} is {arguments.status}")
            return
        node, standings = await opened.fleet.node(arguments.name)
    expiry = moment(node.certificate_expires_at)
    shown = {
        "name": node.name,
        "status": node.status,
        "place": f"{node.country} {node.city}",
        "endpoint": node.endpoint or node.address or "-",
        "plan": node.plan,
        "seen": moment(node.last_seen_at) or "never",
        "agent": node.agent or "-",
        "certificate": f"until {expiry}" if expiry else "-",
        **{str(protocol): "-" for protocol in node.protocols},
        **{str(protocol): standing.words for protocol, standing in standings.items()},
        "problem": node.problem or "-",
    }
    servers: dict[str, dict[str, object]] = {
        protocol: {"status": "failed" if standing.problem else standing.words, "problem": standing.problem}
        for protocol, standing in standings.items()
    }
    tell(arguments, _record(node) | {"servers": servers}, lambda: fields(shown))


async def _confirm(arguments: argparse.Namespace) -> None:
    async with services(arguments) as opened:
        await opened.fleet.confirm_snapshot(arguments.name)
    say(f"{arguments.name} will be sent the state that it refused, with your confirmation")


async def _delete(arguments: argparse.Namespace) -> None:
    async with services(arguments) as opened:
        await opened.fleet.delete(arguments.name)
    say(f"{arguments.name} is deleted; stop what still runs on its host")


def _record(node: Node) -> dict[str, object]:
    return {
        "id": node.id,
        "name": node.name,
        "status": node.status,
        "country": node.country,
        "city": node.city,
        "endpoint": node.endpoint or node.address,
        "plan": node.plan,
        "last_seen_at": moment(node.last_seen_at),
        "agent": node.agent,
        "certificate_expires_at": moment(node.certificate_expires_at),
        "protocols": node.protocols,
        "problem": node.problem,
        "failed": node.servers,
    }


def _line(node: Node) -> list[str]:
    place, endpoint = f"{node.country} {node.city}", node.endpoint or node.address or "-"
    protocols, seen = ",".join(node.protocols) or "-", moment(node.last_seen_at) or "never"
    return [node.name, node.status, place, endpoint, seen, protocols, _trouble(node)]


def _trouble(node: Node) -> str:
    """What ails its servers, and what else it says."""
    servers = [f"{protocol}: {words}" for protocol, words in node.servers.items()]
    repeated = node.problem is not None and any(words in node.problem for words in node.servers.values())
    return "; ".join([*servers, *([node.problem] if node.problem and not repeated else [])]) or "-"
