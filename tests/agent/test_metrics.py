from __future__ import annotations

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent.counters import Counters
from agent.errors import AgentError
from agent.metrics import MetricsServer, all_lines, render_agent, render_peers
from shared.protocol import PeerStats
from tests.agent.fleet import peer

PEER = peer(1, allowed_ips=("10.66.1.2/32", "fd66::2/128"))
STATS = {PEER.public_key: PeerStats(PEER.public_key, 100, 200, 1_800_000_000)}


def samples(text: str) -> dict[str, tuple[dict[str, str], float]]:
    return {
        sample.name: (sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_peers_have_the_names_that_dashboards_know() -> None:
    found = samples("".join(render_peers("wg0", STATS, {PEER.public_key: PEER})))
    labels = {"interface": "wg0", "public_key": PEER.key, "allowed_ips": "10.66.1.2/32,fd66::2/128"}
    assert found == {
        "wireguard_sent_bytes_total": (labels, 200),
        "wireguard_received_bytes_total": (labels, 100),
        "wireguard_latest_handshake_seconds": (labels, 1_800_000_000),
    }


def test_agent_counts_are_exposed_and_scopes_escaped() -> None:
    counters = Counters(connected=True, applied_revision={'no"de\n1': 7}, drift=3, certificate_not_after=1060)
    found = samples("".join(render_agent(counters, 1000)))
    assert found["skynetvpn_agent_connected"] == ({}, 1)
    assert found["skynetvpn_agent_applied_revision"] == ({"scope": 'no"de\n1'}, 7)
    assert found["skynetvpn_agent_drift_total"] == ({}, 3)
    assert found["skynetvpn_agent_certificate_expiry_seconds"] == ({}, 60)


def test_servers_have_a_line_for_each_protocol_and_none_where_there_are_none() -> None:
    assert "server" not in "".join(render_agent(Counters(), 1000))
    counters = Counters(server_up={"ssh": True, "openvpn": False}, server_certificate_not_after=1500)
    counters.service_sessions["ssh"] = 4
    counters.moved("ssh", 10, 20)
    counters.moved("ssh", 1, 2)
    lines = "".join(render_agent(counters, 1000)).splitlines()
    for line in (
        'skynetvpn_agent_server_up{protocol="ssh"} 1',
        'skynetvpn_agent_server_up{protocol="openvpn"} 0',
        'skynetvpn_agent_service_sessions{protocol="ssh"} 4',
        'skynetvpn_agent_service_received_bytes_total{protocol="ssh"} 11',
        'skynetvpn_agent_service_sent_bytes_total{protocol="ssh"} 22',
        "skynetvpn_agent_server_certificate_expiry_seconds 500",
    ):
        assert line in lines


async def test_endpoint_serves_many_peers_and_health() -> None:
    many = {peer(number).public_key: PeerStats(peer(number).public_key, number, 0, 0) for number in range(2000)}
    healthy = True
    server = MetricsServer("127.0.0.1", 0, all_lines(Counters(), lambda: "wg0", lambda: many, dict), lambda: healthy)
    port = await server.start()
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            async with session.get("/metrics") as response:
                text = await response.text()
            assert sum(line.startswith("wireguard_received") for line in text.splitlines()) == 2000
            async with session.get("/healthz") as response:
                assert response.status == 200
            healthy = False
            async with session.get("/healthz") as response:
                assert response.status == 503
        other = MetricsServer("127.0.0.1", port, all_lines(Counters(), lambda: None, dict, dict), lambda: True)
        with pytest.raises(AgentError, match=f"127.0.0.1:{port}"):
            await other.start()
    finally:
        await server.close()
