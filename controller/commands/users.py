"""user: accounts, their limits and what they use."""

from __future__ import annotations

import argparse
import getpass
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from controller.accounts.principal import Plan, Role
from controller.commands import sessions, values
from controller.commands.command import Commands, add, add_group, services
from controller.commands.output import add_output, amount, fields, moment, say, table, tell
from controller.usage.periods import Period, latest_reset

if TYPE_CHECKING:
    from controller.access.members import Member
    from controller.usage.sessions import Usage

Record = Mapping[str, Any]

_LIMITS = ("quota_bytes", "quota_period", "expires_at", "max_sessions", "rate_up", "rate_down")
_SHOW = """\
All about an account. Traffic is that of the present period of its quota (without a period: since it was made, at most
400 days), as the nodes count it, and may be some seconds old, as the live sessions; see session list."""


def register(commands: Commands) -> None:
    user = add_group(commands, "user", "accounts")
    made = add(user, "add", _add, "add an account")
    made.add_argument("name", metavar="NAME")
    made.add_argument("--email", required=True)
    made.add_argument("--role", choices=[role.value for role in Role], default=Role.USER.value)
    made.add_argument("--plan", choices=[plan.value for plan in Plan], default=Plan.FREE.value)
    made.add_argument(
        "--password-stdin", action="store_true", help="read the password from standard input; else it is asked for"
    )
    made.add_argument(
        "--protocols", type=values.protocols, metavar="P,P", help="that it may use, with a login of its own each"
    )
    made.set_defaults(ask=True)
    add_output(add(user, "list", _list, "list the accounts and their limits"))
    shown = add(user, "show", _show, "show an account: limits, traffic, live sessions", _SHOW)
    shown.add_argument("name", metavar="NAME")
    add_output(shown)
    _register_set(add(user, "set", _set, "change an account and its limits; what is not given stays"))
    add(user, "delete", _delete, "delete an account, and end what it uses").add_argument("name", metavar="NAME")


def _register_set(change: argparse.ArgumentParser) -> None:
    change.add_argument("name", metavar="NAME")
    change.add_argument("--email")
    change.add_argument("--password-stdin", action="store_true", help="read a new password from standard input")
    change.add_argument("--role", choices=[role.value for role in Role], help="one administrator always stays")
    change.add_argument("--plan", choices=[plan.value for plan in Plan])
    change.add_argument("--active", type=values.yes_or_no, metavar="yes|no")
    change.add_argument("--protocols", type=values.protocols, metavar="P,P", help="that it may use, with a login each")
    period = "|".join(period.value for period in Period)
    change.add_argument("--quota-bytes", type=values.number_or_none, metavar="N|none", default=argparse.SUPPRESS)
    change.add_argument("--quota-period", type=values.period, metavar=period, default=argparse.SUPPRESS)
    change.add_argument("--expires-at", type=values.moment_or_none, metavar="TIME|none", default=argparse.SUPPRESS)
    change.add_argument("--max-sessions", type=values.number_or_none, metavar="N|none", default=argparse.SUPPRESS)
    change.add_argument("--rate-up", type=values.number_or_none, metavar="BIT/S|none", default=argparse.SUPPRESS)
    change.add_argument("--rate-down", type=values.number_or_none, metavar="BIT/S|none", default=argparse.SUPPRESS)


def read_password(arguments: argparse.Namespace) -> str | None:
    """None where an account keeps the one that it has."""
    if arguments.password_stdin:
        return sys.stdin.readline().rstrip("\n")
    if "ask" not in arguments:
        return None
    if not sys.stdin.isatty():
        raise SystemExit("skynetvpn-controller: give the password on standard input, with --password-stdin")
    password = getpass.getpass(f"password of {arguments.name}: ")
    if password != getpass.getpass("once more: "):
        raise SystemExit("skynetvpn-controller: the second password is another one than the first")
    return password


async def _add(arguments: argparse.Namespace) -> None:
    role, plan = Role(arguments.role), Plan(arguments.plan)
    async with services(arguments) as opened:
        member = await opened.members.create(
            arguments.name, arguments.email, arguments.password, arguments.protocols, role=role, plan=plan
        )
    say(f"added {member.user.username} ({role}, plan {plan})")


async def _list(arguments: argparse.Namespace) -> None:
    async with services(arguments) as opened:
        members = await opened.members.list_members()
        live = Counter(record["user"] for record in await sessions.records(opened))

    def text() -> str:
        header = ["NUMBER", "NAME", "EMAIL", "ROLE", "PLAN", "STATE", "PROTOCOLS", "QUOTA", "EXPIRES", "SESSIONS"]
        return table(header, [_line(member, live[member.user.username]) for member in members])

    tell(arguments, [_record(member) | {"sessions": live[member.user.username]} for member in members], text)


async def _show(arguments: argparse.Namespace) -> None:
    from controller.services import stored_sessions

    async with services(arguments) as opened:
        member = await opened.members.named(arguments.name)
        live = await sessions.records(opened, member.user.id)
        now = datetime.now(UTC)
        since = latest_reset(member.limits.quota_period, member.user.created_at, now)
        traffic = await (await stored_sessions(opened.database)).usage(member.user.id, since, now)
    usage = _usage(since, traffic)

    def text() -> str:
        return "\n\n".join([fields(_shown(member, usage)), sessions.lines(live) if live else "no live session"])

    tell(arguments, _record(member) | {"traffic": usage, "sessions": live}, text)


async def _set(arguments: argparse.Namespace) -> None:
    limits = {name: getattr(arguments, name) for name in _LIMITS if hasattr(arguments, name)}
    async with services(arguments) as opened:
        member = await opened.members.named(arguments.name)
        changed = await opened.members.change(
            member.user.number,
            email=arguments.email,
            password=arguments.password,
            role=Role(arguments.role) if arguments.role is not None else None,
            plan=Plan(arguments.plan) if arguments.plan is not None else None,
            active=arguments.active,
            protocols=arguments.protocols,
            limits=limits,
        )
    user, told = changed.user, {name: getattr(changed.limits, name) for name in _LIMITS}
    told["expires_at"] = moment(changed.limits.expires_at)
    shown = [f"{name.replace('_', ' ')} {value}" for name, value in told.items() if value is not None]
    say(f"{user.username}: {', '.join([_state(changed), user.role, f'plan {user.plan}', *shown])}")


async def _delete(arguments: argparse.Namespace) -> None:
    async with services(arguments) as opened:
        member = await opened.members.named(arguments.name)
        await opened.members.delete(member.user.number)
    say(f"deleted {arguments.name}")


def _record(member: Member) -> dict[str, Any]:
    user, limits = member.user, member.limits
    return {
        "number": user.number,
        "username": user.username,
        "email": user.email,
        "role": user.role,
        "plan": user.plan,
        "active": user.active,
        "created_at": moment(user.created_at),
        "protocols": user.protocols,  # null: any
        "quota_bytes": limits.quota_bytes,
        "quota_period": limits.quota_period,
        "used_bytes": limits.used_bytes,
        "period_ends_at": moment(limits.period_ends_at),
        "expires_at": moment(limits.expires_at),
        "max_sessions": limits.max_sessions,
        "rate_up": limits.rate_up,
        "rate_down": limits.rate_down,
        "blocked": limits.blocked(datetime.now(UTC)) if user.active else "inactive",
    }


def _usage(since: datetime, traffic: Sequence[Usage]) -> Record:
    protocols: dict[str, dict[str, int]] = {}
    for hour in traffic:
        sums = protocols.setdefault(hour.protocol, {"rx": 0, "tx": 0})
        sums["rx"] += hour.rx
        sums["tx"] += hour.tx
    return {
        "since": moment(since),
        "rx": sum(hour.rx for hour in traffic),
        "tx": sum(hour.tx for hour in traffic),
        "protocols": protocols,
    }


def _line(member: Member, live: int) -> list[object]:
    user, limits = member.user, member.limits
    return [
        user.number,
        user.username,
        user.email,
        user.role,
        user.plan,
        _state_word(member),
        _protocols(member),
        _quota(member),
        moment(limits.expires_at) or "never",
        f"{live}/{limits.max_sessions}" if limits.max_sessions is not None else live,
    ]


def _shown(member: Member, usage: Record) -> Mapping[str, object]:
    user, limits = member.user, member.limits
    rates = [
        f"{amount(rate, 'bit/s')} {way}" for rate, way in ((limits.rate_up, "up"), (limits.rate_down, "down")) if rate
    ]
    reset = f", anew at {moment(limits.period_ends_at)}" if limits.period_ends_at is not None else ""
    by = [f"{protocol} {amount(sums['rx'] + sums['tx'])}" for protocol, sums in usage["protocols"].items()]
    traffic = f"{amount(usage['rx'])} from it, {amount(usage['tx'])} to it, since {usage['since']}"
    return {
        "name": user.username,
        "number": user.number,
        "email": user.email,
        "role": user.role,
        "plan": user.plan,
        "state": _state(member),
        "created": moment(user.created_at),
        "protocols": _protocols(member),
        "quota": f"{_quota(member)}{reset}",
        "expires": moment(limits.expires_at) or "never",
        "sessions": f"at most {limits.max_sessions}" if limits.max_sessions is not None else "as many as it likes",
        "speed": ", ".join(rates) or "not limited",
        "traffic": f"{traffic} ({', '.join(by)})" if by else traffic,
    }


def _state_word(member: Member) -> str:
    if not member.user.active:
        return "inactive"
    return "expired" if member.limits.blocked(datetime.now(UTC)) == "expired" else "active"


def _state(member: Member) -> str:
    if not member.user.active:
        return "inactive"
    match member.limits.blocked(datetime.now(UTC)):
        case "expired":
            return "active, but it has expired"
        case "quota":
            return "active, but its quota is used up"
        case _:
            return "active"


def _protocols(member: Member) -> str:
    return "any" if member.user.protocols is None else ",".join(member.user.protocols) or "none"


def _quota(member: Member) -> str:
    limits = member.limits
    if limits.quota_bytes is None:
        return "-"
    period = "" if limits.quota_period is Period.NONE else f" {limits.quota_period}"
    return f"{amount(limits.used_bytes)}/{amount(limits.quota_bytes)}{period}"
