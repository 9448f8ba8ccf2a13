"""What the tunnels room refuses."""

from __future__ import annotations

from controller.errors import DomainError, ErrorKind


class ConnectionNotFound(DomainError):
    """Unknown, ended or somebody else's: the caller is not told which."""

    kind = ErrorKind.NOT_FOUND
    code = "connection_not_found"
    message = "there is no such connection"


class ServerUnavailable(DomainError):
    kind = ErrorKind.INVALID
    code = "server_unavailable"
    message = "the server's status is {status}; choose another one"


class ProtocolNotOffered(DomainError):
    kind = ErrorKind.INVALID
    code = "protocol_not_offered"
    message = "the server does not offer this protocol; it offers {offered}"


class ProtocolNotAllowed(DomainError):
    kind = ErrorKind.FORBIDDEN
    code = "protocol_not_allowed"
    message = "the account may not use this protocol; it may use {allowed}"


class AccountBlocked(DomainError):
    """It may log in, and see why; it may not connect."""

    kind = ErrorKind.FORBIDDEN
    code = "account_blocked"
    message = "the account may not connect now: {reason}"


class ConnectionLimitReached(DomainError):
    kind = ErrorKind.FORBIDDEN
    code = "connection_limit_reached"
    message = "the plan allows {limit} connections at a time; end one of them or change the plan"


class PublicKeyInUse(DomainError):
    kind = ErrorKind.CONFLICT
    code = "public_key_in_use"
    message = "this public key is in use on the server; make a new key pair"


class AddressesExhausted(DomainError):
    kind = ErrorKind.UNAVAILABLE
    code = "addresses_exhausted"
    message = "the server has no free address; choose another one or try again later"
