"""What the access room refuses."""

from __future__ import annotations

from controller.errors import DomainError, ErrorKind


class PasswordHashUnavailable(DomainError):
    kind = ErrorKind.UNAVAILABLE
    code = "password_hash_unavailable"
    message = "passwords of SSH and OpenVPN cannot be hashed here: {reason}"
