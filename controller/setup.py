"""Makes a controller's directory: settings, authority, secret, database."""

from __future__ import annotations

import asyncio
from pathlib import Path

import yaml

from controller import privatefile
from controller.config import Config, new_secret_line, read_config, read_secrets
from controller.errors import Unusable
from controller.fleet import ca
from controller.store.database import StoreUnavailable, open_database
from controller.store.migrate import migrate

_HEADER = "# The controller's settings; docs/operations.md has them all. Paths are relative to this file.\n"
_NOT_MADE = "cannot make {}: {}; when that is mended, run init again"


class AlreadyThere(Unusable):
    """The directory holds a controller; it is never overwritten."""


class NotMade(Unusable):
    """The disk is full, say; what is there does not keep the next try from working."""


async def initialise(directory: Path, listen: str | None, node_listen: str | None, node_address: str | None) -> Config:
    """Make the directory; raise AlreadyThere, NotMade or SettingsError, and then leave no settings file behind."""
    settings = {
        "database_url": "sqlite+aiosqlite:///controller.db",
        "ca_directory": "ca",
        "secret_key_file": "secret.key",
        "listen": listen,
        "node_listen": node_listen,
        "node_address": node_address,
    }
    chosen = {name: value for name, value in settings.items() if value is not None}
    try:
        return await _make(directory, chosen)
    except OSError as error:
        raise NotMade(_NOT_MADE.format(directory, error.strerror or error)) from error
    except StoreUnavailable as error:
        raise NotMade(_NOT_MADE.format(directory, error.reason)) from error


async def _make(directory: Path, settings: dict[str, str]) -> Config:
    path = await asyncio.to_thread(_make_files, directory, settings)
    try:
        config = await asyncio.to_thread(read_config, path, {})
        database = open_database(config.database_url, await asyncio.to_thread(read_secrets, config.secret_key_file))
        try:
            await migrate(database)
        finally:
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
    if not (directory / "secret.key").exists():
        privatefile.write(directory / "secret.key", new_secret_line().encode())
    privatefile.write(path, (_HEADER + yaml.safe_dump(settings, sort_keys=False)).encode())
    return path
