"""What Prometheus is told of connections, sessions and their traffic; never by account."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from controller.tunnels.status import Status

NodeProtocol = tuple[str, str]  # node id, protocol


class Metrics:
    """Labels are bounded: states, directions, protocols, and the nodes of the fleet by `node_name` of their ids."""

    def __init__(self, registry: CollectorRegistry, node_name: Callable[[str], str] = str) -> None:
        self._registry = registry
        self._node_name = node_name
        self._traffic = Counter(
            "skynetvpn_traffic_bytes",
            "Bytes of all clients since the controller started; rx is from the clients.",
            ("direction", "node", "protocol"),
            registry=registry,
        )
        self._quarantines = Counter(
            "skynetvpn_counter_quarantines",
            "Reported counters that no link can have reached; they are not counted.",
            registry=registry,
        )

        self._refusals = Counter(
            "skynetvpn_sessions_refused",
            "Reported sessions of accounts that do not exist or have no login on the node; they are not counted.",
            ("node",),
            registry=registry,
        )

    def count_traffic(self, node_id: str, protocol: str, rx: int, tx: int) -> None:
        node = self._node_name(node_id)
        if rx:
            self._traffic.labels("rx", node, protocol).inc(rx)
        if tx:
            self._traffic.labels("tx", node, protocol).inc(tx)

    def count_quarantine(self) -> None:
        self._quarantines.inc()

    def count_refused_sessions(self, node_id: str, count: int) -> None:
        self._refusals.labels(self._node_name(node_id)).inc(count)

    def watch(
        self, count_states: Callable[[], Mapping[Status, int]], count_sessions: Callable[[], Mapping[NodeProtocol, int]]
    ) -> None:
        """Ask for the live connections' states and the sessions whenever the metrics are read."""
        self._registry.register(_Now(count_states, count_sessions, self._node_name))


class _Now(Collector):
    def __init__(
        self,
        count_states: Callable[[], Mapping[Status, int]],
        count_sessions: Callable[[], Mapping[NodeProtocol, int]],
        node_name: Callable[[str], str],
    ) -> None:
        self._count_states = count_states
        self._count_sessions = count_sessions
        self._node_name = node_name

    def collect(self) -> Iterator[Metric]:
        counts = self._count_states()
        states = GaugeMetricFamily(
            "skynetvpn_connections",
            "Connections that are not terminated; disconnected ones are silent.",
            labels=("state",),
        )
        for state in Status:
            states.add_metric([state], counts.get(state, 0))
        yield states
        sessions = GaugeMetricFamily("skynetvpn_sessions", "Sessions that live.", labels=("node", "protocol"))
        for (node_id, protocol), count in self._count_sessions().items():
            sessions.add_metric([self._node_name(node_id), protocol], count)
        yield sessions
