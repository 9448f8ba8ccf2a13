"""A client of the fleet with nothing but the ordinary tools: wg-quick, wg, ping."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.host import Host
from tests.support.netns import wait_until

_ANSWERED = re.compile(r"icmp_seq=(\d+) ttl=")
_EVERY = "0.02"  # seconds between two packets


@dataclass(frozen=True, slots=True)
class Transfer:
    """What the client's own interface says of the tunnel."""

    handshake: int
    received: int
    sent: int


class Stream:
    """Pings without a pause; counts what was lost of all that was sent before the last answer."""

    def __init__(self, output: Path) -> None:
        self._output = output

    def answered(self) -> list[int]:
        return [int(number) for number in _ANSWERED.findall(self._output.read_text())]

    def lost(self) -> set[int]:
        answered = set(self.answered())
        return set(range(1, max(answered, default=0) + 1)) - answered

    def flows(self, packets: int = 10) -> None:
        """Wait until so many more packets came back."""
        goal = len(self.answered()) + packets
        wait_until(lambda: len(self.answered()) >= goal, 20)


class Tunnel:
    """`path` names the interface, as it does for wg-quick(8)."""

    def __init__(self, host: Host, path: Path, conf: str) -> None:
        self._host, self._path = host, path
        path.touch(mode=0o600)
        # The namespace's host shares /etc with the machine: its resolver is none of the test's business.
        path.write_text(re.sub(r"^DNS = .*\n", "", conf, flags=re.MULTILINE))

    @property
    def interface(self) -> str:
        return self._path.stem

    def __enter__(self) -> Self:
        self._host.run("wg-quick", "up", str(self._path))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._host.run("wg-quick", "down", str(self._path), check=error is None)

    def restart(self) -> None:
        """A new handshake at once, as after the client's own reconnect."""
        self._host.run("wg-quick", "down", str(self._path))
        self._host.run("wg-quick", "up", str(self._path))

    def reaches(self, address: str) -> bool:
        told = self._host.run("ping", "-n", "-q", "-c", "1", "-W", "0.5", address, check=False)
        return " 1 received" in told

    def transfer(self) -> Transfer:
        dump = self._host.run("wg", "show", self.interface, "dump").splitlines()[1].split("\t")
        return Transfer(handshake=int(dump[4]), received=int(dump[5]), sent=int(dump[6]))

    @contextmanager
    def stream(self, address: str) -> Iterator[Stream]:
        output = self._path.with_suffix(".ping")
        output.write_bytes(b"")
        ping = self._host.start(output, "ping", "-n", "-i", _EVERY, "-W", "5", address)
        stream = Stream(output)
        try:
            stream.flows()
            yield stream
        finally:
            ping.send_signal(signal.SIGINT)
            try:
                ping.wait(10)
            except subprocess.TimeoutExpired:
                ping.kill()
