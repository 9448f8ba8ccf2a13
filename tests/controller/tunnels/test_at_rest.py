"""What the database's files hold of the secrets of connections: as little as they can, and nothing afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from controller.access.tables import CredentialRow
from controller.desired.tables import DesiredRow
from controller.tunnels.tables import ConnectionRow
from tests.support.postgresql import only

pytestmark = only("sqlite")  # PostgreSQL's files are not the controller's


def held(directory: Path, secret: bytes) -> list[str]:
    """The files that the secret can be read from."""
    return [path.name for path in sorted(directory.glob("controller.db*")) if secret in path.read_bytes()]


async def test_nothing_of_an_ended_connection_is_left_in_the_file(world: Any, tmp_path: Path) -> None:
    tunnels = world.tunnels()
    made = await tunnels.create(world.alice, "skynet", world.nodes[0], "wireguard")
    config = await tunnels.client_config(world.alice, made.id)
    assert config.private_key is not None and config.preshared_key is not None
    await checkpoint(world)
    for secret in (config.private_key, config.preshared_key):
        assert held(tmp_path, secret.raw) == []  # sealed from the start
    async with world.database.read() as session:
        kept = await session.get_one(ConnectionRow, made.id)
        payloads = (await session.scalars(sa.select(DesiredRow.payload))).all()
    assert held(tmp_path, kept.sealed_preshared_key) == ["controller.db"]
    await tunnels.terminate(world.alice, made.id)
    await checkpoint(world)
    for sealed in (kept.sealed_private_key, kept.sealed_preshared_key, *payloads):
        assert held(tmp_path, sealed) == []
    assert held(tmp_path, made.id.encode()) == ["controller.db"]


@pytest.mark.parametrize("protocol", ["openvpn", "ssh", "l2tp"])
async def test_nothing_of_an_ended_login_is_left_in_the_file(world: Any, tmp_path: Path, protocol: str) -> None:
    tunnels = world.tunnels()
    made = await tunnels.create(world.alice, "skynet", world.nodes[-1], protocol)
    config = await tunnels.client_config(world.alice, made.id)
    [login] = await world.credentials()
    await checkpoint(world)
    for name in ("password", "private_key", "tls_crypt"):
        assert held(tmp_path, getattr(config, name, "not there").encode()) == []
    assert login.secret == "" or held(tmp_path, login.secret.encode()) == []
    async with world.database.read() as session:
        kept = (await session.scalars(sa.select(CredentialRow))).one()
        payload = await session.scalar(sa.select(DesiredRow.payload).where(DesiredRow.key == login.key))
    columns = [kept.sealed_secret, kept.sealed_password, kept.sealed_private_key, kept.sealed_tls_crypt]
    sealed = [value for value in (*columns, payload) if value is not None]
    assert len(sealed) == (4 if protocol == "openvpn" else 3)
    assert all(held(tmp_path, value) == ["controller.db"] for value in sealed)
    await tunnels.terminate(world.alice, made.id)
    await checkpoint(world)
    assert not any(held(tmp_path, value) for value in sealed)


async def checkpoint(world: Any) -> None:
    """The log goes into the file, as it does by itself after some more commits."""
    async with world.database.engine.connect() as connection:
        raw = await connection.get_raw_connection()
        await raw.driver_connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
