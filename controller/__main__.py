"""The command line of the controller: make one, run it, and administer it beside the running one."""

from __future__ import annotations

import argparse
import asyncio
import getpass
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from controller import log
from controller.accounts.principal import Plan, Role
from controller.config import Config, LogLevel, read_config
from controller.errors import DomainError, Unusable
from controller.fleet.nodes import INTERFACE, NodeSpec, NodeStatus
from controller.usage.periods import Period
from shared import __version__
from shared.resource import Protocol
from shared.settings import SettingsError

if TYPE_CHECKING:
    from controller.app import Services
    from controller.fleet.service import Node

DEFAULT_CONFIG = Path("/etc/skynetvpn/controller.yaml")
_FAILED = 1
_LIMITS = ("quota_bytes", "quota_period", "expires_at", "max_sessions", "rate_up", "rate_down")

Command = Callable[[argparse.Namespace], Coroutine[Any, Any, None]]


def main() -> None:
    arguments = _parser().parse_args()
    os.umask(0o077)  # the database and all that is made beside it is for this account only
    command: Command = arguments.command
    try:
        log.configure(LogLevel.WARNING)
        if "password_stdin" in arguments:  # before the event loop is there: Ctrl-C ends the question
            arguments.password = _password(arguments)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(command(arguments))
    except SettingsError as error:
        print(f"skynetvpn-controller: {error.source} cannot be used:", file=sys.stderr)
        for problem in error.problems:
            print(f"  {problem}", file=sys.stderr)
        sys.exit(_FAILED)
    except (DomainError, Unusable, OSError) as error:
        print(f"skynetvpn-controller: {error}", file=sys.stderr)
        sys.exit(_FAILED)
    except KeyboardInterrupt:
        sys.exit(130)


async def _init(arguments: argparse.Namespace) -> None:
    from controller.setup import initialise

    directory: Path = arguments.dir
    config = await initialise(directory, arguments.listen, arguments.node_listen, arguments.node_address)
    print(f"made {directory}: the API will listen on {config.listen}, nodes will dial {config.dialled_address()}")
    administrator = "admin --email admin@example.org --role admin"
    print(f"next: skynetvpn-controller user add {administrator} --config {directory}/controller.yaml")
    print(f"      skynetvpn-controller run --config {directory}/controller.yaml")


async def _run(arguments: argparse.Namespace) -> None:
    from controller import app

    config = _config(arguments)
    log.configure(config.log_level)
    await app.serve(config)


async def _user_add(arguments: argparse.Namespace) -> None:
    role, plan = Role(arguments.role), Plan(arguments.plan)
    async with _services(arguments) as services:
        member = await services.members.create(
            arguments.name, arguments.email, arguments.password, arguments.protocols, role=role, plan=plan
        )
    print(f"added {member.user.username} ({role}, plan {plan})")


async def _user_list(arguments: argparse.Namespace) -> None:
    async with _services(arguments) as services:
        users = await services.administration.list_users()
    print("NUMBER\tNAME\tEMAIL\tROLE\tPLAN\tSTATE\tPROTOCOLS")
    for user in users:
        protocols = "any" if user.protocols is None else ",".join(user.protocols) or "none"
        state = "active" if user.active else "inactive"
        print(f"{user.number}\t{user.username}\t{user.email}\t{user.role}\t{user.plan}\t{state}\t{protocols}")


async def _user_set(arguments: argparse.Namespace) -> None:
    limits = {name: getattr(arguments, name) for name in _LIMITS if hasattr(arguments, name)}
    async with _services(arguments) as services:
        member = await services.members.named(arguments.name)
        changed = await services.members.change(
            member.user.number,
            email=arguments.email,
            password=arguments.password,
            active=arguments.active,
            protocols=arguments.protocols,
            limits=limits,
        )
    told = {name: getattr(changed.limits, name) for name in _LIMITS}
    shown = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in told.items() if value is not None)
    print(f"{changed.user.username}: {'active' if changed.user.active else 'inactive'}, {shown}")


async def _user_delete(arguments: argparse.Namespace) -> None:
    async with _services(arguments) as services:
        member = await services.members.named(arguments.name)
        await services.members.delete(member.user.number)
    print(f"deleted {arguments.name}")


def _password(arguments: argparse.Namespace) -> str | None:
    """None where an account keeps the one that it has."""
    if arguments.password_stdin:
        return sys.stdin.readline().rstrip("\n")
    if arguments.command is not _user_add:
        return None
    if not sys.stdin.isatty():
        raise SystemExit("skynetvpn-controller: give the password on standard input, with --password-stdin")
    password = getpass.getpass(f"password of {arguments.name}: ")
    if password != getpass.getpass("once more: "):
        raise SystemExit("skynetvpn-controller: the second password is another one than the first")
    return password


async def _node_token(arguments: argparse.Namespace) -> None:
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
    async with _services(arguments) as services:
        print(await services.fleet.issue_join_token(spec, timedelta(minutes=arguments.minutes)))


async def _node_list(arguments: argparse.Namespace) -> None:
    async with _services(arguments) as services:
        nodes = await services.fleet.nodes()
    print("NAME", "STATUS", "PLACE", "ENDPOINT", "SEEN", "PROTOCOLS", "PROBLEM", sep="\t")
    for node in nodes:
        place, endpoint = f"{node.country} {node.city}", node.endpoint or node.address or "-"
        protocols = ",".join(node.protocols) or "-"
        print(node.name, node.status, place, endpoint, _moment(node.last_seen_at), protocols, _trouble(node), sep="\t")


async def _node_status(arguments: argparse.Namespace) -> None:
    async with _services(arguments) as services:
        if arguments.status is not None:
            await services.fleet.set_status(arguments.name, NodeStatus(arguments.status))
            print(f"the status of {arguments.name} is {arguments.status}")
            return
        node, standings = await services.fleet.node(arguments.name)
    shown = {
        "name": node.name,
        "status": node.status,
        "place": f"{node.country} {node.city}",
        "endpoint": node.endpoint or node.address or "-",
        "plan": node.plan,
        "seen": _moment(node.last_seen_at),
        "agent": node.agent or "-",
        "certificate": f"until {_moment(node.certificate_expires_at)}" if node.certificate_expires_at else "-",
        **{str(protocol): "-" for protocol in node.protocols},
        **{str(protocol): standing.words for protocol, standing in standings.items()},
        "problem": node.problem or "-",
    }
    for name, text in shown.items():
        print(f"{name:12}{text}")


def _moment(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}" if moment is not None else "never"


def _trouble(node: Node) -> str:
    """What ails its servers, and what else it says."""
    servers = [f"{protocol}: {words}" for protocol, words in node.servers.items()]
    repeated = node.problem is not None and any(words in node.problem for words in node.servers.values())
    return "; ".join([*servers, *([node.problem] if node.problem and not repeated else [])]) or "-"


async def _node_confirm(arguments: argparse.Namespace) -> None:
    async with _services(arguments) as services:
        await services.fleet.confirm_snapshot(arguments.name)
    print(f"{arguments.name} will be sent the state that it refused, with your confirmation")


@asynccontextmanager
async def _services(arguments: argparse.Namespace) -> AsyncIterator[Services]:
    # Imported when they are needed, so that --help and a wrong argument are answered at once.
    from controller import app

    async with app.services(_config(arguments)) as services:
        yield services


def _config(arguments: argparse.Namespace) -> Config:
    return read_config(arguments.config, os.environ)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="skynetvpn-controller", description="The central service of a VPN fleet.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    init = commands.add_parser("init", help="make a controller's directory")
    init.add_argument("--dir", type=Path, required=True, help="where settings, keys and the database go")
    init.add_argument("--listen", metavar="HOST:PORT", help="of the API (default 127.0.0.1:8080)")
    init.add_argument("--node-listen", metavar="HOST:PORT", help="of the node channel (default 0.0.0.0:8443)")
    init.add_argument("--node-address", metavar="HOST:PORT", help="that nodes dial, where it is another")
    init.set_defaults(command=_init)

    _add(commands, "run", _run, "run the controller in the foreground")

    user = commands.add_parser("user", help="accounts").add_subparsers(required=True, metavar="COMMAND")
    add = _add(user, "add", _user_add, "add an account")
    add.add_argument("name", metavar="NAME")
    add.add_argument("--email", required=True)
    add.add_argument("--role", choices=[role.value for role in Role], default=Role.USER.value)
    add.add_argument("--plan", choices=[plan.value for plan in Plan], default=Plan.FREE.value)
    add.add_argument(
        "--password-stdin", action="store_true", help="read the password from standard input; else it is asked for"
    )
    add.add_argument(
        "--protocols", type=_protocols, metavar="P,P", help="that it may use, with a login of its own each"
    )
    _add(user, "list", _user_list, "list the accounts")
    change = _add(user, "set", _user_set, "change an account and its limits; what is not given stays")
    change.add_argument("name", metavar="NAME")
    change.add_argument("--email")
    change.add_argument("--password-stdin", action="store_true", help="read a new password from standard input")
    change.add_argument("--active", type=_yes_or_no, metavar="yes|no")
    change.add_argument("--protocols", type=_protocols, metavar="P,P", help="that it may use, with a login each")
    period = "|".join(period.value for period in Period)
    change.add_argument("--quota-bytes", type=_number_or_none, metavar="N|none", default=argparse.SUPPRESS)
    change.add_argument("--quota-period", type=_period, metavar=period, default=argparse.SUPPRESS)
    change.add_argument("--expires-at", type=_moment_or_none, metavar="TIME|none", default=argparse.SUPPRESS)
    change.add_argument("--max-sessions", type=_number_or_none, metavar="N|none", default=argparse.SUPPRESS)
    change.add_argument("--rate-up", type=_number_or_none, metavar="BIT/S|none", default=argparse.SUPPRESS)
    change.add_argument("--rate-down", type=_number_or_none, metavar="BIT/S|none", default=argparse.SUPPRESS)
    _add(user, "delete", _user_delete, "delete an account, and end what it uses").add_argument("name", metavar="NAME")

    node = commands.add_parser("node", help="VPN hosts").add_subparsers(required=True, metavar="COMMAND")
    token = _add(node, "token", _node_token, "print a join token for a new host, or for one that joins again")
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
        "--protocols", type=_protocols, metavar="P,P", help="that it may offer (default: as it is, for a new host all)"
    )
    token.add_argument("--minutes", type=int, default=10, help="for how long the token is valid (default 10)")
    _add(node, "list", _node_list, "list the nodes and what they say")
    status = _add(node, "status", _node_status, "show a node, or take it in or out of service")
    status.add_argument("name", metavar="NAME")
    status.add_argument("status", nargs="?", choices=[status.value for status in NodeStatus], help="none: show it")
    confirm = _add(node, "confirm", _node_confirm, "allow the mass removal that a node refused")
    confirm.add_argument("name", metavar="NAME")
    return parser


def _protocols(text: str) -> list[Protocol]:
    try:
        return [Protocol(name) for name in text.split(",") if name]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; use any of {','.join(Protocol)}, with commas") from error


def _yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no")
    return text == "yes"


def _period(text: str) -> Period:
    try:
        return Period(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(Period)}") from error


def _number_or_none(text: str) -> int | None:
    try:
        return None if text == "none" else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number, such as 5000000000, nor none") from error


def _moment_or_none(text: str) -> datetime | None:
    """RFC 3339; a day alone begins at midnight UTC."""
    if text == "none":
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        allowed = "neither a day, such as 2027-01-31, nor a time, such as 2027-01-31T12:00:00Z, nor none"
        raise argparse.ArgumentTypeError(f"{text!r} is {allowed}") from error
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, command: Command, words: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=words)
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help=f"default {DEFAULT_CONFIG}")
    parser.set_defaults(command=command)
    return parser


if __name__ == "__main__":
    main()
