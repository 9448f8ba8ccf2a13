"""The histogram of requests says what the library's own would say."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from controller.contracts.kit.timings import Timings


def test_it_is_told_as_the_librarys_own_histogram_is() -> None:
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    name, words = "skynetvpn_http_request_seconds", "Time to answer a request of the public API"
    histogram = Histogram(name, words, ["contract", "route", "method", "status"], registry=theirs)
    timings = Timings()
    ours.register(timings)
    for route in ("/api/servers", "none"):
        for seconds in (0.0, 0.0001, 0.005, 0.0051, 0.3, 1.0, 2.5, 10.0, 10.5, 3600.0):
            histogram.labels("skynet", route, "GET", "200").observe(seconds)
            timings.observe(("skynet", route, "GET", 200), seconds)
    expected = [line for line in generate_latest(theirs).splitlines() if b"_created" not in line]
    assert generate_latest(ours).splitlines() == expected
