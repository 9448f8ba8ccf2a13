"""The fleet's numbers for Prometheus. A node is labelled by its name; users never are."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class FleetMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.nodes = Gauge("skynetvpn_nodes", "Enrolled nodes by status", ["state"], registry=registry)
        self.enrolments = Counter("skynetvpn_enrolments", "Enrolment requests", ["result"], registry=registry)
        self.locks = Counter(
            "skynetvpn_node_locks", "Nodes locked because two hosts used their identity", registry=registry
        )
