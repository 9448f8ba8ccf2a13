"""The endpoints of the contract `irssh`."""

from __future__ import annotations

from typing import Any

from controller.access.members import Members
from controller.accounts.errors import UserNotFound
from controller.accounts.service import Accounts, User
from controller.contracts.irssh import models, presenters
from controller.contracts.kit import Access, Call, Contract, Reply, Route
from controller.fleet.directory import Directory
from controller.fleet.protocols import Protocols
from controller.usage.sessions import Sessions

_LIMITS = ("quota_bytes", "quota_period", "expires_at", "max_sessions", "rate_up", "rate_down")
_MAX_NUMBER = 2**63 - 1


class Irssh:
    def __init__(
        self, accounts: Accounts, members: Members, protocols: Protocols, sessions: Sessions, directory: Directory
    ) -> None:
        self._accounts = accounts
        self._members = members
        self._protocols = protocols
        self._sessions = sessions
        self._directory = directory

    async def check_password(self, call: Call) -> User:
        given = call.body_as(models.Credentials)
        return await self._accounts.verify(given.username, given.password, call.client)

    async def log_in(self, call: Call) -> Reply:
        token, _ = await self._accounts.open_session(call.prepared_as(User), call.contract, call.client)
        return Reply({"access_token": token, "token_type": "bearer"})

    async def refresh(self, call: Call) -> Reply:
        token = await self._accounts.renew(call.user, call.client)
        return Reply({"access_token": token, "token_type": "bearer"})

    async def list_users(self, call: Call) -> Reply:
        return Reply({"users": [presenters.user(found) for found in await self._members.list_users()]})

    async def create_user(self, call: Call) -> Reply:
        wanted = call.body_as(models.NewUser)
        made = await self._members.create(wanted.username, wanted.email, wanted.password, wanted.protocols)
        return Reply(presenters.created(made))

    async def get_user(self, call: Call) -> Reply:
        return Reply(presenters.member(await self._members.get(_number(call))))

    async def change_user(self, call: Call) -> Reply:
        wanted = call.body_as(models.UserChange)
        limits: dict[str, Any] = {name: getattr(wanted, name) for name in _LIMITS if name in wanted.model_fields_set}
        if "quota_period" in limits:
            limits["quota_period"] = limits["quota_period"] or "none"
        changed = await self._members.change(
            _number(call),
            email=wanted.email,
            password=wanted.password,
            active=wanted.active,
            protocols=wanted.protocols,
            limits=limits,
        )
        return Reply(presenters.member(changed))

    async def delete_user(self, call: Call) -> Reply:
        await self._members.delete(_number(call))
        return Reply({"detail": "User deleted"})

    async def kick_user(self, call: Call) -> Reply:
        member = await self._members.get(_number(call))
        return Reply({"kicked": await self._sessions.kick(user_id=member.user.id)})

    async def list_protocols(self, call: Call) -> Reply:
        server_id = call.query_as(models.OneServer).server_id
        users = self._sessions.users_by_protocol(server_id)
        states = await self._protocols.list(server_id)
        return Reply({"protocols": [presenters.protocol(state, users) for state in states]})

    async def configure_protocol(self, call: Call) -> Reply:
        wanted, server_id = call.body_as(models.ProtocolChange), call.query_as(models.OneServer).server_id
        state = await self._protocols.configure(
            call.params["name"], port=wanted.port, settings=wanted.settings, server_id=server_id
        )
        return Reply(presenters.configured(state, self._sessions.users_by_protocol(server_id)))

    async def system(self, call: Call) -> Reply:
        server_id = call.query_as(models.OneServer).server_id
        if server_id is not None:
            self._directory.known(server_id)  # or it is not found
        loads = self._directory.loads()
        chosen = [load for node_id, load in loads.items() if server_id in (None, node_id)]
        return Reply(presenters.system_metrics(chosen))

    async def active_users(self, call: Call) -> Reply:
        usernames = {user.id: user.username for user in await self._members.list_users()}
        return Reply(presenters.active(self._sessions.live(), usernames))


def _number(call: Call) -> int:
    """The integer id of the path; what is none belongs to nobody."""
    text = call.params["id"]
    if not (text.isascii() and text.isdigit()) or int(text) > _MAX_NUMBER:
        raise UserNotFound
    return int(text)


def contract(
    accounts: Accounts, members: Members, protocols: Protocols, sessions: Sessions, directory: Directory
) -> Contract:
    handlers = Irssh(accounts, members, protocols, sessions, directory)
    return Contract(
        name="irssh",
        title="IRSSH panel API",
        description=(
            "One account, four protocols: users, the servers' protocols, and who is connected. "
            "Everything but login and refresh needs the admin role. Every error has the body `{detail}`."
        ),
        base="/api",
        routes=(*_auth(handlers), *_users(handlers), *_protocols(handlers), *_monitoring(handlers)),
        envelope=presenters.error,
        error=models.Error,
        statuses={409: 400},  # the document has no status for a conflict
    )


def _auth(handlers: Irssh) -> tuple[Route, ...]:
    answer = {"access_token": "sky_…", "token_type": "bearer"}
    return (
        Route(
            method="POST",
            path="/auth/login",
            access=Access.PUBLIC,
            auth=True,
            joint="username",
            prepare=handlers.check_password,
            handler=handlers.log_in,
            summary="Log in",
            body=models.Credentials,
            answer=models.Token,
            request_example={"username": "admin", "password": "correct horse battery"},
            answer_example=answer,
            refusals={401: "The user name or the password is wrong"},
        ),
        Route(
            method="POST",
            path="/auth/refresh",
            access=Access.USER,
            auth=True,
            handler=handlers.refresh,
            summary="Exchange a valid token for a new one",
            description="The old token ends at once.",
            answer=models.Token,
            answer_example=answer,
        ),
    )


def _users(handlers: Irssh) -> tuple[Route, ...]:
    user = {
        "id": 7,
        "username": "alice",
        "email": "alice@example.com",
        "active": True,
        "created_at": "2025-01-01T12:00:00Z",
    }
    created = user | {"protocols": ["ssh", "l2tp"]}
    details = created | {
        "quota_bytes": 10_000_000_000,
        "quota_period": "monthly",
        "used_bytes": 123_456,
        "expires_at": "2025-12-31T00:00:00Z",
        "max_sessions": 2,
        "rate_up": None,
        "rate_down": 50_000_000,
    }
    missing = {404: "There is no such user"}
    return (
        Route(
            method="GET",
            path="/users",
            access=Access.ADMIN,
            handler=handlers.list_users,
            summary="List the users",
            answer=models.Users,
            answer_example={"users": [user]},
        ),
        Route(
            method="POST",
            path="/users",
            access=Access.ADMIN,
            handler=handlers.create_user,
            summary="Create a user",
            description="The name and the password are the login of each protocol, on every server that offers it.",
            status=201,
            body=models.NewUser,
            answer=models.CreatedUser,
            request_example={
                "username": "alice",
                "email": "alice@example.com",
                "password": "correct horse battery",
                "protocols": ["ssh", "l2tp"],
            },
            answer_example=created,
        ),
        Route(
            method="GET",
            path="/users/{id}",
            access=Access.ADMIN,
            handler=handlers.get_user,
            summary="Look at a user, with limits and usage",
            answer=models.UserDetails,
            answer_example=details,
            refusals=missing,
        ),
        Route(
            method="PUT",
            path="/users/{id}",
            access=Access.ADMIN,
            handler=handlers.change_user,
            summary="Change a user",
            description=models.UserChange.__doc__ or "",
            body=models.UserChange,
            answer=models.UserDetails,
            request_example={"quota_bytes": 10_000_000_000, "quota_period": "monthly", "max_sessions": 2},
            answer_example=details,
            refusals=missing,
        ),
        Route(
            method="DELETE",
            path="/users/{id}",
            access=Access.ADMIN,
            handler=handlers.delete_user,
            summary="Delete a user, and end all sessions",
            answer=models.Done,
            answer_example={"detail": "User deleted"},
            refusals=missing,
        ),
        Route(
            method="POST",
            path="/users/{id}/kick",
            access=Access.ADMIN,
            handler=handlers.kick_user,
            summary="End a user's live sessions",
            description="Clients of OpenVPN, SSH and L2TP may come back; a WireGuard connection has ended for good.",
            answer=models.Kicked,
            answer_example={"kicked": 2},
            refusals=missing,
        ),
    )


def _protocols(handlers: Irssh) -> tuple[Route, ...]:
    state = {"name": "openvpn", "status": "running", "port": 1194, "active_users": 12}
    return (
        Route(
            method="GET",
            path="/protocols",
            access=Access.ADMIN,
            handler=handlers.list_protocols,
            summary="List the protocols",
            query=models.OneServer,
            answer=models.ProtocolList,
            answer_example={"protocols": [state]},
            refusals={404: "There is no such server"},
        ),
        Route(
            method="PUT",
            path="/protocols/{name}",
            access=Access.ADMIN,
            handler=handlers.configure_protocol,
            summary="Configure a protocol on the whole fleet, or on one server",
            description="`applying` until every server has it, then `running` or `error`. A bad value changes nothing.",
            body=models.ProtocolChange,
            query=models.OneServer,
            answer=models.ConfiguredProtocol,
            request_example={"port": 1194, "settings": {"mtu": 1400}},
            answer_example=state | {"status": "applying", "settings": {"mtu": 1400}},
            refusals={404: "There is no such protocol or server"},
        ),
    )


def _monitoring(handlers: Irssh) -> tuple[Route, ...]:
    return (
        Route(
            method="GET",
            path="/monitoring/system",
            access=Access.ADMIN,
            handler=handlers.system,
            summary="The mean load of the fleet, or that of one server",
            query=models.OneServer,
            answer=models.SystemMetrics,
            answer_example={
                "cpu_usage": 12.5,
                "memory_usage": 40.1,
                "disk_usage": 17.0,
                "network_stats": {"in": 125_000.0, "out": 1_250_000.0},
            },
            refusals={404: "There is no such server"},
        ),
        Route(
            method="GET",
            path="/monitoring/users",
            access=Access.ADMIN,
            handler=handlers.active_users,
            summary="The live sessions of all protocols",
            answer=models.ActiveUsers,
            answer_example={
                "total_users": 100,
                "active_users": 1,
                "connections": [
                    {
                        "username": "alice",
                        "protocol": "ssh",
                        "connected_since": "2025-01-01T12:00:00Z",
                        "ip_address": "203.0.113.7",
                    }
                ],
            },
        ),
    )
