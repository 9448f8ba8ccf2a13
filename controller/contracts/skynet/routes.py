"""The endpoints of the contract `skynet`."""

from __future__ import annotations

import orjson

from controller.accounts.principal import Plan
from controller.accounts.service import Accounts, User
from controller.contracts.kit import JSON, Access, Call, Contract, Reply, Route, best, not_acceptable, rfc3339
from controller.contracts.skynet import models, presenters
from controller.fleet.directory import Directory
from controller.tunnels.connection import Connection
from controller.tunnels.qr import TooMuchForQr, qr_png, qr_svg
from controller.tunnels.service import Tunnels

WAIT_SECONDS = 10.0  # for a node to apply what was asked for
_MEDIA = {"conf": "text/plain", "json": JSON, "svg": "image/svg+xml", "png": "image/png"}
_EXAMPLE_ID = "0197a1b2-7c3d-7e4f-8a5b-6c7d8e9f0a1b"
_VENDOR_JSON = "application/vnd.skynet.v1+json"


class Skynet:
    def __init__(self, accounts: Accounts, directory: Directory, tunnels: Tunnels) -> None:
        self._accounts = accounts
        self._directory = directory
        self._tunnels = tunnels
        self._server_bodies: dict[tuple[str, Plan], bytes] = {}  # apps poll them; as of the revision
        self._revision = 0

    async def check_password(self, call: Call) -> User:
        given = call.body_as(models.Credentials)
        return await self._accounts.verify(given.username, given.password, call.client)

    async def log_in(self, call: Call) -> Reply:
        token, expires_at = await self._accounts.open_session(call.prepared_as(User), call.contract, call.client)
        return Reply({"token": token, "expires_at": rfc3339(expires_at)})

    async def log_out(self, call: Call) -> Reply:
        await self._accounts.logout(call.user)
        return Reply({"message": "Logged out successfully"})

    async def list_servers(self, call: Call) -> Reply:
        return Reply(presenters.servers(self._directory.servers(call.user.plan)))

    async def get_server(self, call: Call) -> Reply:
        if self._revision != self._directory.revision:
            self._server_bodies.clear()
            self._revision = self._directory.revision
        key = call.params["id"], call.user.plan
        body = self._server_bodies.get(key)
        if body is None:
            found = self._directory.server(call.user.plan, call.params["id"])
            body = self._server_bodies[key] = orjson.dumps(presenters.server(found))
        return Reply(body)

    async def create_connection(self, call: Call) -> Reply:
        wanted = call.body_as(models.ConnectionRequest)
        made = await self._tunnels.create(
            call.user,
            call.contract,
            server_id=wanted.server_id,
            protocol=wanted.protocol,
            public_key=wanted.public_key,
            device_id=wanted.device_id,
            wait=_wait(call),
        )
        return Reply(presenters.started(made), headers=_applied(made))

    async def list_connections(self, call: Call) -> Reply:
        return Reply([presenters.live_connection(found) for found in await self._tunnels.list_live(call.user)])

    async def get_connection(self, call: Call) -> Reply:
        return Reply(presenters.connection(await self._tunnels.get(call.user, call.params["id"])))

    async def end_connection(self, call: Call) -> Reply:
        ended = await self._tunnels.terminate(call.user, call.params["id"], wait=_wait(call))
        return Reply({"message": "Connection terminated"}, headers=_applied(ended))

    async def get_config(self, call: Call) -> Reply:
        choice = call.query_as(models.ConfigChoice).format
        config = await self._tunnels.client_config(call.user, call.params["id"])
        offers = (*_MEDIA.values(), _VENDOR_JSON, config.media)
        media = _MEDIA[choice] if choice is not None else best(call.accept, offers)
        if media is None:
            raise not_acceptable(*_MEDIA.values())
        if media in (JSON, _VENDOR_JSON):
            return Reply(config.to_json())
        try:
            if media == _MEDIA["svg"]:
                return Reply(await qr_svg(config.to_conf()), media)
            if media == _MEDIA["png"]:
                return Reply(await qr_png(config.to_conf()), media)
        except TooMuchForQr:
            raise not_acceptable(_MEDIA["conf"], JSON) from None
        name = {"Content-Disposition": f'attachment; filename="{config.file_name}"'}
        return Reply(config.to_conf().encode(), f"{media}; charset=utf-8", name)

    async def get_profile(self, call: Call) -> Reply:
        return Reply(presenters.profile(await self._accounts.get_user(call.user.user_id)))

    async def change_profile(self, call: Call) -> Reply:
        wanted = call.body_as(models.ProfileChange)
        changed = await self._accounts.update_me(
            call.user,
            call.client,
            email=wanted.email,
            password=wanted.password,
            current_password=wanted.current_password,
        )
        return Reply(presenters.profile_changed(changed))


def _wait(call: Call) -> float | None:
    return WAIT_SECONDS if call.query_as(models.Wait).wait is not None else None


def _applied(connection: Connection) -> dict[str, str]:
    return {} if connection.applied is None else {"X-Applied": "true" if connection.applied else "false"}


def contract(accounts: Accounts, directory: Directory, tunnels: Tunnels) -> Contract:
    handlers = Skynet(accounts, directory, tunnels)
    return Contract(
        name="skynet",
        title="SkynetVPN API",
        description=(
            "Log in, choose a server, connect. "
            "Every error has the body `{error, code}`, where `code` is the HTTP status."
        ),
        base="/api",
        routes=(*_auth(handlers), *_servers(handlers), *_connections(handlers), *_users(handlers)),
        envelope=presenters.error,
        error=models.Error,
        statuses={409: 400},  # the document has no status for a conflict
    )


def _auth(handlers: Skynet) -> tuple[Route, ...]:
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
            request_example={"username": "alice", "password": "correct horse battery"},
            answer_example={"token": "sky_…", "expires_at": "2025-01-02T12:00:00Z"},
            refusals={401: "The user name or the password is wrong"},
        ),
        Route(
            method="POST",
            path="/auth/logout",
            access=Access.USER,
            handler=handlers.log_out,
            summary="Log out",
            description="The token ends at once.",
            answer=models.Message,
            answer_example={"message": "Logged out successfully"},
        ),
    )


def _servers(handlers: Skynet) -> tuple[Route, ...]:
    example = {"id": _EXAMPLE_ID, "name": "fra-1", "country": "DE", "ip": "203.0.113.10", "status": "online"}
    return (
        Route(
            method="GET",
            path="/servers",
            access=Access.USER,
            handler=handlers.list_servers,
            summary="List the servers of the account's plan",
            answer=list[models.ServerSummary],
            answer_example=[example],
        ),
        Route(
            method="GET",
            path="/servers/{id}",
            access=Access.USER,
            handler=handlers.get_server,
            summary="Look at one server",
            answer=models.ServerDetails,
            answer_example=example | {"load": 12},
        ),
    )


def _connections(handlers: Skynet) -> tuple[Route, ...]:
    example = {
        "connection_id": _EXAMPLE_ID,
        "server_id": _EXAMPLE_ID,
        "status": "connecting",
        "created_at": "2025-01-01T12:00:00Z",
    }
    return (
        Route(
            method="POST",
            path="/connections",
            access=Access.USER,
            handler=handlers.create_connection,
            summary="Start a connection",
            description=(
                "Send the public half of a key of your own, and the service never sees the private one. "
                "The same key on the same server replaces the connection that it had. "
                "A connection by OpenVPN, SSH or L2TP has a login of its own, which is in its configuration."
            ),
            status=201,
            body=models.ConnectionRequest,
            query=models.Wait,
            answer=models.ConnectionStarted,
            request_example={"server_id": _EXAMPLE_ID, "protocol": "wireguard"},
            answer_example=example,
            refusals={
                403: "The plan's limit is reached, or the account may not use the protocol, or nothing at this time",
                404: "There is no such server",
            },
        ),
        Route(
            method="GET",
            path="/connections",
            access=Access.USER,
            handler=handlers.list_connections,
            summary="List your live connections, with their traffic",
            answer=list[models.LiveConnection],
            answer_example=[
                {
                    **example,
                    "status": "connected",
                    "protocol": "wireguard",
                    "addresses": ["10.66.0.7/32", "fd66:6b79::7/128"],
                    "rx": 1840,
                    "tx": 92410,
                    "latest_handshake": "2025-01-01T12:00:03Z",
                    "refusal": None,
                }
            ],
        ),
        Route(
            method="GET",
            path="/connections/{id}",
            access=Access.USER,
            handler=handlers.get_connection,
            summary="Look at the status of a connection",
            answer=models.ConnectionStatus,
            answer_example=example | {"status": "connected"},
        ),
        Route(
            method="DELETE",
            path="/connections/{id}",
            access=Access.USER,
            handler=handlers.end_connection,
            summary="End a connection",
            query=models.Wait,
            answer=models.Message,
            answer_example={"message": "Connection terminated"},
        ),
        Route(
            method="GET",
            path="/connections/{id}/config",
            access=Access.USER,
            handler=handlers.get_config,
            summary="Get the client's configuration",
            description=(
                "What the protocol's clients read, its fields as JSON, or a QR code, by `format` or the Accept header: "
                "a wg-quick file; an OpenVPN profile with everything inline; a fragment for ssh_config; "
                "what L2TP/IPsec clients ask for."
            ),
            query=models.ConfigChoice,
            answer={
                JSON: models.ConfigFile | models.OpenVpnFile | models.SshFile | models.L2tpFile,
                "text/plain": bytes,
                "application/x-openvpn-profile": bytes,
                "image/svg+xml": bytes,
                "image/png": bytes,
            },
            refusals={406: "None of the accepted media types is served, or no QR code holds so much"},
        ),
    )


def _users(handlers: Skynet) -> tuple[Route, ...]:
    example = {"id": _EXAMPLE_ID, "username": "alice", "email": "alice@example.com", "plan": "pro"}
    return (
        Route(
            method="GET",
            path="/users/me",
            access=Access.USER,
            handler=handlers.get_profile,
            summary="Look at your profile",
            answer=models.Profile,
            answer_example=example | {"created_at": "2025-01-01T12:00:00Z"},
        ),
        Route(
            method="PATCH",
            path="/users/me",
            access=Access.USER,
            auth=True,
            handler=handlers.change_profile,
            summary="Change your e-mail address or password",
            body=models.ProfileChange,
            answer=models.ProfileChanged,
            request_example={"email": "alice@example.com"},
            answer_example=example | {"updated_at": "2025-01-01T12:00:00Z"},
            refusals={403: "The login is not recent and current_password is missing or wrong"},
        ),
    )
