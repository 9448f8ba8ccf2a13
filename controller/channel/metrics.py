"""The channel's numbers for Prometheus. A node is labelled by its name; users never are."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_PUSH_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5, 30)


class ChannelMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.up = Gauge("skynetvpn_node_up", "Whether the node's session is live", ["node"], registry=registry)
        self.protocol_up = Gauge(
            "skynetvpn_protocol_up",
            "Whether the node runs the protocol's server",
            ["node", "protocol"],
            registry=registry,
        )
        self.push = Histogram(
            "skynetvpn_push_seconds", "From a change's commit to applied", registry=registry, buckets=_PUSH_SECONDS
        )
        self.drift = Counter(
            "skynetvpn_node_drift", "Times that a host was found with something else", ["node"], registry=registry
        )
        self.refused = Counter(
            "skynetvpn_node_refused_snapshots", "Snapshots that the node refused", ["node"], registry=registry
        )
        self.violations = Counter(
            "skynetvpn_node_violations", "Sessions ended for what the node sent", ["node"], registry=registry
        )
        self.dropped = Counter(
            "skynetvpn_node_dropped_sessions", "Sessions dropped because the node was slow", ["node"], registry=registry
        )
