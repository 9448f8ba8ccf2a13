"""Row 9: the agent's resident memory against Debian's node_exporter, idle and with 10,000 peers; 5 scrapes each.

The agent has the libraries that it needs, not those of the tests: some load others where these are installed.
"""

from __future__ import annotations

import shutil
import subprocess

from bench import venv
from bench.harness import Goal, Result, absolute, not_measured
from bench.stack import Stack, resident_kib, settle
from tests.support.host import Host
from tests.support.netns import Namespace, wait_until

ROW = "memory"
_PROGRAM = "prometheus-node-exporter"
_PORT = 19100
_SCRAPES = 5
_CROWD = 10_000
_AGENT_METRICS = "http://127.0.0.1:9586/metrics"


def measure(*, quick: bool) -> list[Result]:
    crowd = 1000 if quick else _CROWD
    idle, theirs = _agent(0, quick=quick)
    full, _ = _agent(crowd, quick=quick)
    results = []
    if theirs is None:
        results.append(not_measured(ROW, "resident memory, agent idle", f"{_PROGRAM} is not installed"))
    else:
        results.append(
            Result(
                row=ROW,
                measure="resident memory, agent idle",
                unit="MB",
                ours=idle,
                against="node_exporter",
                theirs=theirs,
                ratio=idle / theirs,
                goal=Goal(at_most=2.5),
                note="each after 5 scrapes",
            )
        )
    measure = f"resident memory, more with {crowd:,} peers"
    return [*results, absolute(ROW, measure, "MB", full - idle, goal=Goal(at_most=15))]


def _agent(peers: int, *, quick: bool) -> tuple[float, float | None]:
    """MB of the agent and, measured beside it, of node_exporter."""
    with Stack(peers=peers, python=venv.python("agent")) as stack:
        assert stack.agent is not None
        settle(5 if quick else 65)  # two re-checks of the host, a dozen readings of the counters
        _scrape(stack.node.namespace, _AGENT_METRICS)
        exporter = None if peers else _exporter(stack.node)
        return resident_kib(stack.agent.pid) / 1024, exporter


def _exporter(host: Host) -> float | None:
    if shutil.which(_PROGRAM) is None:
        return None
    place = host.namespace
    address = f"127.0.0.1:{_PORT}"
    child = place.popen(
        _PROGRAM,
        f"--web.listen-address={address}",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: place.run("curl", "-s", f"http://{address}/", check=False), 30)
    _scrape(place, f"http://{address}/metrics")
    megabytes = resident_kib(child.pid) / 1024
    place.end(child)
    return megabytes


def _scrape(place: Namespace, url: str) -> None:
    for _ in range(_SCRAPES):
        place.run("curl", "-sf", "-o", "/dev/null", url)
