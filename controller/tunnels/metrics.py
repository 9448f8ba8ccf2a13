"""What Prometheus is told of connections and their traffic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from controller.tunnels.status import Status


class Metrics:
    """Labels are bounded: three states, two directions, and the nodes of the fleet by `node_name` of their ids."""

    def __init__(self, registry: CollectorRegistry, node_name: Callable[[str], str] = str) -> None:
        self._registry = registry
        self._node_name = node_name
        self._traffic = Counter(
            "skynetvpn_traffic_bytes",
            "Bytes of all clients since the controller started; rx is from the clients.",
            ("direction", "node"),
            registry=registry,
        )
        self._quarantines = Counter(
            "skynetvpn_counter_quarantines",
            "Reported counters that no link can have reached; they are not counted.",
            registry=registry,
        )

    def count_traffic(self, node_id: str, rx: int, tx: int) -> None:
        node = self._node_name(node_id)
        if rx:
            self._traffic.labels("rx", node).inc(rx)
        if tx:
            self._traffic.labels("tx", node).inc(tx)

    def count_quarantine(self) -> None:
        self._quarantines.inc()

    def watch(self, count_states: Callable[[], Mapping[Status, int]]) -> None:
        """Ask for the live connections' states whenever the metrics are read."""
        self._registry.register(_States(count_states))


class _States(Collector):
    def __init__(self, count_states: Callable[[], Mapping[Status, int]]) -> None:
        self._count_states = count_states

    def collect(self) -> Iterator[Metric]:
        counts = self._count_states()
        family = GaugeMetricFamily(
            "skynetvpn_connections",
            "Connections that are not terminated; disconnected ones are silent.",
            labels=("state",),
        )
        for state in Status:
            family.add_metric([state], counts.get(state, 0))
        yield family
