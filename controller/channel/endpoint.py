"""The node port: the CA to pin, enrolment, and the channel. Nothing here knows users or their tokens."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from ipaddress import ip_address

import msgspec
import structlog
from aiohttp import web
from cryptography import x509

from controller.channel.connection import FAREWELL
from controller.channel.hub import Hub
from controller.channel.pace import Act
from controller.errors import DomainError, ErrorKind
from controller.fleet import certificates
from controller.fleet.ca import Authority
from controller.fleet.identities import Identities
from controller.ratelimit import Limit, WindowStorage
from shared.addresses import rate_limit_key
from shared.protocol import (
    CA_PATH,
    CHANNEL_PATH,
    ENROL_PATH,
    MAX_FRAME_BYTES,
    EnrolRefusal,
    EnrolRequest,
)

MAX_BODY = 64 * 1024
_BODY_DEADLINE = 10.0  # seconds
_HEARTBEAT = 20.0
_MEDIA_TYPE = "application/msgpack"
_STATUS = {
    ErrorKind.INVALID: 400,
    ErrorKind.UNAUTHENTICATED: 401,
    ErrorKind.FORBIDDEN: 403,
    ErrorKind.NOT_FOUND: 404,
    ErrorKind.CONFLICT: 409,
    ErrorKind.EXHAUSTED: 429,
    ErrorKind.UNAVAILABLE: 503,
}

log = structlog.get_logger()


class TooManyEnrolments(DomainError):
    kind = ErrorKind.EXHAUSTED
    code = "too_many_enrolments"
    message = "too many enrolments from this address; try again in a minute"


class EnrolmentMalformed(DomainError):
    kind = ErrorKind.INVALID
    code = "enrolment_malformed"
    message = "the body is not an enrolment request"


class CertificateMissing(DomainError):
    kind = ErrorKind.UNAUTHENTICATED
    code = "certificate_missing"
    message = "the channel needs a node's certificate; enrol this host with a join token"


class Endpoint:
    def __init__(self, hub: Hub, identities: Identities, authority: Authority, enrolments_per_minute: int) -> None:
        self._hub = hub
        self._identities = identities
        self._authority = authority
        self._limit = Limit("enrol", enrolments_per_minute, 60, WindowStorage())

    async def ca(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._authority.bundle, content_type="application/x-pem-file")

    async def enrol(self, request: web.Request) -> web.Response:
        address = _address(request)
        if not self._limit.hit(rate_limit_key(address)):
            raise TooManyEnrolments
        try:
            async with asyncio.timeout(_BODY_DEADLINE):
                wanted = msgspec.msgpack.decode(await request.read(), type=EnrolRequest)
        except (msgspec.DecodeError, UnicodeDecodeError, TimeoutError, web.RequestPayloadError) as error:
            raise EnrolmentMalformed from error
        answer = await self._identities.enrol(wanted, address)
        return web.Response(body=msgspec.msgpack.encode(answer), content_type=_MEDIA_TYPE)

    async def channel(self, request: web.Request) -> web.StreamResponse:
        identity = _identity(request)
        if identity is None:
            raise CertificateMissing
        self._hub.pace.check(identity.node_id, Act.CONNECT)  # admission is a transaction
        node = await self._identities.admit(identity)
        socket = web.WebSocketResponse(
            heartbeat=_HEARTBEAT, timeout=FAREWELL, compress=False, max_msg_size=MAX_FRAME_BYTES
        )
        await socket.prepare(request)
        if request.transport is not None:
            await self._hub.serve(socket, request.transport, node, identity.expires_at, _address(request))
        return socket


def node_application(
    hub: Hub, identities: Identities, authority: Authority, *, enrolments_per_minute: int = 30
) -> web.Application:
    """The application of the node port; serve it with ChannelTls."""
    endpoint = Endpoint(hub, identities, authority, enrolments_per_minute)
    application = web.Application(client_max_size=MAX_BODY, middlewares=[_refusals])

    async def close_sessions(_application: web.Application) -> None:
        await hub.close()

    application.on_shutdown.append(close_sessions)
    application.router.add_get(CA_PATH, endpoint.ca)
    application.router.add_post(ENROL_PATH, endpoint.enrol)
    application.router.add_get(CHANNEL_PATH, endpoint.channel)
    return application


@web.middleware
async def _refusals(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except DomainError as error:
        if error.kind in (ErrorKind.UNAUTHENTICATED, ErrorKind.FORBIDDEN):
            log.warning("channel.request_refused", path=request.path, address=_address(request), code=error.code)
        return _refusal(_STATUS[error.kind], error.code, str(error))
    except web.HTTPRequestEntityTooLarge:
        return _refusal(413, "too_large", f"a request is at most {MAX_BODY} bytes")


def _refusal(status: int, code: str, message: str) -> web.Response:
    body = msgspec.msgpack.encode(EnrolRefusal(code=code, message=message))
    return web.Response(status=status, body=body, content_type=_MEDIA_TYPE)


def _identity(request: web.Request) -> certificates.Identity | None:
    """Who the connection's certificate names; TLS has verified it already."""
    connection = request.transport.get_extra_info("ssl_object") if request.transport is not None else None
    if not isinstance(connection, ssl.SSLObject):
        return None
    encoded = connection.getpeercert(binary_form=True)
    return certificates.identity_from(x509.load_der_x509_certificate(encoded)) if encoded else None


def _address(request: web.Request) -> str:
    if request.remote is None:
        raise web.HTTPBadRequest
    address = ip_address(request.remote)
    return str(getattr(address, "ipv4_mapped", None) or address)
