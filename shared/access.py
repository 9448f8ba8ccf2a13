"""Who may use a protocol on a node, how much, and for how long: credentials, limits, leases.

`account` is the account's number everywhere: small on the wire and in memory, and the same in all its credentials.
"""

from __future__ import annotations

import re

import msgspec

from shared.resource import InvalidResource, Kind, Protocol, resource_hash

USERNAME = re.compile(r"[a-z_][a-z0-9_-]{0,30}")  # useradd(8), without the forms that only some programs take
SSH_KEY_TYPES = (
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "ssh-rsa",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
)
FINGERPRINT_BYTES = 32
MAX_SECRET = 255  # bytes; pppd's and crypt(3)'s
MAX_PUBLIC_KEYS = 16
MAX_TUNNEL = 9_999_999
MAX_BYTES = 2**63 - 1
_SSH_KEY = re.compile(r"([a-z0-9@.-]+) ([A-Za-z0-9+/]{40,12000}={0,2})")
_CRYPT = re.compile(r"\$[a-z0-9]{1,8}\$[./A-Za-z0-9$=,]{1,250}")  # crypt(5)


class Limits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an account may use on one node, over all protocols together. 0 = no limit."""

    max_sessions: int = 0
    rate_up: int = 0  # bits per second from the client
    rate_down: int = 0  # bits per second to the client
    metered: bool = False  # it has a byte quota: the node's Lease says how much of it is this node's
    opening: int = 0  # bytes that a metered account may use on a node that holds no lease for it yet

    def check(self) -> None:
        for name in ("max_sessions", "rate_up", "rate_down", "opening"):
            if not 0 <= getattr(self, name) <= MAX_BYTES:
                raise InvalidResource(f"{name} is not between 0 and 2^63 - 1")


NO_LIMITS = Limits()


class Credential(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A login of one protocol. It belongs to an account on all nodes, or to one connection on one node."""

    protocol: Protocol
    username: str
    account: int
    connection: str = ""  # the connection that it was made for
    secret: str = ""  # ssh, openvpn: a crypt(5) hash; l2tp: the password, which CHAP needs; "" = no password fits
    public_keys: tuple[str, ...] = ()  # ssh: bare `type base64`, no options, no comment
    fingerprint: bytes = b""  # openvpn: SHA-256 of the DER of the only client certificate it takes; b"" = by password
    tunnel: int = 0  # ssh: a number that no other login of the fleet has, for its tun device; 0 = it can have none
    not_after: int | None = None  # lease: Unix seconds; the node lets nobody in then, and ends who is
    limits: Limits = NO_LIMITS

    @property
    def key(self) -> str:
        return f"{self.protocol}/{self.username}"

    def check(self) -> None:
        if self.protocol == Protocol.WIREGUARD:
            raise InvalidResource("a WireGuard credential is a peer")
        if not USERNAME.fullmatch(self.username):
            raise InvalidResource(
                f"user name {self.username!r} is not 1 to 31 of a-z 0-9 _ - that begin with a letter or _"
            )
        self.limits.check()
        _CHECKS[self.protocol](self)

    def digest(self) -> int:
        """The hash of what every version's host shows of it; limits and leases are the agent's own."""
        return resource_hash(
            Kind.CREDENTIAL, self.protocol, self.username, self.secret, sorted(self.public_keys), self.fingerprint
        )

    def __repr__(self) -> str:
        return f"Credential({self.key!r}, account={self.account})"


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """How many bytes a metered account may use on this node, by the node's own count, which never falls.

    The count is valid for one `ledger` (the identity of the node's records): a node that lost its disk counts anew.
    """

    account: int
    allowance: int  # rx + tx of all its sessions since the ledger began
    ledger: str

    @property
    def key(self) -> str:
        return str(self.account)

    def check(self) -> None:
        if not 0 <= self.allowance <= MAX_BYTES:
            raise InvalidResource("an allowance is between 0 and 2^63 - 1 bytes")

    def digest(self) -> int:
        return resource_hash(Kind.LEASE, self.account, self.allowance, self.ledger)


class SessionEnd(msgspec.Struct, frozen=True, kw_only=True):
    """A session that must not live on; it goes when the session is reported as ended."""

    session: str

    @property
    def key(self) -> str:
        return self.session

    def check(self) -> None:
        if not 1 <= len(self.session) <= 64 or not self.session.isprintable():
            raise InvalidResource("a session id is 1 to 64 printable characters")

    def digest(self) -> int:
        return resource_hash(Kind.SESSION_END, self.session)


def parse_ssh_key(text: str) -> str:
    """The bare `type base64` of one public key line without options; a comment is dropped. Raise InvalidResource."""
    kind, _, rest = text.strip(" ").partition(" ")
    bare = f"{kind} {rest.strip(' ').partition(' ')[0]}"
    if not text.isprintable():
        raise InvalidResource("an SSH public key is one line")
    _check_ssh_key(bare)
    return bare


def _check_ssh_key(text: str) -> None:
    found = _SSH_KEY.fullmatch(text)
    if found is None or found[1] not in SSH_KEY_TYPES:
        raise InvalidResource(
            f"an SSH public key is `type base64`, and its type one of {', '.join(sorted(SSH_KEY_TYPES))}"
        )


def _check_hash(credential: Credential) -> None:
    if credential.secret and not _CRYPT.fullmatch(credential.secret):
        raise InvalidResource("the secret is not a password hash of crypt(5)")


def _check_ssh(credential: Credential) -> None:
    _check_hash(credential)
    if len(credential.public_keys) > MAX_PUBLIC_KEYS:
        raise InvalidResource(f"a login has at most {MAX_PUBLIC_KEYS} public keys")
    for key in credential.public_keys:
        _check_ssh_key(key)
    if not credential.secret and not credential.public_keys:
        raise InvalidResource("an SSH login needs a password or a public key")
    if not 0 <= credential.tunnel <= MAX_TUNNEL:
        raise InvalidResource(f"the number of a tunnel is not between 0 and {MAX_TUNNEL}")


def _check_openvpn(credential: Credential) -> None:
    _check_hash(credential)
    if credential.fingerprint and len(credential.fingerprint) != FINGERPRINT_BYTES:
        raise InvalidResource("a fingerprint is 32 bytes")
    if not credential.secret and not credential.fingerprint:
        raise InvalidResource("an OpenVPN login needs a password or a certificate")


def _check_l2tp(credential: Credential) -> None:
    if not check_chap_secret(credential.secret):
        raise InvalidResource(f"an L2TP password is 1 to {MAX_SECRET} printable ASCII characters")


def check_chap_secret(secret: str) -> bool:
    """Whether pppd and every client take it alike (MS-CHAPv2 says nothing of other characters, RFC 2759)."""
    return 1 <= len(secret) <= MAX_SECRET and secret.isascii() and secret.isprintable()


_CHECKS = {Protocol.SSH: _check_ssh, Protocol.OPENVPN: _check_openvpn, Protocol.L2TP: _check_l2tp}
