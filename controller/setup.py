"""Makes a controller's directory: settings, authority, secret, database."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import yaml

from controller.config import Config, new_secret_line, read_config, read_secrets
from controller.errors import Unusable
from controller.fleet import ca
from controller.store.database import open_database
from controller.store.migrate import migrate

_HEADER = "# The controller's settings; docs/operations.md has them all. Paths are relative to this file.\n"


class AlreadyThere(Unusable):
    """The directory holds a controller; it is never overwritten."""


async def initialise(directory: Path, listen: str | None, node_listen: str | None, node_address: str | None) -> Config:
    """Make the directory; raise AlreadyThere, OSError or SettingsError, and then leave no settings file behind."""
    settings = {
        "database_url": "sqlite+aiosqlite:///controller.db",
        "ca_directory": "ca",
        "secret_key_file": "secret.key",
        "listen": listen,
        "node_listen": node_listen,
        "node_address": node_address,
    }
    chosen = {name: value for name, value in settings.items() if value is not None}
    path = await asyncio.to_thread(_make_files, directory, chosen)
    try:
        config = await asyncio.to_thread(read_config, path, {})
        database = open_database(config.database_url, await asyncio.to_thread(read_secrets, config.secret_key_file))
        await migrate(database)
        await database.close()
    except BaseException:
        await asyncio.to_thread(path.unlink)
        raise
    return config


def _make_files(directory: Path, settings: dict[str, str]) -> Path:
    path = directory / "controller.yaml"
    if path.exists():
        raise AlreadyThere(f"{path} exists already: run it, or choose another directory")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (directory / "ca" / "ca.key").exists():
        ca.create(directory / "ca")
    _write_private(directory / "secret.key", new_secret_line())
    _write_private(path, _HEADER + yaml.safe_dump(settings, sort_keys=False))
    return path


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner reads; one that is there already stays as it is."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
