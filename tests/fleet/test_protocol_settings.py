"""Ports and settings of protocols, set by an administrator and taken by a real node; and one that it cannot take."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fleet.installation import Answer, Installation, script

pytestmark = [pytest.mark.netns, pytest.mark.timeout(120)]

PASSWORD = "correct horse battery"
TAKEN = 2299
OCCUPY = f"import socket, time; taken = socket.create_server(('0.0.0.0', {TAKEN})); time.sleep(3600)"


@pytest.fixture(scope="module")
def fleet(prepared: Installation) -> Installation:
    """Its administrator is logged in, and its node offers three protocols."""
    prepared.copy_template()
    prepared.start_controller()
    prepared.start_agent(PROTOCOLS="wireguard,openvpn,ssh")
    prepared.log_in()
    prepared.wait_online()
    admin = ("user", "add", "boss", "--email", "boss@example.org", "--role", "admin", "--password-stdin")
    prepared.command(*admin, stdin=f"{PASSWORD}\n")
    login = prepared.call("POST", "/irssh/api/auth/login", {"username": "boss", "password": PASSWORD})
    prepared.token = login.json["access_token"]
    return prepared


def protocols(fleet: Installation) -> dict[str, tuple[str, int]]:
    listed = fleet.call("GET", "/irssh/api/protocols").json["protocols"]
    return {protocol["name"]: (protocol["status"], protocol["port"]) for protocol in listed}


def configure(fleet: Installation, name: str, **change: Any) -> Answer:
    return fleet.call("PUT", f"/irssh/api/protocols/{name}", change)


def listens(fleet: Installation, port: int) -> bool:
    return f":{port} " in fleet.node.run("ss", "-Hltun")


def test_what_a_node_offers_runs_as_it_is_set(fleet: Installation) -> None:
    wanted = {"wireguard": ("running", 51820), "openvpn": ("running", 1194), "ssh": ("running", 2222)}
    fleet.wait(lambda: wanted.items() <= protocols(fleet).items(), "the protocols do not run")
    assert protocols(fleet)["l2tp"] == ("stopped", 1701)
    configured = configure(fleet, "openvpn", port=1195, settings={"transports": ["udp"]})
    assert (configured.status, configured.json["status"], configured.json["port"]) == (200, "applying", 1195)
    fleet.wait(lambda: protocols(fleet)["openvpn"] == ("running", 1195), "the change does not run")
    assert listens(fleet, 1195) and not listens(fleet, 1194)


def test_a_port_of_another_protocol_changes_nothing(fleet: Installation) -> None:
    before = protocols(fleet)
    refused = configure(fleet, "openvpn", port=51820)
    assert (refused.status, "in use by wireguard" in refused.json["detail"]) == (400, True)
    assert protocols(fleet) == before


def test_a_server_that_cannot_run_says_so_within_a_second_and_the_others_serve(fleet: Installation) -> None:
    fleet.node.start(fleet.directory / "occupier.log", script("python"), "-c", OCCUPY)
    fleet.wait(lambda: listens(fleet, TAKEN), "the port is not taken")
    fleet.wait(lambda: protocols(fleet)["ssh"][0] == "running", "ssh does not run")
    others = {name: state for name, state in protocols(fleet).items() if name != "ssh"}
    assert configure(fleet, "ssh", port=TAKEN).status == 200
    seconds = fleet.wait(lambda: protocols(fleet)["ssh"] == ("error", TAKEN), "the failure is not told")
    assert seconds < 5  # one second on a machine that has nothing else to do
    assert f"port {TAKEN}" in fleet.command("node", "status", "fra1")
    assert fleet.nodes().splitlines()[1].split("\t")[-1].startswith("ssh: ")
    assert fleet.metric("skynetvpn_protocol_up", node="fra1", protocol="ssh") == 0
    assert fleet.metric("skynetvpn_protocol_up", node="fra1", protocol="openvpn") == 1
    assert {name: state for name, state in protocols(fleet).items() if name != "ssh"} == others
    assert configure(fleet, "ssh", port=2222).status == 200
    fleet.wait(lambda: protocols(fleet)["ssh"] == ("running", 2222), "ssh does not run again")
    assert fleet.metric("skynetvpn_protocol_up", node="fra1", protocol="ssh") == 1
