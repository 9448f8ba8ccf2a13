"""Threat 4: what proves a user proves no node, and the other way round; each port knows only its own."""

from __future__ import annotations

import io

import aiohttp
import msgspec
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from controller.accounts.service import Client
from controller.contracts.kit import Api
from controller.contracts.kit.accesslog import AccessLog
from controller.store.database import Database
from shared.protocol import CHANNEL_PATH, CONTROLLER_NAME, ENROL_PATH, EnrolRefusal
from tests.contracts.world import PASSWORD, SETTINGS, build_world
from tests.support.node_port import FakeAgent, NodePort


async def test_a_users_token_opens_nothing_on_the_node_port(port: NodePort, database: Database) -> None:
    async with build_world(database) as world:
        token, _ = await world.accounts.login("alice", PASSWORD, "skynet", Client())
    host = FakeAgent(port.port, port.authority.bundle)
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await host.open(Authorization=f"Bearer {token}")
    await host.close()
    assert refused.value.status == 401
    async with aiohttp.ClientSession(f"https://127.0.0.1:{port.port}") as session:
        options = {"ssl": host.context(), "server_hostname": CONTROLLER_NAME}
        headers = {"Authorization": f"Bearer {token}"}
        for path in ("/api/users/me", "/skynet/api/users/me", "/metrics", "/docs"):
            async with session.get(path, headers=headers, **options) as answer:  # type: ignore[arg-type]
                assert answer.status == 404, path
        async with session.get(CHANNEL_PATH, headers=headers, **options) as answer:  # type: ignore[arg-type]
            assert msgspec.msgpack.decode(await answer.read(), type=EnrolRefusal).code == "certificate_missing"
    assert port.hub.online == frozenset()


async def test_a_nodes_certificate_opens_nothing_of_the_users_api(port: NodePort, database: Database) -> None:
    agent = await port.enrolled()
    async with build_world(database) as world:
        api = Api([world.skynet], world.accounts, SETTINGS, CollectorRegistry(), AccessLog(io.BytesIO()))
        runner = web.ServerRunner(api.listener(access_log=None))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=port.tls.context)  # where the certificate is seen
        await site.start()
        async with aiohttp.ClientSession(f"https://127.0.0.1:{runner.addresses[0][1]}") as session:
            options = {"ssl": agent.context(), "server_hostname": CONTROLLER_NAME}
            for token in (None, agent.node_id, agent.certificate.hex()[:43], "sky_" + agent.certificate.hex()[:43]):
                headers = {"Authorization": f"Bearer {token}"} if token else {}
                async with session.get("/api/users/me", headers=headers, **options) as answer:  # type: ignore[arg-type]
                    assert (answer.status, (await answer.json())["code"]) == (401, 401)
            for path in (ENROL_PATH, CHANNEL_PATH):
                async with session.get(path, **options) as answer:  # type: ignore[arg-type]
                    assert answer.status == 404
        await runner.cleanup()
