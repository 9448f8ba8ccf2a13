"""The text of our sshd_config(5) and of the key files, what the latter say, and what sshd's log says; pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from agent.drivers.base import DriverError
from shared.services import SshServer

NOLOGIN = "/usr/sbin/nologin"
LOGIN_GRACE = 30  # seconds until a client has to be in
MISSED_KEEPALIVES = 3
_KEY_OPTIONS = "restrict,port-forwarding "
# Only what sshd says of a login that was right: nothing in such a line is the client's choice.
_ACCEPTED = re.compile(rb"^Accepted (?:password|publickey) for (\S+) from (\S+) port (\d+) ssh2", re.MULTILINE)
_PLAIN = re.compile(r"[A-Za-z0-9_./+@=,-]+")  # needs no quoting, and % would be a token of sshd's


def render(spec: SshServer, *, group: str, host_keys: Iterable[Path], key_directory: Path, pid_file: Path) -> str:
    """Everything that decides who gets in, and what he may do there, is said: no default of another version counts.

    PAM is off: sshd then compares the shadow hash itself (crypt(3) knows yescrypt), refuses an account that is locked
    or past its expiry day for keys as well as for passwords, and a login starts no module of the admin's own stack: no
    second factor, no directory service, no logind session, no mail or motd, and no helper process.

    `MaxSessions 0` refuses every shell, command and subsystem before one is started; forwarding needs no session.
    Remote forwarding is off: it would let a client open ports on the node's loopback addresses.
    """
    spec.check()
    lines = [
        f"Port {spec.port}",
        "AddressFamily any",
        *(f"HostKey {_plain(path)}" for path in host_keys),
        f"PidFile {_plain(pid_file)}",
        "LogLevel INFO",
        "StrictModes yes",
        "UseDNS no",
        "VersionAddendum none",
        # who gets in
        f"AllowGroups {group}",
        "PermitRootLogin no",
        "UsePAM no",
        "AuthenticationMethods any",
        "PasswordAuthentication yes",
        "PermitEmptyPasswords no",
        "PubkeyAuthentication yes",
        f"AuthorizedKeysFile {_plain(key_directory)}/%u",
        "AuthorizedKeysCommand none",
        "AuthorizedPrincipalsFile none",
        "TrustedUserCAKeys none",
        "KbdInteractiveAuthentication no",
        "HostbasedAuthentication no",
        "GSSAPIAuthentication no",
        "KerberosAuthentication no",
        "MaxAuthTries 4",
        f"LoginGraceTime {LOGIN_GRACE}",
        "MaxStartups 100:30:500",
        "PerSourceMaxStartups 50",  # one address alone does not use them up
        # what he may do
        "MaxSessions 0",
        f"ForceCommand {NOLOGIN}",
        "PermitTTY no",
        "PermitUserRC no",
        "PermitUserEnvironment no",
        f"AllowTcpForwarding {'local' if spec.tcp_forwarding else 'no'}",
        "PermitOpen any",
        "PermitListen none",
        "GatewayPorts no",
        "AllowStreamLocalForwarding no",
        "AllowAgentForwarding no",
        "X11Forwarding no",
        f"PermitTunnel {'point-to-point' if spec.tun else 'no'}",
        # how
        "ClientAliveInterval " + str(spec.keepalive),
        f"ClientAliveCountMax {MISSED_KEEPALIVES}",
        "TCPKeepAlive yes",
        "Compression no",
        "RequiredRSASize 2048",
        "HostKeyAlgorithms ssh-ed25519,ecdsa-sha2-nistp256",
        # Taken away from the defaults, so that what a newer sshd prefers is preferred.
        "KexAlgorithms -diffie-hellman-*,ecdh-sha2-*",
        "Ciphers chacha20-poly1305@openssh.com,aes256-gcm@openssh.com,aes128-gcm@openssh.com,aes256-ctr,aes128-ctr",
        "MACs hmac-sha2-256-etm@openssh.com,hmac-sha2-512-etm@openssh.com",
    ]
    return "".join(f"{line}\n" for line in lines)


def render_keys(keys: Iterable[str]) -> str:
    """A file of AuthorizedKeysFile: bare, checked keys, each with options that are ours."""
    return "".join(f"{_KEY_OPTIONS}{key}\n" for key in sorted(keys))


def parse_keys(text: str) -> tuple[str, ...]:
    """The keys of such a file; a line that is not ours comes whole, so that it equals no key."""
    return tuple(line.removeprefix(_KEY_OPTIONS) for line in text.split("\n") if line)


def accepted(log: bytes) -> Iterator[tuple[str, str, int]]:
    """User name, address and port of all clients that were let in."""
    for name, host, port in _ACCEPTED.findall(log):
        yield name.decode(), host.decode(), int(port)


def _plain(path: Path) -> str:
    if not _PLAIN.fullmatch(str(path)):
        raise DriverError(f"sshd cannot be told of {str(path)!r}: use a path of letters, digits and /._+@=,-")
    return str(path)
