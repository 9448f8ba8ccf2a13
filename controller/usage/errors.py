"""What the usage room refuses."""

from __future__ import annotations

from controller.errors import DomainError, ErrorKind


class SessionNotFound(DomainError):
    kind = ErrorKind.NOT_FOUND
    code = "session_not_found"
    message = "no session {id} lives (any more)"
