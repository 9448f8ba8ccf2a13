"""What the agent counts about itself, for the metrics endpoint and the service manager's status line."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Counters:
    connected: bool = False
    applied_revision: dict[str, int] = field(default_factory=dict)
    apply_seconds: float = 0.0  # sum
    applies: int = 0
    drift: int = 0
    failures: int = 0  # resources that the host does not have now
    refused_snapshots: int = 0
    store_errors: int = 0
    peers: int = 0
    sessions: int = 0
    load: float = 0.0
    certificate_not_after: int = 0
    server_up: dict[str, bool] = field(default_factory=dict)  # by protocol, as the two below
    service_sessions: dict[str, int] = field(default_factory=dict)
    service_bytes: dict[str, tuple[int, int]] = field(default_factory=dict)  # received and sent since the start
    server_certificate_not_after: int = 0  # of the OpenVPN server, 0 = it has none

    def moved(self, protocol: str, rx: int, tx: int) -> None:
        before = self.service_bytes.get(protocol, (0, 0))
        self.service_bytes[protocol] = (before[0] + rx, before[1] + tx)
