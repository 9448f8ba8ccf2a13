"""When `up` may tell what its node serves."""

from __future__ import annotations

import pytest

from agent.client.errors import Failure
from agent.client.serving import Server, agree, servers_of, to_itself, tried, whole
from shared.resource import Protocol

BOTH = (Protocol.WIREGUARD, Protocol.OPENVPN)
RUNNING = Server("running")


def metrics(failures: int, **up: int) -> str:
    servers = "".join(f'skynetvpn_agent_server_up{{protocol="{name}"}} {value}\n' for name, value in up.items())
    applied = 'skynetvpn_agent_applied_revision{scope="node:01"} 3\n'
    return f"{applied}skynetvpn_agent_failures {failures}\n{servers}"


def test_a_protocol_counts_as_tried_after_its_first_round() -> None:
    assert not tried("", [Protocol.WIREGUARD])
    assert tried(metrics(0), [Protocol.WIREGUARD])
    assert not tried(metrics(0), BOTH)
    assert tried(metrics(1, openvpn=0), BOTH)


@pytest.mark.parametrize(
    ("text", "openvpn", "wanted"),
    [
        (metrics(0, openvpn=1), RUNNING, True),
        (metrics(0, openvpn=1), Server("failed", "of an earlier start"), False),
        (metrics(1, openvpn=0), RUNNING, False),
        (metrics(1, openvpn=0), Server("applying"), False),
        (metrics(1, openvpn=0), Server("failed", "port 1194 is taken"), True),
        (metrics(1, openvpn=1), RUNNING, False),  # something fails that has not been told yet
        ("", Server("failed", "port 1194 is taken"), True),
    ],
)
def test_old_and_half_news_are_not_told(text: str, openvpn: Server, wanted: bool) -> None:
    assert agree(text, {"wireguard": RUNNING, "openvpn": openvpn}) is wanted


def test_one_that_does_not_run_is_missing_in_the_whole() -> None:
    assert whole({"wireguard": RUNNING, "openvpn": RUNNING})
    assert not whole({"wireguard": RUNNING, "openvpn": Server("applying")})


def test_the_controllers_answer_is_read_for_the_protocols_that_are_served() -> None:
    answer = '{"name": "local", "servers": {"openvpn": {"status": "failed", "problem": "no"}, "ssh": {"status": "x"}}}'
    assert servers_of(answer, BOTH) == {"wireguard": Server("applying"), "openvpn": Server("failed", "no")}
    assert Server("failed", "no").words == "FAILED: no"
    with pytest.raises(Failure):
        servers_of("[]", BOTH)


def test_what_keeps_the_node_from_a_server_is_told() -> None:
    waiting = '{"problem": "it would remove 15 of 15 peers", "servers": {"wireguard": {"status": "applying"}}}'
    assert servers_of(waiting, BOTH)["wireguard"].words == "NOT YET: it would remove 15 of 15 peers"
    assert servers_of('{"servers": {}}', BOTH)["wireguard"].words == "still starting"


def test_a_machine_connects_to_itself_by_what_does_not_fail() -> None:
    failed, later = Server("failed", "port 51820 is taken"), Server("applying")
    assert to_itself({"openvpn": RUNNING, "wireguard": RUNNING}) is Protocol.WIREGUARD
    assert to_itself({"openvpn": RUNNING, "wireguard": failed}) is Protocol.OPENVPN
    assert to_itself({"wireguard": later}) is Protocol.WIREGUARD
    assert to_itself({"l2tp": RUNNING, "wireguard": failed}) is None
