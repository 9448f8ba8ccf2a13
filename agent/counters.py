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
