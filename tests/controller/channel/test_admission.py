"""Who may hold a session: certificates, renewals, clones, and nodes that an administrator cuts off."""

from __future__ import annotations

import asyncio
import copy
import time
import uuid
from datetime import timedelta
from pathlib import Path

import aiohttp
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from controller.channel.pace import RENEWALS_PER_MINUTE
from controller.desired.service import node_scope
from controller.fleet.certificates import Identity
from controller.fleet.directory import ServerStatus
from controller.fleet.identities import Admitted, Identities
from controller.fleet.nodes import NodeStatus
from controller.fleet.service import Fleet
from controller.secretbox import SecretBox
from controller.store.database import Committed, Database, open_database
from controller.store.schema import metadata
from controller.store.watch import Watcher
from shared.protocol import Applied, Certificate, Drift, Renew, Report, Resync, Welcome
from tests.support.node_port import NEVER, FakeAgent, NodePort, node_port, signing_request, until


async def refused(agent: FakeAgent) -> int:
    with pytest.raises(aiohttp.WSServerHandshakeError) as error:
        await agent.open()
    await agent.close()
    return error.value.status


async def renew(agent: FakeAgent) -> FakeAgent:
    """The same node with its next key and certificate."""
    renewed = copy.copy(agent)
    renewed.key = ec.generate_private_key(ec.SECP256R1())
    await agent.send(Renew(csr=signing_request(renewed.key)))
    await until(lambda: agent.received(Certificate))
    renewed.certificate = agent.received(Certificate)[-1].certificate
    renewed._socket = renewed._session = renewed._reader = None
    return renewed


async def status(port: NodePort) -> NodeStatus:
    (node,) = await port.fleet.nodes()
    return node.status


async def test_without_a_certificate_there_is_no_channel(port: NodePort) -> None:
    agent = FakeAgent(port.port, port.authority.bundle)
    assert await refused(agent) == 401
    with pytest.raises(aiohttp.WSServerHandshakeError):
        await agent.open(Authorization="Bearer eyJhbGciOiJIUzI1NiJ9.e30.x")  # what a user API would take
    await agent.close()


async def test_a_certificate_of_another_authority_does_not_connect(
    port: NodePort, secrets: SecretBox, tmp_path: Path
) -> None:
    agent = await port.enrolled()
    other = open_database(f"sqlite+aiosqlite:///{tmp_path / 'other.db'}", secrets)
    async with other.engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    async with node_port(other, tmp_path / "other-ca") as elsewhere:
        stranger = await elsewhere.enrolled()
        stranger.port, stranger.authority = port.port, agent.authority
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            await stranger.open()
        await stranger.close()
    await other.close()


async def test_the_node_is_the_certificates(port: NodePort) -> None:
    one, two = await port.enrolled("node-1"), await port.enrolled("node-2")
    await one.connect()
    await two.connect()
    assert [frame.scopes for frame in one.received(Welcome)] == [[node_scope(one.node_id)]]
    await until(lambda: one.revisions and two.revisions)
    assert set(one.revisions) == {node_scope(one.node_id)}
    await one.send(Report(sequence=7, boot_id=one.boot_id, generation="g"))
    await until(lambda: port.reports)
    assert [node_id for node_id, _ in port.reports] == [one.node_id]
    await one.close()
    await two.close()


@pytest.mark.parametrize("kind", [Applied, Resync])
async def test_a_frame_about_another_nodes_scope_ends_the_session(port: NodePort, kind: type) -> None:
    one, two = await port.enrolled("node-1"), await port.enrolled("node-2")
    await one.connect()
    foreign = node_scope(two.node_id)
    frame = Applied(scope=foreign, revision=1, digest=b"") if kind is Applied else Resync(scope=foreign, reason="")
    await one.send(frame)
    await until(lambda: one.closed)
    assert one.bye is not None
    assert "not one of this node's" in one.bye.reason
    assert port.value("skynetvpn_node_violations_total", node="node-1") == 1
    assert foreign not in one.resources
    assert not await port.hub.wait_applied(two.node_id, foreign, 1, 0.05)
    await one.close()


async def test_drift_is_counted_for_the_node_that_reports_it(port: NodePort) -> None:
    agent = await port.enrolled()
    await agent.connect()
    await agent.send(Drift(scope=node_scope(agent.node_id), missing=2))
    await until(lambda: port.value("skynetvpn_node_drift_total", node="node-1") == 1)
    await agent.close()


async def test_a_wireguard_key_of_another_node_is_refused_at_hello(port: NodePort) -> None:
    one, two = await port.enrolled("node-1"), await port.enrolled("node-2")
    two.wireguard = one.wireguard
    await two.connect()
    await until(lambda: two.closed)
    assert two.bye is not None
    assert not two.bye.retry
    await two.close()


async def test_the_first_use_of_a_renewed_certificate_retires_the_one_before(
    database: Database, tmp_path: Path
) -> None:
    async with node_port(database, tmp_path / "ca", promotion_grace=timedelta(0)) as port:
        agent = await port.enrolled()
        await agent.connect()
        renewed = await renew(agent)
        await agent.connect()  # the answer may have been lost: the present one is good until the next is used
        await renewed.connect()
        assert renewed.received(Welcome)
        await until(lambda: agent.closed)
        assert await refused(agent) == 403  # a copy of the disk from before the renewal
        assert await status(port) == NodeStatus.LOCKED
        await until(lambda: renewed.closed)
        assert await refused(renewed) == 403
        assert port.value("skynetvpn_node_locks_total") == 1
        for each in (agent, renewed):
            await each.close()


async def test_a_host_that_falls_back_just_after_its_promotion_is_not_taken_for_a_clone(port: NodePort) -> None:
    agent = await port.enrolled()
    await agent.connect()
    renewed = await renew(agent)
    await renewed.connect()
    await renewed.close()
    assert await refused(agent) == 401
    assert await status(port) == NodeStatus.ENABLED
    await renewed.connect()
    assert renewed.received(Welcome)
    await renewed.close()
    await agent.close()


async def test_renewals_whose_answers_are_lost_strand_nobody(port: NodePort) -> None:
    agent = await port.enrolled()
    for _ in range(RENEWALS_PER_MINUTE - 1):
        await agent.connect()
        await renew(agent)
    await agent.connect()
    renewed = await renew(agent)
    await renewed.connect()
    assert renewed.received(Welcome)
    await renewed.close()
    await agent.close()


async def test_a_request_for_renewal_that_is_no_request_ends_the_session(port: NodePort) -> None:
    agent = await port.enrolled()
    await agent.connect()
    await agent.send(Renew(csr=b"nonsense"))
    await until(lambda: agent.closed)
    assert agent.bye is not None
    assert "certificate request" in agent.bye.reason
    await agent.close()


async def test_two_hosts_with_one_identity_are_noticed_and_their_tunnels_stay(port: NodePort) -> None:
    agent = await port.enrolled()
    await agent.connect()
    await until(lambda: agent.revisions)
    clone = copy.copy(agent)
    clone._socket = clone._session = clone._reader = None
    clone.boot_id = str(uuid.uuid4())
    await clone.connect()
    await until(lambda: agent.closed)  # replaced
    await agent.connect()  # the first boot is back although a later one was seen
    await until(lambda: agent.closed and clone.closed)
    assert agent.bye is not None
    assert not agent.bye.retry
    assert await status(port) == NodeStatus.LOCKED
    assert (await refused(agent), await refused(clone)) == (403, 403)
    assert agent.resources[node_scope(agent.node_id)]  # nothing was taken away
    assert port.value("skynetvpn_node_locks_total") == 1
    await agent.close()
    await clone.close()


async def test_a_host_that_was_enrolled_anew_ends_its_old_session_and_is_not_locked_by_it(
    database: Database, tmp_path: Path
) -> None:
    async with node_port(database, tmp_path / "ca", promotion_grace=timedelta(0)) as port:
        old = await port.enrolled()
        await old.connect()
        await asyncio.sleep(1.0 - time.time() % 1)  # certificates tell time in whole seconds
        new = await port.enrolled()
        await until(lambda: old.closed)
        assert await refused(old) == 401
        assert await status(port) == NodeStatus.ENABLED
        await new.connect()
        assert new.received(Welcome)
        await new.close()


async def test_a_rebooting_host_is_no_clone(port: NodePort) -> None:
    agent = await port.enrolled()
    for _ in range(3):
        agent.boot_id = str(uuid.uuid4())
        await agent.connect()
        await agent.connect()
    assert await status(port) == NodeStatus.ENABLED
    await agent.close()


@pytest.mark.parametrize("blocked", [NodeStatus.DISABLED, NodeStatus.LOCKED])
async def test_a_node_that_is_cut_off_is_gone_within_a_second(
    database: Database, tmp_path: Path, blocked: NodeStatus
) -> None:
    async with node_port(database, tmp_path / "ca", intervals=NEVER) as port:  # not by the periodic check
        agent = await port.enrolled()
        await agent.connect()
        await port.fleet.set_status("node-1", blocked)
        await until(lambda: agent.closed, deadline=1.0)
        assert agent.bye is not None
        assert agent.bye.retry is (blocked is NodeStatus.DISABLED)
        assert await refused(agent) == 403
        await port.fleet.set_status("node-1", NodeStatus.ENABLED)
        await agent.connect()
        assert agent.received(Welcome)
        await agent.close()


@pytest.mark.parametrize("deleted", [False, True])
async def test_a_node_that_is_cut_off_while_it_connects_gets_no_session(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deleted: bool
) -> None:
    async with node_port(database, tmp_path / "ca", intervals=NEVER) as port:
        agent = await port.enrolled()
        admit = Identities.admit

        async def overtaken(identities: Identities, identity: Identity) -> Admitted:
            admitted = await admit(identities, identity)
            await port.fleet.set_status("node-1", NodeStatus.DISABLED)
            if deleted:
                await port.fleet.delete("node-1")
            await until(lambda: not port.hub._check_now.is_set())  # the check has begun: it is none of the live ones
            return admitted

        monkeypatch.setattr(Identities, "admit", overtaken)
        await agent.connect()
        await until(lambda: agent.closed, deadline=1.0)
        assert agent.bye is not None
        assert agent.bye.retry is not deleted
        assert not agent.received(Welcome)
        await agent.close()


async def test_a_command_line_in_another_process_cuts_a_node_off_within_a_second(
    database: Database, tmp_path: Path
) -> None:
    async with node_port(database, tmp_path / "ca", intervals=NEVER) as port:
        agent = await port.enrolled()
        await agent.connect()
        noticed: list[Committed] = []
        database.listen(lambda committed: noticed.append(committed) if committed.scopes is None else None)
        watcher = asyncio.create_task(Watcher(database).run())
        beside = open_database(str(database.engine.url), database.secrets)
        fleet = Fleet(beside, port.authority.pin, port.settings)
        while not noticed:  # its first look is only its base line
            await fleet.set_status("node-1", NodeStatus.MAINTENANCE)
            await fleet.set_status("node-1", NodeStatus.ENABLED)
        await fleet.set_status("node-1", NodeStatus.DISABLED)
        await until(lambda: agent.closed, deadline=1.0)
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        await beside.close()
        await agent.close()


async def test_a_node_that_does_not_read_is_cut_off_as_well(port: NodePort) -> None:
    agent = await port.enrolled()
    socket = await agent.open()
    await agent.send(agent.hello())
    assert isinstance(await agent.receive(), Welcome)  # and nothing is read from now on
    await port.fleet.set_status("node-1", NodeStatus.DISABLED)
    await until(lambda: agent.node_id not in port.hub.online, deadline=2.0)
    assert not socket.closed
    await agent.close()


async def test_maintenance_keeps_the_session(port: NodePort) -> None:
    agent = await port.enrolled()
    await agent.connect()
    await port.fleet.set_status("node-1", NodeStatus.MAINTENANCE)
    await until(lambda: port.directory.known(agent.node_id).status == ServerStatus.MAINTENANCE)
    assert not agent.closed
    await agent.connect()
    assert agent.received(Welcome)
    await agent.close()


async def test_an_expired_session_ends(database: Database, tmp_path: Path) -> None:
    async with node_port(database, tmp_path / "ca", certificate_lifetime=timedelta(seconds=2)) as port:
        agent = await port.enrolled()
        await agent.connect()
        await until(lambda: agent.closed, deadline=5)
        assert agent.bye is not None
        assert "expired" in agent.bye.reason
        await agent.close()


async def test_the_server_certificate_is_renewed_in_the_running_process(port: NodePort) -> None:
    async def serial() -> str:
        _, writer = await asyncio.open_connection(
            "127.0.0.1", port.port, ssl=agent.context(), server_hostname="controller.skynetvpn.internal"
        )
        found = writer.get_extra_info("peercert")["serialNumber"]
        writer.close()
        await writer.wait_closed()
        return str(found)

    agent = await port.enrolled()
    await agent.connect()
    before = await serial()
    port.tls.renew()
    assert await serial() != before
    assert not agent.closed
    await agent.close()


@pytest.mark.parametrize(
    "data",
    [b"", b"\xc1", bytes(range(100, 200)), b"\x81\xa1t\xa7applied", b"\x81\xa1t\xa5hello"],
    ids=lambda data: data[:4].hex(),
)
async def test_a_malformed_frame_ends_the_session_with_a_reason(port: NodePort, data: bytes) -> None:
    agent = await port.enrolled()
    await agent.connect()
    await agent.send_raw(data)
    await until(lambda: agent.closed)
    assert agent.bye is not None
    assert agent.bye.reason
    await agent.close()


@pytest.mark.parametrize("name", ["boot_id", "generation"])
async def test_a_report_that_cannot_be_stored_ends_the_session(port: NodePort, name: str) -> None:
    agent = await port.enrolled()
    await agent.connect()
    await agent.send(Report(**{"sequence": 1, "boot_id": agent.boot_id, "generation": "g", name: "a\0b"}))
    await until(lambda: agent.closed)
    assert agent.bye is not None and "NUL" in agent.bye.reason
    assert not port.reports
    await agent.close()


async def test_an_unknown_kind_is_skipped(port: NodePort) -> None:
    agent = await port.enrolled()
    await agent.connect()
    await agent.send_raw(b"\x82\xa1t\xa6future\xa1x\x01")
    await agent.send(Report(sequence=1, boot_id=agent.boot_id, generation="g"))
    await until(lambda: port.reports)
    assert not agent.closed
    await agent.close()


async def test_a_first_frame_that_is_no_hello_ends_the_session(port: NodePort) -> None:
    agent = await port.enrolled()
    await agent.open()
    await agent.send(Report(sequence=1, boot_id="b", generation="g"))
    assert getattr(await agent.receive(), "reason", "") == "the first frame is a hello"
    await agent.close()
    assert not port.reports
