"""Threat 11: text that would mean something to whoever shows, logs or renders it."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from controller.accounts.tables import UserRow
from controller.tunnels.tables import ConnectionRow
from shared.keys import PrivateKey
from tests.contracts.skynet.test_endpoints import connect, refused, refused_login
from tests.contracts.world import PASSWORD, Api, World

UNPRINTABLE = ["a\nb", "a\r\nb: c", "a\0b", "\x1b[2J", "a\x7fb", "a\u2028b", "a\u2029b", "", "a" * 65_000]
MISLEADING = ["\u202egnp.exe", "\u200fa", "a\u200bb", "\ufeffa"]
PRINTABLE = [
    "a;id",
    "a|b",
    "$(id)",
    "`id`",
    "a\"b'c",
    "# a",
    "100%s",
    "{0}",
    "<b>",
    "[Peer] x",
    "=1+1",
    "../../x",
    "ж👍",
]


@pytest.mark.parametrize("text", UNPRINTABLE, ids=lambda text: ascii(text[:8]))
async def test_unprintable_text_is_refused_and_named_everywhere(alice: Api, world: World, text: str) -> None:
    wanted = {"server_id": world.nodes["fra-1"], "protocol": "wireguard"}
    login = await alice.post("/api/auth/login", {"username": text, "password": PASSWORD})
    refused_login(alice, login, 400, "username: ")
    refused(await alice.post("/api/connections", wanted | {"device_id": text}), 400, "device_id: ")
    refused(await alice.post("/api/connections", wanted | {"server_id": text}), 400, "server_id: ")
    refused(await alice.post("/api/connections", wanted | {"public_key": text}), 400, "public_key: ")
    refused(await alice.call("PATCH", "/api/users/me", {"email": f"{text}@example.com"}), 400, "email: ")
    assert await stored(world) == []


@pytest.mark.parametrize("text", MISLEADING, ids=ascii)
async def test_text_that_reads_otherwise_than_it_is_is_never_stored(alice: Api, world: World, text: str) -> None:
    wanted = {"server_id": world.nodes["fra-1"], "protocol": "wireguard", "device_id": text}
    refused(await alice.post("/api/connections", wanted), 400, "device_id: ")
    refused(await alice.call("PATCH", "/api/users/me", {"email": f"{text}@example.com"}), 400, "email: ")
    assert await stored(world) == []


@pytest.mark.parametrize("text", PRINTABLE)
async def test_printable_text_is_kept_as_it_is_and_reaches_no_config(alice: Api, world: World, text: str) -> None:
    key = str(PrivateKey.generate().public())
    connection_id = await connect(alice, world, public_key=key, device_id=text)
    assert await stored(world) == [text]
    assert text.encode() not in (await alice.get(f"/api/connections/{connection_id}/config")).raw


async def stored(world: World) -> list[str | None]:
    async with world.database.read() as session:
        people = set(await session.scalars(sa.select(UserRow.email)))
        assert people == {"alice@example.com", "bob@example.com"}
        return list(await session.scalars(sa.select(ConnectionRow.device_id)))
