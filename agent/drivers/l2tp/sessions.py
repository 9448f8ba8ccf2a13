"""What pppd's hooks wrote of each session, and which of them hold an interface; pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b

from agent.drivers.base import LiveSession
from agent.drivers.l2tp.links import PppLink
from agent.drivers.l2tp.processes import Process
from shared.services import L2TP_PORT


@dataclass(frozen=True, slots=True)
class Final:
    """The last counters of a session, as its own pppd noted them."""

    rx: int
    tx: int
    at: int  # Unix seconds


@dataclass(frozen=True, slots=True)
class Record:
    """One session as its pppd told it."""

    boot_id: str
    process: Process
    username: str
    interface: str
    address: str  # the client's inside the tunnel
    remote: str  # the client's outside
    since: int  # Unix seconds
    final: Final | None = None

    @property
    def id(self) -> str:
        """Process numbers and names of interfaces come back; never together with the boot and the time of start."""
        text = f"{self.boot_id} {self.process.pid} {self.process.started} {self.interface}"
        return f"l2tp-{blake2b(text.encode(), digest_size=12).hexdigest()}"

    def session(self, rx: int, tx: int, ended: int = 0) -> LiveSession:
        return LiveSession(
            id=self.id,
            username=self.username,
            # xl2tpd does not tell the client's port: most have the server's.
            remote=f"{self.remote}:{L2TP_PORT}",
            address=self.address,
            since=self.since,
            rx=rx,
            tx=tx,
            interface=self.interface,
            ended=ended,
        )


def parse_record(name: str, text: str, since: int, final: Final | None) -> Record | None:
    """Read a record by its file's name and content; None while the hook still writes it."""
    pid, _, ticks = name.partition("-")
    lines = text.split("\n")
    if len(lines) != 7 or lines[5:] != ["end", ""] or not (pid.isdecimal() and ticks.isdecimal()):
        return None
    boot_id, username, interface, address, remote = lines[:5]
    return Record(boot_id, Process(int(pid), int(ticks)), username, interface, address, remote, since, final)


def parse_final(text: str, at: int) -> Final | None:
    counters, _, end = text.partition("\n")
    received, _, sent = counters.partition(" ")
    if end != "end\n" or not (received.isdecimal() and sent.isdecimal()):
        return None
    return Final(int(received), int(sent), at)


def interfaces(running: Iterable[Record], links: Mapping[str, PppLink]) -> dict[str, PppLink]:
    """The sessions' interfaces by session id. A name that has come back belongs to the youngest of them."""
    holders = {record.interface: record.id for record in sorted(running, key=lambda each: each.process.started)}
    return {id_: links[name] for name, id_ in holders.items() if name in links}
