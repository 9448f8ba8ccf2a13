"""A node tells what it offers and what ails it, and gets the servers, logins and certificates for it, on the wire."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from structlog.testing import capture_logs

from controller.channel.hub import Intervals
from controller.channel.pace import COMPLAINTS_PER_MINUTE
from controller.desired import service as desired
from controller.desired.service import node_scope, protocol_scope
from controller.desired.tables import DesiredRow
from controller.fleet.errors import NothingToConfirm
from controller.fleet.nodes import NodeSpec, NodeStatus
from controller.fleet.progress import Progress
from controller.fleet.tables import AppliedRow, NodeRow
from controller.fleet.vpnkeys import load_keys
from controller.store.database import Database, Topic
from controller.store.types import now
from shared.access import Credential
from shared.desired import Kind, Protocol
from shared.protocol import OPENVPN_SERVER, Applied, Certificate, Drift, Failure, Hello, Refused, Renew, Welcome
from tests.support.node_port import (
    DEADLINE,
    NEVER,
    FakeAgent,
    NodePort,
    eventually,
    node_port,
    signing_request,
    until,
)

SSH_KEY = "ssh-ed25519 " + "A" * 68
LOGIN = Credential(protocol=Protocol.SSH, username="alice", account=1, secret="$y$j9T$abc$def")


async def joined(port: NodePort, *protocols: str, name: str = "node-1") -> FakeAgent:
    agent = await port.enrolled(name)
    agent.protocols = list(protocols)
    await agent.join()
    (welcome,) = agent.received(Welcome)
    await until(lambda: set(welcome.scopes) == set(agent.revisions))
    return agent


def servers(agent: FakeAgent) -> set[str]:
    return {kind for kind, _ in agent.resources.get(node_scope(agent.node_id), ())}


async def complain(agent: FakeAgent, *failures: Failure) -> None:
    scope = node_scope(agent.node_id)
    await agent.send(
        Applied(scope=scope, revision=agent.revisions[scope], digest=agent.digest(scope), failures=list(failures))
    )


async def words(database: Database, agent: FakeAgent) -> str:
    async with database.read() as session:
        row = await session.get(AppliedRow, (agent.node_id, node_scope(agent.node_id)))
    return row.servers if row is not None else "{}"


async def told(database: Database, agent: FakeAgent, wanted: str) -> bool:
    return await words(database, agent) == wanted


async def test_a_new_offer_ends_the_session_and_the_next_one_has_its_scopes(port: NodePort) -> None:
    agent = await port.enrolled()
    await agent.connect()
    (welcome,) = agent.received(Welcome)
    assert welcome.scopes == [node_scope(agent.node_id)]
    agent.protocols = ["ssh", "wireguard", "openvpn", "of-tomorrow"]
    await agent.connect()
    await until(lambda: agent.closed)
    assert agent.bye is not None and agent.bye.retry
    assert agent.received(Welcome) == []
    await agent.connect()
    (welcome,) = agent.received(Welcome)
    assert welcome.scopes == [node_scope(agent.node_id), protocol_scope("openvpn"), protocol_scope("ssh")]
    await until(lambda: servers(agent) == {"wireguard.interface", "openvpn.server", "ssh.server"})
    await agent.connect()  # the same again
    assert agent.bye is None
    assert port.directory.known(agent.node_id).protocols == ("wireguard", "openvpn", "ssh")
    agent.protocols = ["ssh"]
    await agent.join()
    await until(lambda: servers(agent) == {"ssh.server"})
    await agent.close()


async def test_host_keys_and_ledger_are_stored_without_another_session(port: NodePort, database: Database) -> None:
    agent = await joined(port, "ssh")
    agent.ssh_host_keys, agent.ledger = [f"{SSH_KEY} root@host", "command=x " + SSH_KEY], "ledger-1"
    await agent.connect()
    assert agent.received(Welcome)
    async with database.read() as session:
        row = await session.get_one(NodeRow, agent.node_id)
    assert (row.ssh_host_keys, row.ledger) == (SSH_KEY, "ledger-1")
    await until(lambda: port.directory.known(agent.node_id).ledger == "ledger-1")
    assert port.directory.known(agent.node_id).ssh_host_keys == (SSH_KEY,)
    await agent.close()


async def test_frames_after_the_bye_are_for_nobody(port: NodePort) -> None:
    agent = await port.enrolled()
    agent.protocols = ["ssh"]
    await agent.open()
    await agent.send(agent.hello())
    for _ in range(20):
        await agent.send(Renew(csr=signing_request(agent.key)))
    assert (await agent.receive()).retry  # type: ignore[union-attr]
    await agent.close()
    assert port.value("skynetvpn_node_violations_total", node="node-1") == 0


async def test_a_node_offers_what_its_administrator_lets_it(port: NodePort) -> None:
    """Else whoever takes over one host would be sent the logins of all accounts for any protocol that he names."""
    agent = await port.enrolled()
    spec = NodeSpec(name="node-1", country="DE", city="Berlin", protocols=(Protocol.WIREGUARD, Protocol.SSH))
    await port.fleet.issue_join_token(spec)
    agent.protocols = ["wireguard", "openvpn", "ssh", "l2tp"]
    with capture_logs() as logs:
        await agent.join()
    (welcome,) = agent.received(Welcome)
    assert welcome.scopes == [node_scope(agent.node_id), protocol_scope("ssh")]
    await until(lambda: servers(agent) == {"wireguard.interface", "ssh.server"})
    assert {"openvpn", "l2tp"} in [set(entry.get("protocols", ())) for entry in logs]
    await port.fleet.issue_join_token(replace(spec, protocols=None))  # as it is
    await agent.connect()
    assert agent.received(Welcome) == [welcome]
    await port.fleet.issue_join_token(replace(spec, protocols=(Protocol.WIREGUARD,)))
    await agent.join()
    assert [one.scopes for one in agent.received(Welcome)] == [[node_scope(agent.node_id)]]
    await until(lambda: servers(agent) == {"wireguard.interface"})
    await agent.close()


async def test_a_login_reaches_the_nodes_that_offer_its_protocol_and_no_other(
    port: NodePort, database: Database
) -> None:
    one, two, other = [
        await joined(port, "ssh", name="one"),
        await joined(port, "wireguard", "ssh", "openvpn", name="two"),
        await joined(port, "openvpn", name="other"),
    ]
    scope = protocol_scope("ssh")
    async with database.transaction() as tx:
        revision = await desired.put(tx, scope, [LOGIN])
    for agent in (one, two):
        assert await port.hub.wait_applied(agent.node_id, scope, revision, DEADLINE)
        assert agent.resources[scope] == {("credential", "ssh/alice"): LOGIN}
    assert scope not in other.resources
    for agent in (one, two, other):
        await agent.close()


async def test_a_configured_protocol_reaches_its_nodes_and_runs(port: NodePort) -> None:
    agent = await joined(port, "wireguard", "ssh")

    async def running() -> bool:
        return {state.name: state.status for state in await port.protocols.list()}[Protocol.SSH] == "running"

    await eventually(running)
    changed = await port.protocols.configure("ssh", port=2022, settings={"keepalive": 60})
    assert (changed.status, changed.port) == ("applying", 2022)
    await eventually(running)
    server = agent.resources[node_scope(agent.node_id)]["ssh.server", "ssh"]
    assert server == port.protocols.server_of(agent.node_id, Protocol.SSH)
    await agent.close()


async def test_what_ails_a_server_is_on_the_nodes_status_within_a_second(database: Database, tmp_path: Path) -> None:
    assert Intervals().flush <= 0.5  # the rest of the second is the commit's, and the node's
    async with node_port(database, tmp_path / "ca", intervals=Intervals()) as port:
        agent = await joined(port, "wireguard", "openvpn", "ssh")
        up = {"node": "node-1", "protocol": "ssh"}
        await until(lambda: port.value("skynetvpn_protocol_up", **up) == 1)
        await complain(agent, Failure("ssh.server", "ssh", "port 2222 is taken"))
        await eventually(partial(told, database, agent, '{"ssh": "port 2222 is taken"}'))
        (node,) = await port.fleet.nodes()
        assert node.servers == {"ssh": "port 2222 is taken"}
        assert node.problem == "1 not applied; ssh.server ssh: port 2222 is taken"
        states = {state.name: (state.status, state.problem) for state in await port.protocols.list()}
        assert states[Protocol.SSH] == ("error", "node-1: port 2222 is taken")
        assert states[Protocol.OPENVPN] == ("running", None)
        assert port.value("skynetvpn_protocol_up", **up) == 0
        assert port.value("skynetvpn_protocol_up", node="node-1", protocol="openvpn") == 1
        await complain(agent)
        await eventually(partial(told, database, agent, "{}"))
        assert port.value("skynetvpn_protocol_up", **up) == 1
        await agent.close()
        await until(lambda: port.value("skynetvpn_protocol_up", **up) == 0)


async def test_a_login_that_fails_is_no_server_that_fails(port: NodePort, database: Database) -> None:
    agent = await joined(port, "ssh")
    await complain(agent, Failure("credential", "ssh/alice", "useradd says no"), Failure("ssh.of-tomorrow", "x", "y"))

    async def problem() -> bool:
        return await port.problem() is not None

    await eventually(problem)
    assert await words(database, agent) == "{}"
    assert port.value("skynetvpn_protocol_up", node="node-1", protocol="ssh") == 1
    await agent.close()


async def test_what_was_refused_of_a_protocol_that_is_given_up_is_nobodys_problem(
    port: NodePort, database: Database
) -> None:
    agent, scope = await joined(port, "ssh"), protocol_scope("ssh")
    await agent.send(Refused(scope=scope, revision=1, reason="too much"))
    await eventually(port.problem)
    agent.protocols = ["wireguard"]
    await agent.join()
    assert await port.problem() is None
    with pytest.raises(NothingToConfirm):
        await port.fleet.confirm_snapshot("node-1")
    async with database.transaction() as tx:  # as the last session writes it that ends only now
        refusal = {"refused_revision": 1, "confirmed_at": now()}
        tx.session.add(AppliedRow(node_id=agent.node_id, scope=scope, revision=0, digest=b"", applied_at=now()))
        await tx.session.flush()
        await tx.session.execute(sa.update(AppliedRow).where(AppliedRow.scope == scope).values(refusal))
        tx.touch(Topic.NODES)
    await port.fleet.set_status("node-1", NodeStatus.DISABLED)  # the hub checks on
    await until(lambda: agent.closed)
    await agent.close()


async def test_a_session_that_replaces_another_leaves_none_of_its_scopes_behind(
    port: NodePort, database: Database
) -> None:
    """A half-open link is replaced after another controller has stored what the node offers now."""
    former = await joined(port, "ssh", "wireguard")
    async with database.transaction() as tx:
        await tx.session.execute(sa.update(NodeRow).values(protocols="wireguard"))
    agent = copy.copy(former)
    agent.protocols, agent._socket, agent._session, agent._reader = ["wireguard"], None, None, None
    await agent.connect()
    assert [welcome.scopes for welcome in agent.received(Welcome)] == [[node_scope(agent.node_id)]]
    assert set(port.hub._listeners) == {node_scope(agent.node_id)}
    await agent.close()
    await until(lambda: not port.hub.online)
    assert not port.hub._listeners
    await former.close()


async def test_what_cannot_be_read_of_one_scope_holds_up_no_other(port: NodePort, database: Database) -> None:
    agent = await joined(port, "ssh", "wireguard")
    async with database.transaction() as tx:
        await desired.put(tx, protocol_scope("ssh"), [LOGIN])
    await until(lambda: ("credential", "ssh/alice") in agent.resources[protocol_scope("ssh")])
    await agent.close()
    async with database.transaction() as tx:
        damaged = sa.update(DesiredRow).where(DesiredRow.scope == node_scope(agent.node_id))
        await tx.session.execute(damaged.values(payload=b"damaged"))
    agent.epoch = "elsewhere"  # so that it needs everything anew
    agent.resources.clear()
    with capture_logs() as logs:
        await agent.connect()
        await until(lambda: agent.resources.get(protocol_scope("ssh")))
        async with database.transaction() as tx:
            await desired.remove(tx, protocol_scope("ssh"), Kind.CREDENTIAL, ["ssh/alice"])
        await until(lambda: not agent.resources[protocol_scope("ssh")])
    assert [entry["scope"] for entry in logs if entry["event"] == "channel.desired_unreadable"] == [
        node_scope(agent.node_id)
    ]
    await agent.close()


async def test_a_node_says_nothing_of_anothers_servers(port: NodePort, database: Database) -> None:
    honest, hostile = await joined(port, "ssh", name="honest"), await joined(port, "ssh", name="hostile")
    scope = node_scope(honest.node_id)
    await hostile.send(
        Applied(
            scope=scope,
            revision=honest.revisions[scope],
            digest=honest.digest(scope),
            failures=[Failure("ssh.server", "ssh", "on fire")],
        )
    )
    await until(lambda: hostile.closed)
    assert port.value("skynetvpn_node_violations_total", node="hostile") == 1
    await port.progress.flush()
    assert await words(database, honest) == "{}"
    assert port.value("skynetvpn_protocol_up", node="honest", protocol="ssh") == 1
    await honest.close()
    await hostile.close()


async def test_a_node_cannot_hear_of_logins_that_it_does_not_offer(port: NodePort) -> None:
    agent = await joined(port, "wireguard")
    await agent.send(Applied(scope=protocol_scope("ssh"), revision=1, digest=b""))
    await until(lambda: agent.closed)
    assert port.value("skynetvpn_node_violations_total", node="node-1") == 1
    await agent.close()


async def test_a_node_gets_an_openvpn_certificate_of_its_own_name_only(port: NodePort, database: Database) -> None:
    agent, key = await joined(port, "openvpn"), ec.generate_private_key(ec.SECP256R1())
    victim = x509.SubjectAlternativeName([x509.DNSName("victim"), x509.UniformResourceIdentifier("vpn://x/node/2")])
    request = signing_request(key, "victim", victim, x509.BasicConstraints(ca=True, path_length=None))
    await agent.send(Renew(csr=request, purpose=OPENVPN_SERVER))
    await until(lambda: agent.received(Certificate))
    (answer,) = agent.received(Certificate)
    assert answer.purpose == OPENVPN_SERVER
    assert answer.ca.decode() == (await load_keys(database)).ca
    issued = x509.load_pem_x509_certificate(answer.certificate)
    (name,) = issued.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert name.value == agent.node_id
    assert "victim" not in str(issued.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    assert issued.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert issued.public_key() == key.public_key()
    issued.verify_directly_issued_by(x509.load_pem_x509_certificate(answer.ca))
    async with database.read() as session:  # its identity on the channel is as it was
        row = await session.get_one(NodeRow, agent.node_id)
    assert row.next_serial is None
    await agent.connect()
    assert agent.received(Welcome)
    await agent.close()


@pytest.mark.parametrize(
    "request_",
    [b"x" * 16384, b"", signing_request(rsa.generate_private_key(65537, 1024))],
    ids=["garbage", "empty", "rsa"],
)
async def test_a_weak_request_gets_nothing(port: NodePort, request_: bytes) -> None:
    agent = await joined(port, "openvpn")
    await agent.send(Renew(csr=request_, purpose=OPENVPN_SERVER))
    await until(lambda: agent.closed)
    assert agent.received(Certificate) == []
    assert agent.bye is not None and "certificate request" in agent.bye.reason
    await agent.close()


async def test_an_oversized_request_is_no_frame(port: NodePort) -> None:
    agent = await joined(port, "openvpn")
    await agent.send(Renew(csr=b"x" * 16385, purpose=OPENVPN_SERVER))
    await until(lambda: agent.closed)
    assert port.value("skynetvpn_node_violations_total", node="node-1") == 1
    await agent.close()


async def test_a_node_without_openvpn_gets_no_certificate_for_it(port: NodePort) -> None:
    agent = await joined(port, "wireguard", "ssh")
    await agent.send(Renew(csr=signing_request(agent.key), purpose=OPENVPN_SERVER))
    await until(lambda: agent.closed)
    assert agent.received(Certificate) == []
    assert port.value("skynetvpn_node_violations_total", node="node-1") == 1
    await agent.close()


async def test_a_certificate_for_what_only_a_newer_agent_knows_is_left_out(port: NodePort) -> None:
    agent = await joined(port, "openvpn")
    await agent.send(Renew(csr=signing_request(agent.key), purpose="of-tomorrow"))
    await agent.send(Renew(csr=signing_request(agent.key), purpose=OPENVPN_SERVER))
    await until(lambda: agent.received(Certificate))
    assert [answer.purpose for answer in agent.received(Certificate)] == [OPENVPN_SERVER]
    await agent.close()


async def test_a_malformed_ledger_is_a_violation(port: NodePort, database: Database) -> None:
    agent = await port.enrolled()
    await agent.open()
    hello = agent.hello()
    await agent.send(
        Hello(version=hello.version, agent=hello.agent, boot_id=hello.boot_id, ledger="a\nb", protocols=["ssh"])
    )
    await agent.receive()
    await until(lambda: port.value("skynetvpn_node_violations_total", node="node-1") == 1)
    async with database.read() as session:
        assert (await session.get_one(NodeRow, agent.node_id)).protocols == "wireguard"
    await agent.close()


async def test_tombstones_of_logins_wait_for_every_node_that_offers_the_protocol(
    database: Database, tmp_path: Path
) -> None:
    scope = protocol_scope("ssh")

    async def tombstones() -> int:
        async with database.read() as session:
            return await session.scalar(sa.select(sa.func.count()).where(DesiredRow.deleted)) or 0

    async with node_port(database, tmp_path / "ca", intervals=NEVER) as port:
        one, away = await joined(port, "ssh", name="one"), await joined(port, "ssh", name="away")
        bystander = await joined(port, "openvpn", name="bystander")
        await away.close()
        async with database.transaction() as tx:
            await desired.put(tx, scope, [LOGIN])
            revision = await desired.remove(tx, scope, Kind.CREDENTIAL, [LOGIN.key])
        assert await port.hub.wait_applied(one.node_id, scope, revision, DEADLINE)
        before = await tombstones()
        await port.progress.flush()
        await port.progress.purge()
        async with database.read() as session:
            assert await session.get(DesiredRow, (scope, Kind.CREDENTIAL, LOGIN.key)) is not None
        await away.connect()
        assert await port.hub.wait_applied(away.node_id, scope, revision, DEADLINE)
        await port.progress.flush()
        async with asyncio.timeout(DEADLINE):
            while not await port.progress.purge():  # noqa: ASYNC110  the hub may be writing the acknowledgement
                await asyncio.sleep(0.01)
        async with database.read() as session:
            assert await session.get(DesiredRow, (scope, Kind.CREDENTIAL, LOGIN.key)) is None
        assert await tombstones() < before
        for agent in (one, away, bystander):
            await agent.close()


async def test_tombstones_of_a_protocol_that_nobody_offers_go(database: Database) -> None:
    scope = protocol_scope("l2tp")
    async with database.transaction() as tx:
        await desired.put(tx, scope, [LOGIN])
        await desired.remove(tx, scope, Kind.CREDENTIAL, [LOGIN.key])
        await desired.put(tx, node_scope("of-a-node-that-is-away"), [LOGIN])
        await desired.remove(tx, node_scope("of-a-node-that-is-away"), Kind.CREDENTIAL, [LOGIN.key])
    assert await Progress(database).purge() == 1
    async with database.connect() as connection:
        assert await desired.changes(connection, database.secrets, scope, 1) is None  # an older base needs a snapshot


async def test_complaints_are_counted_and_few_are_written_down(port: NodePort) -> None:
    agent = await joined(port, "ssh")
    scope = node_scope(agent.node_id)
    count = 5 * COMPLAINTS_PER_MINUTE
    with capture_logs() as logs:
        for number in range(count):
            await agent.send(Drift(scope=scope, missing=1))
            await complain(agent, Failure("ssh.server", "ssh", f"words {number}"))
        await until(lambda: port.value("skynetvpn_node_drift_total", node="node-1") == count)
        assert port.directory.name(agent.node_id) == "node-1" and not agent.closed
    written = [entry for entry in logs if entry["event"] in ("channel.drift", "channel.not_applied")]
    assert len(written) == COMPLAINTS_PER_MINUTE
    await agent.close()
