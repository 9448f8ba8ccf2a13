"""Refusals: one table from kinds to statuses, and the problems that only HTTP has."""

from __future__ import annotations

from collections.abc import Mapping

from controller.contracts.kit.contract import Failure
from controller.errors import DomainError, ErrorKind, InvalidInput

STATUSES: Mapping[ErrorKind, int] = {
    ErrorKind.INVALID: 400,
    ErrorKind.UNAUTHENTICATED: 401,
    ErrorKind.FORBIDDEN: 403,
    ErrorKind.NOT_FOUND: 404,
    ErrorKind.CONFLICT: 409,
    ErrorKind.EXHAUSTED: 429,
    ErrorKind.UNAVAILABLE: 503,
}
RETRY_AFTER = 5  # seconds, where the refusal does not say


class AdminsOnly(DomainError):
    kind = ErrorKind.FORBIDDEN
    code = "admins_only"
    message = "this needs the admin role"


class RateLimited(DomainError):
    kind = ErrorKind.EXHAUSTED
    code = "rate_limited"
    message = "too many requests; try again in {retry_after} seconds"


class HttpProblem(Exception):
    """A request that no use case has seen."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers or {}


def no_such_path() -> HttpProblem:
    return HttpProblem(404, "not_found", "there is nothing at this path")


def malformed() -> HttpProblem:
    return HttpProblem(400, "malformed_request", "this is not a request of HTTP/1.1")


def method_not_allowed(methods: set[str]) -> HttpProblem:
    allowed = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
    return HttpProblem(405, "method_not_allowed", f"this path answers {allowed} only", {"Allow": allowed})


def not_acceptable(*offers: str) -> HttpProblem:
    return HttpProblem(406, "not_acceptable", f"this is not served; ask for {' or '.join(offers)}")


def body_too_slow(seconds: float) -> HttpProblem:
    return HttpProblem(408, "request_timeout", f"the body did not arrive within {seconds:g} seconds")


def body_too_large(limit: int) -> HttpProblem:
    return HttpProblem(413, "body_too_large", f"a body may have at most {limit} bytes")


def not_json() -> HttpProblem:
    return HttpProblem(415, "unsupported_media_type", "send the body as application/json, not encoded further")


def failure_from(error: Exception, request_id: str) -> tuple[Failure, dict[str, str]]:
    """The refusal, and the headers that belong to it. What nobody foresaw is told without details."""
    if isinstance(error, HttpProblem):
        return Failure(error.status, error.code, error.message, {}, request_id), dict(error.headers)
    if not isinstance(error, DomainError):
        return Failure(500, "server_error", "internal server error", {}, request_id), {}
    headers = {}
    if error.kind is ErrorKind.UNAUTHENTICATED:
        headers["WWW-Authenticate"] = "Bearer"
    elif error.kind in (ErrorKind.EXHAUSTED, ErrorKind.UNAVAILABLE):
        headers["Retry-After"] = str(error.params.get("retry_after", RETRY_AFTER))
    details = error.problems if isinstance(error, InvalidInput) else {}
    return Failure(STATUSES[error.kind], error.code, str(error), details, request_id), headers
