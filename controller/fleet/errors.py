"""What the fleet refuses."""

from __future__ import annotations

from controller.errors import DomainError, ErrorKind, Unusable


class AuthorityUnusable(Unusable):
    """The files of the certificate authority are missing, damaged or readable by others; the text says what to do."""


class JoinTokenRefused(DomainError):
    """Unknown, used, expired or mistyped: the caller is not told which."""

    kind = ErrorKind.UNAUTHENTICATED
    code = "join_token_refused"
    message = "the join token is not valid (any more); ask the administrator for a new one"


class CertificateRequestInvalid(DomainError):
    kind = ErrorKind.INVALID
    code = "certificate_request_invalid"
    message = "the certificate request cannot be used: {reason}"


class WireGuardKeyTaken(DomainError):
    kind = ErrorKind.CONFLICT
    code = "wireguard_key_taken"
    message = "this WireGuard public key belongs to another node; let the host make a key of its own"


class WireGuardKeyInvalid(DomainError):
    kind = ErrorKind.INVALID
    code = "wireguard_key_invalid"
    message = "the WireGuard public key is not 32 bytes, or all zero"


class CertificateRefused(DomainError):
    """A certificate of ours that is not in use: of a node that is gone, or from before its latest enrolment."""

    kind = ErrorKind.UNAUTHENTICATED
    code = "certificate_refused"
    message = "this certificate is not in use (any more); enrol the node again with a new join token"


class NodeDisabled(DomainError):
    kind = ErrorKind.FORBIDDEN
    code = "node_disabled"
    message = "the node is disabled; its administrator has to enable it"


class NodeLocked(DomainError):
    """Two hosts have used this node's identity."""

    kind = ErrorKind.FORBIDDEN
    code = "node_locked"
    message = "the node is locked, its identity was used by two hosts; enrol it again with a new join token"


class NodeNotFound(DomainError):
    kind = ErrorKind.NOT_FOUND
    code = "node_not_found"
    message = "there is no node {name!r}"


class NodeInService(DomainError):
    kind = ErrorKind.CONFLICT
    code = "node_in_service"
    message = "the node {name!r} is {status}; disable it before it is deleted: its host has to be stopped first"


class ServerNotFound(DomainError):
    """No server that this account may use."""

    kind = ErrorKind.NOT_FOUND
    code = "server_not_found"
    message = "there is no such server"


class UnknownProtocol(DomainError):
    kind = ErrorKind.NOT_FOUND
    code = "protocol_not_found"
    message = "there is no protocol {name!r}"


class NothingToConfirm(DomainError):
    kind = ErrorKind.CONFLICT
    code = "nothing_to_confirm"
    message = "the node {name!r} has refused no snapshot"
