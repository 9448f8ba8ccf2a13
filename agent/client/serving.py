"""Which protocols the node of `up` serves, once its agent and the controller say the same; pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import msgspec

from agent.client.errors import Failure
from shared.resource import Protocol

RUNNING = "running"
_FAILED = "failed"
# Of L2TP a machine is one end only: it has one IKE port.
_TO_ITSELF = (Protocol.WIREGUARD, Protocol.OPENVPN, Protocol.SSH)
_ONLINE = re.compile(r"^skynetvpn_agent_connected 1\b", re.MULTILINE)
_APPLIED = re.compile(r'^skynetvpn_agent_applied_revision\{scope="node:', re.MULTILINE)
_HEALTHY = re.compile(r"^skynetvpn_agent_failures 0\b", re.MULTILINE)
_SERVERS = re.compile(r'^skynetvpn_agent_server_up\{protocol="(\w+)"\} ([01])', re.MULTILINE)


class Server(msgspec.Struct, frozen=True):
    status: str  # running, applying or failed
    problem: str | None = None  # in the node's words

    @property
    def words(self) -> str:
        match self.status:
            case "running":
                return "running"
            case "failed":
                return f"FAILED: {self.problem}"
            case _:
                return f"NOT YET: {self.problem}" if self.problem else "still starting"


class _Node(msgspec.Struct, frozen=True):
    servers: dict[str, Server]
    problem: str | None = None


def online(metrics: str) -> bool:
    """Whether the agent's link is up, by its own metrics."""
    return _ONLINE.search(metrics) is not None


def tried(metrics: str, protocols: Collection[Protocol]) -> bool:
    """Whether the agent has brought each of them up, or failed to, since it started."""
    up = dict(_SERVERS.findall(metrics))
    return _APPLIED.search(metrics) is not None and set(protocols) <= {Protocol.WIREGUARD, *up}


def servers_of(answer: str, protocols: Collection[Protocol]) -> dict[str, Server]:
    """What `skynetvpn-controller node status -o json` says of the protocols."""
    try:
        node = msgspec.json.decode(answer, type=_Node)
    except msgspec.MsgspecError as error:
        raise Failure(f"skynetvpn-controller node status answered something else than it does: {error}") from error
    later = Server("applying", node.problem)  # it may have refused the state that has the server
    told = {protocol: node.servers.get(protocol, later) for protocol in protocols}
    return {protocol: later if server.status == later.status else server for protocol, server in told.items()}


def whole(servers: Mapping[str, Server]) -> bool:
    return all(server.status == RUNNING for server in servers.values())


def to_itself(servers: Mapping[str, Server]) -> Protocol | None:
    """What the machine may connect to its own node by: the first that is served, or may yet be."""
    return next((each for each in _TO_ITSELF if each in servers and servers[each].status != _FAILED), None)


def agree(metrics: str, servers: Mapping[str, Server]) -> bool:
    """Whether what the controller was told is of this start. Without metrics it is believed."""
    up = dict(_SERVERS.findall(metrics))
    for protocol, server in servers.items():
        if server.status == "applying":
            return False
        if protocol in up and (server.status == RUNNING) != (up[protocol] == "1"):
            return False
    return not metrics or whole(servers) == (_HEALTHY.search(metrics) is not None)
