"""What a contract is made of: routes that declare their access, handlers' calls and replies, and an error envelope."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from controller.accounts.principal import Principal
from controller.accounts.service import Client
from controller.contracts.kit.models import Model

T = TypeVar("T")
JSON = "application/json"


class Access(StrEnum):
    PUBLIC = "public"
    USER = "user"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Failure:
    """A refusal before a contract gives it its shape."""

    status: int
    code: str  # stable, lower case with underscores
    message: str
    details: Mapping[str, str]  # field -> what is wrong with it
    request_id: str


@dataclass(slots=True)
class Reply:
    """`body` is bytes in the given media type, or anything that JSON can say."""

    body: object
    media: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)
    status: int | None = None  # None = the route's


@dataclass(slots=True)
class Call:
    """A request whose access, path, query and body have been checked."""

    contract: str
    address: str  # of the client; empty for one on this machine
    params: Mapping[str, str]
    principal: Principal | None
    headers: Mapping[str, str]
    body: Model | None = None
    query: Model | None = None
    prepared: object = None  # what the route's `prepare` found out

    @property
    def client(self) -> Client:
        return Client(self.address, loggable(self.headers.get("User-Agent", "")))

    @property
    def accept(self) -> str:
        return self.headers.get("Accept", "")

    @property
    def user(self) -> Principal:
        assert self.principal is not None, "the route is public"
        return self.principal

    def body_as(self, model: type[T]) -> T:
        assert isinstance(self.body, model), "the route declares another body"
        return self.body

    def query_as(self, model: type[T]) -> T:
        assert isinstance(self.query, model), "the route declares another query"
        return self.query

    def prepared_as(self, cls: type[T]) -> T:
        assert isinstance(self.prepared, cls), "the route prepares something else"
        return self.prepared


def loggable(text: str) -> str:
    """What a client sent, short, and in characters that every log and database takes."""
    return (text if text.isascii() else text.encode("ascii", "backslashreplace").decode())[:256]


Handler = Callable[[Call], Awaitable[Reply]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One method of one path below the contract's base.

    Several contracts may document the same login or registration. Such a route names in `joint` the body field by which
    its contract knows an account, and splits its work: `prepare` does once what all of them need (check the password),
    the handler what is the contract's own (issue its token). Where a request fits several contracts, the answer is the
    union of their handlers' bodies, and a failure is the union of their envelopes.
    """

    method: str
    path: str  # "/servers/{id}"
    access: Access
    handler: Handler
    summary: str
    answer: Any  # the type of the body, for the description and the tests; bytes by media type where it is a mapping
    status: int = 200
    body: type[Model] | None = None
    query: type[Model] | None = None
    auth: bool = False  # counted against the contract's limit for authentication
    joint: str | None = None
    prepare: Callable[[Call], Awaitable[object]] | None = None
    description: str = ""
    refusals: Mapping[int, str] = field(default_factory=dict)  # status -> when, beyond those of every route
    request_example: object = None
    answer_example: object = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    name: str
    title: str
    description: str
    base: str  # "/api"
    routes: tuple[Route, ...]
    envelope: Callable[[Failure], object]
    error: type[Model]  # what `envelope` makes
    statuses: Mapping[int, int] = field(default_factory=dict)  # status -> the one that this document has for it
    rate_headers: bool = False  # tell what is left of the rate limit (X-RateLimit-*)
