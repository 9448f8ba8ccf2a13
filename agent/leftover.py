"""Protocols that this host served once and does not now: what still runs of them is stopped, once."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from agent.logins import SERVER_KINDS
from shared.resource import Protocol


class LeftOver:
    """A driver's directory tells that its protocol was served; a mark beside it, that it has been stopped since."""

    def __init__(self, directory: Path, served: Collection[Protocol]) -> None:
        self._directory = directory
        for protocol in served:
            self._mark(protocol).unlink(missing_ok=True)
        self.protocols = [
            protocol
            for protocol in SERVER_KINDS
            if protocol not in served and (directory / protocol).is_dir() and not self._mark(protocol).exists()
        ]

    def stopped(self, protocol: Protocol) -> None:
        self._mark(protocol).touch(mode=0o600)

    def _mark(self, protocol: Protocol) -> Path:
        return self._directory / f"{protocol}.stopped"
