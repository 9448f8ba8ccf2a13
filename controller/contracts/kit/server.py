"""The one HTTP handler of the public API: everything between the connection and a contract's handler, in order."""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

import orjson
import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry

from controller.accounts.errors import InvalidToken
from controller.accounts.principal import Principal, Role
from controller.config import RateLimit
from controller.contracts.kit import failures
from controller.contracts.kit.accesslog import AccessLog
from controller.contracts.kit.answer import Answer
from controller.contracts.kit.clients import client_address
from controller.contracts.kit.contract import JSON, Access, Call, Contract, Reply, Route, loggable
from controller.contracts.kit.docs import Page, pages
from controller.contracts.kit.limits import RateLimits
from controller.contracts.kit.listener import Handle, Listener
from controller.contracts.kit.models import Model, fields_of, parse_body, parse_query
from controller.contracts.kit.resolve import Candidate, Resolver, settle
from controller.contracts.kit.timings import Timings
from controller.errors import InvalidInput
from controller.log import request_id_var
from controller.ratelimit import Budget
from shared.addresses import Network

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_CORS_SECONDS = "600"

_HEADERS = {"Content-Type": JSON, "Cache-Control": "no-store"}  # what a token or a login brought stays in no cache

log = structlog.get_logger()


class Authenticator(Protocol):
    def known(self, token: str) -> Principal | None: ...

    async def authenticate(self, token: str) -> Principal: ...


@dataclass(frozen=True, slots=True)
class HttpSettings:
    hosts: Mapping[str, str] = field(default_factory=dict)  # host name -> contract
    defaults: Mapping[str, str] = field(default_factory=lambda: {"/api": "skynet", "/api/v1": "prime"})
    rate_limits: Mapping[str, RateLimit] = field(default_factory=dict)  # by contract
    trusted_proxies: tuple[Network, ...] = ()
    cors_origins: frozenset[str] = frozenset()
    max_body: int = 1024 * 1024  # bytes
    max_body_unauthenticated: int = 64 * 1024  # of a caller whom no token has named
    body_seconds: float = 10.0  # that a body may take to arrive


@dataclass(slots=True)
class _Exchange:
    """What is known of a request so far; its error, whenever it comes, is told by `chosen`."""

    request: web.BaseRequest
    request_id: str
    address: str = ""
    chosen: tuple[Candidate, ...] = ()
    principal: Principal | None = None
    raw: bytes | None = None
    budget: Budget | None = None


class Api:
    """The contracts and their documentation, on every path that has no handler of its own in `operations`."""

    def __init__(
        self,
        contracts: Sequence[Contract],
        authenticator: Authenticator,
        settings: HttpSettings,
        registry: CollectorRegistry,
        access_log: AccessLog,
        operations: Mapping[str, Handle] = MappingProxyType({}),
    ) -> None:
        self._resolver = Resolver(contracts, settings.hosts, settings.defaults)
        self._authenticator = authenticator
        self._settings = settings
        self._limits = RateLimits(settings.rate_limits, {item.name: item.rate_headers for item in contracts})
        self._pages = pages(contracts)
        self._process = secrets.token_hex(6)
        self._numbers = itertools.count(1)
        self._timings = Timings()
        registry.register(self._timings)
        self._access_log = access_log
        self._operations = operations

    def listener(self, **options: Any) -> web.Server:
        """What accepts connections; `options` are those of aiohttp's connections."""
        return Listener(self._handle, self._malformed, self._access_log.flush, **options)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        started = time.perf_counter()
        path = request.rel_url.raw_path
        if path in self._operations and request.method in ("GET", "HEAD"):
            return await self._operations[path](request)
        if "Expect" in request.headers:
            _expect(request)
        exchange = self._begin(request)
        page = self._pages.get(path)
        if page is not None:
            response = self._show(page, exchange)
        elif (preflight := self._preflight(request)) is not None:
            response = preflight
        else:
            try:
                response = self._answer(await self._serve(exchange))
            except Exception as error:  # the last border: whatever it is, the caller gets his contract's envelope
                response = self._refuse(exchange, error)
        self._finish(exchange, response, time.perf_counter() - started)
        return response

    def _malformed(self, request: web.BaseRequest) -> Answer:
        """Nothing is known of it, not even whom it was for: the contract that answers for unknown paths tells."""
        exchange = _Exchange(request, self._new_request_id(), chosen=self._resolver.choose("GET", "/", "", "")[:1])
        response = self._refuse(exchange, failures.malformed())
        response.fields["X-Request-ID"] = exchange.request_id
        self._timings.observe(("none", "none", "other", response.status), 0.0)
        return response

    def _new_request_id(self) -> str:
        return f"{self._process}-{next(self._numbers):x}"

    def _begin(self, request: web.BaseRequest) -> _Exchange:
        given = request.headers.get("X-Request-ID")
        request_id = given if given is not None and _REQUEST_ID.fullmatch(given) else self._new_request_id()
        request_id_var.set(request_id)
        trusted = self._settings.trusted_proxies
        forwarded = request.headers.getall("X-Forwarded-For", ()) if trusted else ()
        return _Exchange(request, request_id, client_address(request.remote, forwarded, trusted))

    def _answer(self, reply: Reply) -> Answer:
        body = reply.body if isinstance(reply.body, bytes) else orjson.dumps(reply.body)
        response = Answer(body, reply.status or 200, _HEADERS)
        if reply.media != JSON:
            response.fields["Content-Type"] = reply.media
        if reply.headers:
            response.fields.update(reply.headers)
        return response

    async def _serve(self, exchange: _Exchange) -> Reply:
        request, settings = exchange.request, self._settings
        headers = request.headers
        candidates = self._resolver.choose(
            request.method, request.rel_url.raw_path, headers.get("Host", ""), headers.get("Accept", "")
        )
        exchange.chosen = candidates[:1]
        if (request.content_length or 0) > settings.max_body:
            raise failures.body_too_large(settings.max_body)
        if len(candidates) > 1:
            exchange.chosen = await self._settle(exchange, candidates)
        for candidate in exchange.chosen:
            auth = candidate.route is not None and candidate.route.auth
            exchange.budget = self._limits.count(candidate.contract.name, exchange.address, auth=auth)
            _check_path(candidate)
        calls = []
        for candidate in exchange.chosen:
            calls.append(await self._call(exchange, candidate))
        route, call = calls[0]
        if route.prepare is not None:
            call.prepared = await route.prepare(call)
        reply = await _run(route, call)
        for other_route, other_call in calls[1:]:
            other_call.prepared = call.prepared
            reply = _union(reply, await _run(other_route, other_call))
        return reply

    async def _settle(self, exchange: _Exchange, candidates: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
        fields: frozenset[str] = frozenset()
        token_contract = None
        if any(candidate.route is not None and candidate.route.joint for candidate in candidates):
            # Until the body says more, a refusal is told to all whose login this could be.
            exchange.chosen = settle(candidates, None, {candidates[0].route.joint or ""} if candidates[0].route else ())
            exchange.raw = await self._read(exchange)
            fields = fields_of(exchange.raw)
        elif "Authorization" in exchange.request.headers:
            try:
                exchange.principal = await self._authenticate(exchange.request)
                token_contract = exchange.principal.contract
            except InvalidToken:
                pass  # told by the contract that the default chooses, once its route asks for a token
        chosen = settle(candidates, token_contract, fields)
        if len(chosen) == 1 or exchange.raw is None:
            return chosen
        exchange.chosen = chosen
        fitting = [candidate for candidate in chosen if _fits(candidate, exchange.raw)]
        return tuple(fitting) or chosen

    async def _call(self, exchange: _Exchange, candidate: Candidate) -> tuple[Route, Call]:
        """Check access, body and query."""
        route, request = candidate.route, exchange.request
        assert route is not None, "_check_path has refused it"
        if route.access is not Access.PUBLIC:
            if exchange.principal is None:
                exchange.principal = await self._authenticate(request)
            if route.access is Access.ADMIN and exchange.principal.role is not Role.ADMIN:
                raise failures.AdminsOnly
        call = Call(candidate.contract.name, exchange.address, candidate.params, exchange.principal, request.headers)
        if route.body is not None:
            if exchange.raw is None:
                exchange.raw = await self._read(exchange)
            call.body = parse_body(route.body, exchange.raw)
        if route.query is not None:
            call.query = parse_query(route.query, request.rel_url.raw_query_string)
        return route, call

    async def _authenticate(self, request: web.BaseRequest) -> Principal:
        values = request.headers.getall("Authorization", ())
        if len(values) != 1 or values[0][:7].lower() != "bearer ":
            raise InvalidToken
        token = values[0][7:].strip(" ")
        return self._authenticator.known(token) or await self._authenticator.authenticate(token)

    async def _read(self, exchange: _Exchange) -> bytes:
        request, settings = exchange.request, self._settings
        limit = settings.max_body_unauthenticated if exchange.principal is None else settings.max_body
        if (request.content_length or 0) > limit:
            raise failures.body_too_large(limit)
        media = request.content_type
        if request.body_exists and (
            not (media == JSON or (media.startswith("application/") and media.endswith("+json")))
            or request.headers.get("Content-Encoding", "identity").lower() != "identity"
        ):
            raise failures.not_json()
        chunks, size = [], 0
        try:
            async with asyncio.timeout(settings.body_seconds):
                async for chunk in request.content.iter_any():
                    size += len(chunk)
                    if size > limit:
                        raise failures.body_too_large(limit)
                    chunks.append(chunk)
        except TimeoutError:
            raise failures.body_too_slow(settings.body_seconds) from None
        except (web.RequestPayloadError, ConnectionError, ValueError):
            raise InvalidInput({"body": "did not arrive whole"}) from None
        return b"".join(chunks)

    def _refuse(self, exchange: _Exchange, error: Exception) -> Answer:
        failure, headers = failures.failure_from(error, exchange.request_id)
        if failure.status == 500:
            contract_name, route = _names(exchange)
            log.error("http.failed", contract=contract_name, route=route, exc_info=error)
        contracts = [candidate.contract for candidate in exchange.chosen]
        body: object = None
        status = failure.status
        for contract in reversed(contracts):
            status = contract.statuses.get(failure.status, failure.status)
            told = contract.envelope(failure if status == failure.status else replace(failure, status=status))
            body = merged(told, body) if body is not None else told
        response = Answer(orjson.dumps(body), status, _HEADERS | headers)
        if status in (408, 413):
            response.force_close()  # the rest of the body is not waited for
        return response

    def _show(self, page: Page, exchange: _Exchange) -> Answer:
        if exchange.request.method in ("GET", "HEAD"):
            return Answer(page.body, 200, page.headers)
        return Answer(b"", 405, {"Allow": "GET, HEAD"})

    def _preflight(self, request: web.BaseRequest) -> Answer | None:
        if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
            return None
        if request.headers.get("Origin", "") not in self._settings.cors_origins:
            return None
        return Answer(
            b"",
            204,
            {
                "Access-Control-Allow-Methods": ", ".join(_METHODS),
                "Access-Control-Allow-Headers": "Accept, Authorization, Content-Type, X-Request-ID",
                "Access-Control-Max-Age": _CORS_SECONDS,
            },
        )

    def _finish(self, exchange: _Exchange, response: Answer, seconds: float) -> None:
        request, headers = exchange.request, response.fields
        headers["X-Request-ID"] = exchange.request_id
        if self._settings.cors_origins:
            headers["Vary"] = "Origin"
            if (origin := request.headers.get("Origin", "")) in self._settings.cors_origins:
                headers["Access-Control-Allow-Origin"] = origin
                headers["Access-Control-Expose-Headers"] = "X-Request-ID, Retry-After"
        if (budget := exchange.budget) is not None:
            headers["X-RateLimit-Limit"] = str(budget.limit)
            headers["X-RateLimit-Remaining"] = str(budget.remaining)
            headers["X-RateLimit-Reset"] = str(round(budget.reset_at))
        contract, route = _names(exchange)
        method = request.method if request.method in _METHODS else "other"
        status = response.status
        self._timings.observe((contract, route, method, status), seconds)
        self._access_log.add(
            {
                "contract": contract,
                "method": method,
                "path": loggable(request.rel_url.raw_path),
                "route": route,
                "status": status,
                "ms": round(seconds * 1000, 3),
                "client": exchange.address,
                "user_id": exchange.principal.user_id if exchange.principal is not None else None,
                "event": "http.request",
                "request_id": exchange.request_id,
            }
        )
        if status >= 500:
            self._access_log.flush()


def merged(first: Any, second: Any) -> Any:
    """The union of two bodies; where both say something of the same name, the first is kept."""
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return first
    return second | {key: merged(value, second[key]) if key in second else value for key, value in first.items()}


async def _run(route: Route, call: Call) -> Reply:
    reply = await route.handler(call)
    return reply if reply.status is not None or route.status == 200 else replace(reply, status=route.status)


def _union(first: Reply, second: Reply) -> Reply:
    return replace(first, body=merged(first.body, second.body), headers={**second.headers, **first.headers})


def _check_path(candidate: Candidate) -> None:
    if not candidate.served:
        raise failures.not_acceptable(f"application/vnd.{candidate.contract.name}.v1+json")
    if candidate.route is None:
        raise failures.method_not_allowed(set(candidate.allowed)) if candidate.allowed else failures.no_such_path()


def _fits(candidate: Candidate, raw: bytes) -> bool:
    model: type[Model] | None = candidate.route.body if candidate.route is not None else None
    try:
        return model is None or parse_body(model, raw) is not None
    except InvalidInput:
        return False


def _names(exchange: _Exchange) -> tuple[str, str]:
    """Of the contract and the route, for whoever watches."""
    if not exchange.chosen:
        return "none", "none"
    first = exchange.chosen[0]
    return first.contract.name, first.label


def _expect(request: web.BaseRequest) -> None:
    if request.headers["Expect"].lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
