"""Our lines in the texts of /etc/passwd and /etc/shadow (passwd(5), shadow(5)); pure.

Ours are those with a uid of our range, our group, and our mark: all three. Every other line is kept byte by byte.
Behind the mark is the number of the login's tun device, so that the device can be made anew by what the host knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

from agent.drivers.ssh.config import NOLOGIN

GROUP = "skynetvpn-ssh"
GID = 1_900_000_000
# No allocator of Debian gives these away: login.defs ends at 60000, subordinate ids at 600100000, systemd (dynamic
# users, containers) at 1879048191; https://systemd.io/UIDS-GIDS.
UIDS = range(GID + 1, GID + 1_000_000)
_MARK = "SkynetVPN tunnel login"
_NO_PASSWORD = "*"  # noqa: S105  no hash, and not `!`, which sshd takes for a locked account, keys included


@dataclass(frozen=True, slots=True)
class Login:
    """One account. `secret` is a crypt(5) hash, or "" where no password fits."""

    name: str
    uid: int
    secret: str
    changed: int = 0  # day since 1970 on which the password was set; sshd wants it to be other than 0
    last_day: int | None = None  # day since 1970, the last on which it may log in
    tunnel: int = 0  # the number of its tun device

    def __repr__(self) -> str:
        return f"Login({self.name!r}, uid={self.uid})"


@dataclass(frozen=True, slots=True)
class Accounts:
    """What both files say."""

    ours: Mapping[str, Login]
    foreign: Set[str]  # all other names of passwd
    uids: Set[int]  # of everybody


def parse(passwd: str, shadow: str) -> Accounts:
    hashes = {fields[0]: fields for fields in _lines(shadow)}
    ours: dict[str, Login] = {}
    foreign: set[str] = set()
    uids: set[int] = set()
    for fields in _lines(passwd):
        if len(fields) > 2 and fields[2].isdecimal():
            uids.add(int(fields[2]))
        if _is_ours(fields):
            ours[fields[0]] = _login(fields, hashes.get(fields[0], []))
        else:
            foreign.add(fields[0])
    return Accounts({name: login for name, login in ours.items() if name not in foreign}, foreign, uids)


def replace(text: str, lines: Mapping[str, str | None]) -> str:
    """The text with these names' lines changed, added at its end, or (None) left out."""
    missing = dict(lines)
    kept: list[str] = []
    for line in text.split("\n"):
        name = line.partition(":")[0]
        wanted = missing.pop(name, None) if name in lines else line  # a name's second line goes
        if wanted is not None:
            kept.append(wanted)
    while kept and not kept[-1]:
        kept.pop()
    kept += [line for line in missing.values() if line is not None]
    return "\n".join(kept) + "\n"


def passwd_line(login: Login) -> str:
    mark = f"{_MARK},{login.tunnel}" if login.tunnel else _MARK
    return f"{login.name}:x:{login.uid}:{GID}:{mark}:/nonexistent:{NOLOGIN}"


def shadow_line(login: Login) -> str:
    last = "" if login.last_day is None else login.last_day
    return f"{login.name}:{login.secret or _NO_PASSWORD}:{login.changed}:::::{last}:"


def _lines(text: str) -> Iterator[list[str]]:
    return (line.split(":") for line in text.split("\n") if line)


def _is_ours(fields: list[str]) -> bool:
    if len(fields) != 7 or not fields[2].isdecimal():
        return False
    return int(fields[2]) in UIDS and fields[3] == str(GID) and fields[4].partition(",")[0] == _MARK


def _login(fields: list[str], shadow: list[str]) -> Login:
    shadow = [*shadow, *[""] * (9 - len(shadow))]
    tunnel = fields[4].partition(",")[2]
    return Login(
        name=fields[0],
        uid=int(fields[2]),
        secret="" if shadow[1] == _NO_PASSWORD else shadow[1],
        changed=int(shadow[2]) if shadow[2].isdecimal() else 0,
        last_day=int(shadow[7]) if shadow[7].isdecimal() else None,
        tunnel=int(tunnel) if tunnel.isdecimal() else 0,
    )
