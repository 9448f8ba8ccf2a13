"""Joining the fleet over real TLS: one token, one host, whatever is lost or tried."""

from __future__ import annotations

import asyncio
import dataclasses
from datetime import timedelta
from pathlib import Path

import aiohttp
import msgspec
import pytest
import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from structlog.testing import capture_logs

from controller.fleet.certificates import identity_from
from controller.fleet.errors import NodeNotFound
from controller.fleet.nodes import NodeSpec, NodeStatus
from controller.fleet.tables import JoinTokenRow, NodeRow
from controller.store.database import Database
from shared import jointoken
from shared.protocol import CA_PATH, CONTROLLER_NAME, EnrolAnswer, EnrolRefusal
from tests.support.node_port import FakeAgent, NodePort, node_port, signing_request

SPEC = NodeSpec(name="node-1", country="DE", city="Berlin")
REFUSED = (401, "join_token_refused")


def host(port: NodePort) -> FakeAgent:
    return FakeAgent(port.port, port.authority.bundle)


async def test_a_token_is_exchanged_for_an_identity_of_ours(port: NodePort, database: Database) -> None:
    agent = host(port)
    answer = await agent.enrol(await port.fleet.issue_join_token(SPEC))
    identity = identity_from(x509.load_pem_x509_certificate(answer.certificate))
    assert identity is not None
    assert identity.node_id == answer.node_id
    assert answer.name == "node-1"
    assert answer.ca == port.authority.bundle
    async with database.read() as session:
        row = await session.get_one(NodeRow, answer.node_id)
    assert (row.serial, row.wireguard_public_key, row.address) == (identity.serial, agent.wireguard, "127.0.0.1")
    assert port.value("skynetvpn_enrolments_total", result="accepted") == 1


async def test_a_host_without_a_certificate_may_read_the_authority_to_pin(port: NodePort) -> None:
    url = f"https://127.0.0.1:{port.port}{CA_PATH}"
    async with (
        aiohttp.ClientSession() as session,
        session.get(url, ssl=host(port).context(), server_hostname=CONTROLLER_NAME) as response,
    ):
        assert await response.read() == port.authority.bundle
    assert jointoken.decode(await port.fleet.issue_join_token(SPEC)).ca_pin == port.authority.pin


async def test_the_secret_is_neither_stored_nor_logged(port: NodePort, database: Database) -> None:
    token = await port.fleet.issue_join_token(SPEC)
    secret = jointoken.decode(token).secret
    agent = host(port)
    with capture_logs() as logs:
        await agent.enrol(token)
        assert await host(port).try_enrol(agent.request(token, csr=signing_request(host(port).key))) == REFUSED
    async with database.read() as session:
        row = (await session.scalars(sa.select(JoinTokenRow))).one()
        assert secret not in (row.secret_hash, row.used_spki, row.certificate)
    assert [entry["log_level"] for entry in logs if entry["event"] == "fleet.enrolment_refused"] == ["warning"]
    assert secret.hex() not in repr(logs)
    assert repr(secret) not in repr(logs)
    assert token not in repr(logs)


async def test_of_200_hosts_at_once_exactly_one_gets_in(port: NodePort) -> None:
    token = await port.fleet.issue_join_token(SPEC)
    answers = await asyncio.gather(
        *(agent.try_enrol(agent.request(token)) for agent in [host(port) for _ in range(200)])
    )
    winners = [answer for answer in answers if isinstance(answer, EnrolAnswer)]
    assert len(winners) == 1
    assert [answer for answer in answers if not isinstance(answer, EnrolAnswer)] == [REFUSED] * 199


async def test_a_lost_answer_is_given_again_to_the_same_key_only(port: NodePort) -> None:
    token = await port.fleet.issue_join_token(SPEC)
    agent, thief = host(port), host(port)
    first = await agent.try_enrol(agent.request(token))
    again = await agent.try_enrol(agent.request(token))
    assert isinstance(first, EnrolAnswer)
    assert again == first
    assert await thief.try_enrol(thief.request(token)) == REFUSED


async def test_every_wrong_token_is_refused_alike(port: NodePort) -> None:
    good = jointoken.decode(await port.fleet.issue_join_token(SPEC))
    expired = jointoken.decode(
        await port.fleet.issue_join_token(dataclasses.replace(SPEC, name="node-2"), lifetime=timedelta(seconds=-1))
    )
    wrong_secret = msgspec.structs.replace(good, secret=bytes([good.secret[0] ^ 1]) + good.secret[1:])
    unknown = msgspec.structs.replace(good, id="01890a5d-ac96-774b-bcce-b302099a8057")
    crossed = msgspec.structs.replace(good, id=expired.id)
    bodies = set()
    for token in (expired, wrong_secret, unknown, crossed):
        agent = host(port)
        status, body = await agent.post(msgspec.msgpack.encode(agent.request(token.encode())))
        assert status == 401
        bodies.add(body)
    assert len(bodies) == 1
    agent = host(port)
    assert isinstance(await agent.try_enrol(agent.request(good.encode())), EnrolAnswer)


async def test_a_new_token_voids_the_one_before(port: NodePort) -> None:
    first = await port.fleet.issue_join_token(SPEC)
    second = await port.fleet.reissue_join_token("node-1")
    agent = host(port)
    assert await agent.try_enrol(agent.request(first)) == REFUSED
    assert isinstance(await agent.try_enrol(agent.request(second)), EnrolAnswer)
    with pytest.raises(NodeNotFound):
        await port.fleet.reissue_join_token("nowhere")


async def test_a_refused_request_leaves_the_token_usable(port: NodePort) -> None:
    other = await port.enrolled("node-2")
    token = await port.fleet.issue_join_token(SPEC)
    agent = host(port)
    weak = agent.request(token, csr=signing_request(rsa.generate_private_key(65537, 1024)))
    assert await agent.try_enrol(weak) == (400, "certificate_request_invalid")
    stolen = msgspec.structs.replace(agent.request(token), wireguard_public_key=other.wireguard)
    assert await agent.try_enrol(stolen) == (409, "wireguard_key_taken")
    zero = msgspec.structs.replace(agent.request(token), wireguard_public_key=bytes(32))
    assert await agent.try_enrol(zero) == (400, "wireguard_key_invalid")
    assert isinstance(await agent.try_enrol(agent.request(token)), EnrolAnswer)


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x80", b"\xff" * 100, b'{"token_id": "x"}'])
async def test_a_malformed_body_is_refused(port: NodePort, body: bytes) -> None:
    status, answer = await host(port).post(body)
    assert status == 400
    assert msgspec.msgpack.decode(answer, type=EnrolRefusal).code == "enrolment_malformed"


async def test_an_oversized_body_is_refused_unread(port: NodePort) -> None:
    status, answer = await host(port).post(b"\x00" * 1_000_000)
    assert status == 413
    assert msgspec.msgpack.decode(answer, type=EnrolRefusal).code == "too_large"


async def test_enrolments_are_limited_per_address(database: Database, tmp_path: Path) -> None:
    async with node_port(database, tmp_path / "ca", enrolments_per_minute=3) as port:
        statuses = [(await host(port).post(b"nonsense"))[0] for _ in range(8)]
    assert statuses[:3] == [400] * 3
    assert statuses[-1] == 429


async def test_enrolling_again_unlocks_a_cloned_node_but_not_a_disabled_one(port: NodePort) -> None:
    for before, after in ((NodeStatus.LOCKED, NodeStatus.ENABLED), (NodeStatus.DISABLED, NodeStatus.DISABLED)):
        await port.enrolled("node-1")
        await port.fleet.set_status("node-1", before)
        await host(port).enrol(await port.fleet.reissue_join_token("node-1"))
        assert [node.status for node in await port.fleet.nodes()] == [after]
