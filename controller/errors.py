"""The root of the errors that a room raises: kind, stable code, parameters; how it is told is a contract's matter."""

from __future__ import annotations

from enum import StrEnum


class ErrorKind(StrEnum):
    INVALID = "invalid"  # the request cannot be right
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"  # a known account that lacks the role, plan or quota
    NOT_FOUND = "not_found"  # also for a record of somebody else
    CONFLICT = "conflict"
    EXHAUSTED = "exhausted"  # too many requests; `retry_after` says when
    UNAVAILABLE = "unavailable"  # this server cannot do it now; `retry_after` says when


class Unusable(Exception):
    """What the controller needs on this machine is missing, damaged or taken; the text says what to do."""


class DomainError(Exception):
    """A refusal that the caller can act on.

    Subclasses set `kind`, `code` (stable, lower case with underscores) and `message`, a template for the parameters:
    what is wrong and what to do, lower case, no full stop.
    """

    kind: ErrorKind
    code: str
    message: str

    def __init__(self, **params: object) -> None:
        self.params = params
        super().__init__(self.message.format(**params))

    def explain(self) -> str:
        """For the operator: all that is known, where an answer to anybody says less."""
        return str(self)


class InvalidInput(DomainError):
    """One or more fields are wrong; `problems` names each by its path."""

    kind = ErrorKind.INVALID
    code = "invalid_input"
    message = "{summary}"

    def __init__(self, problems: dict[str, str]) -> None:
        self.problems = problems
        super().__init__(summary="; ".join(f"{field}: {reason}" for field, reason in problems.items()))
