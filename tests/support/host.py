"""A host for several programs: a network namespace, and a mount namespace with a /run/wireguard and boot id of its own.

What is mounted inside is seen inside only, and is gone with the host.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.netns import Namespace, Running, wait_until

SECONDS = 60.0 * int(os.environ.get("SKYNETVPN_TEST_SLOWDOWN", "1"))


class Host:
    def __init__(self, name: str) -> None:
        self.namespace = Namespace(name)

    def __enter__(self) -> Self:
        self.namespace.__enter__()
        try:
            self._holder = self.namespace.popen(
                sys.executable, "-m", "tests.support.ownrun", "sleep", "infinity", stdin=subprocess.DEVNULL
            )
            wait_until(lambda: self._program() == "sleep", 30)
        except BaseException:
            self.namespace.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.namespace.close()

    @property
    def root(self) -> Path:
        """The host's files as this process sees them."""
        return Path(f"/proc/{self.holder}/root")

    @property
    def holder(self) -> int:
        """The process that keeps the host's namespaces."""
        return self._holder.pid

    def run(self, *argv: str, stdin: str | None = None, timeout: float = SECONDS, check: bool = True) -> str:
        return self.namespace.run(*self._inside(argv), stdin=stdin, timeout=timeout, check=check)

    def start(self, log: Path, *argv: str, env: Mapping[str, str] | None = None) -> Running:
        """Start a program that appends what it says to `log`; it ends with the host at the latest."""
        with log.open("ab") as output:
            return self.namespace.popen(
                *self._inside(argv), env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def _inside(self, argv: tuple[str, ...]) -> tuple[str, ...]:
        return ("nsenter", f"--mount=/proc/{self.holder}/ns/mnt", *argv)

    def _program(self) -> str:
        return Path(f"/proc/{self.holder}/comm").read_text().strip()
