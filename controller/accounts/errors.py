"""What accounts refuse."""

from __future__ import annotations

from controller.errors import DomainError, ErrorKind


class InvalidCredentials(DomainError):
    """The same for an unknown account, a wrong password and a deactivated account."""

    kind = ErrorKind.UNAUTHENTICATED
    code = "invalid_credentials"
    message = "the user name or the password is wrong"


class InvalidToken(DomainError):
    kind = ErrorKind.UNAUTHENTICATED
    code = "invalid_token"
    message = "the token is missing, wrong or has ended; log in again"


class TooManyAttempts(DomainError):
    kind = ErrorKind.EXHAUSTED
    code = "too_many_attempts"
    message = "too many failed attempts; try again in {retry_after} seconds"


class PasswordsBusy(DomainError):
    kind = ErrorKind.UNAVAILABLE
    code = "passwords_busy"
    message = "too many logins at this moment; try again in {retry_after} seconds"


class PasswordNeeded(DomainError):
    kind = ErrorKind.FORBIDDEN
    code = "password_needed"
    message = "this login is not recent: give current_password, or log in again"


class WrongPassword(DomainError):
    kind = ErrorKind.FORBIDDEN
    code = "wrong_password"
    message = "current_password is wrong"


class UsernameTaken(DomainError):
    kind = ErrorKind.CONFLICT
    code = "username_taken"
    message = "username: another account has it"


class EmailTaken(DomainError):
    kind = ErrorKind.CONFLICT
    code = "email_taken"
    message = "email: another account has it"


class UserNotFound(DomainError):
    kind = ErrorKind.NOT_FOUND
    code = "user_not_found"
    message = "there is no such user"


class LastAdmin(DomainError):
    kind = ErrorKind.CONFLICT
    code = "last_admin"
    message = "this is the only administrator; make another one first"
