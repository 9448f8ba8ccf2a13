"""How long requests take: a histogram that many of them a second can afford."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import Histogram
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

_BOUNDS = Histogram.DEFAULT_BUCKETS  # seconds; the last is infinite
_TEXTS = [*map(str, _BOUNDS[:-1]), "+Inf"]

Key = tuple[str, str, str, int]  # contract, route, method, status


class Timings(Collector):
    """The library's own observation takes two locks and a walk over the buckets; all of ours are made by one thread."""

    def __init__(self) -> None:
        self._counts: dict[Key, list[int]] = {}
        self._sums: dict[Key, float] = {}

    def observe(self, key: Key, seconds: float) -> None:
        counts = self._counts.get(key)
        if counts is None:
            counts = self._counts[key] = [0] * len(_BOUNDS)
            self._sums[key] = 0.0
        counts[bisect_left(_BOUNDS, seconds)] += 1
        self._sums[key] += seconds

    def collect(self) -> Iterator[Metric]:
        labels = ("contract", "route", "method", "status")
        family = HistogramMetricFamily(
            "skynetvpn_http_request_seconds", "Time to answer a request of the public API", labels=labels
        )
        for key, counts in list(self._counts.items()):
            buckets = list(zip(_TEXTS, accumulate(counts), strict=True))
            family.add_metric([str(value) for value in key], buckets, self._sums[key])
        yield family
