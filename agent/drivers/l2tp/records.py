"""The folder of the sessions' records, and the file of secrets; everything here blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from agent.drivers.base import DriverError
from agent.drivers.l2tp.files import chap_secrets, read_chap_secrets
from agent.drivers.l2tp.sessions import Final, Record, parse_final, parse_record
from agent.errors import AgentError
from agent.files import write_private

_FINAL = ".final"


class Records:
    def __init__(self, directory: Path, boot_id: str) -> None:
        self._directory = directory
        self._boot_id = boot_id

    def read(self) -> list[Record]:
        """The records of this boot; those of former ones go."""
        found: list[Record] = []
        for path in self._paths():
            with contextlib.suppress(FileNotFoundError):
                since = int(path.stat().st_mtime)
                record = parse_record(path.name, path.read_text(errors="replace"), since, _final(path))
                if record is not None and record.boot_id == self._boot_id:
                    found.append(record)
                elif record is not None:
                    self.delete(record)
        return found

    def delete(self, record: Record) -> None:
        path = self._directory / f"{record.process.pid}-{record.process.started}"
        path.unlink(missing_ok=True)
        _final_path(path).unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        try:
            paths = list(self._directory.iterdir())
        except FileNotFoundError:
            return []
        records = {path.name for path in paths if not path.name.endswith(_FINAL)}
        for path in paths:
            if path.name not in records and path.name.removesuffix(_FINAL) not in records:
                path.unlink(missing_ok=True)  # of a session whose end was told already
        return [path for path in paths if path.name in records]


class Secrets:
    """chap-secrets, written whole or not at all."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, str]:
        try:
            return read_chap_secrets(self._path.read_text(errors="replace"))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise DriverError(f"{self._path} cannot be read: {error.strerror}") from error

    def write(self, secrets: Mapping[str, str]) -> None:
        write(self._path, chap_secrets(secrets))


def write(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace a private file in one step."""
    try:
        write_private(path, text.encode())
        if mode != 0o600:
            path.chmod(mode)
    except AgentError as error:
        raise DriverError(str(error)) from error


def _final(record: Path) -> Final | None:
    path = _final_path(record)
    try:
        return parse_final(path.read_text(errors="replace"), int(path.stat().st_mtime))
    except FileNotFoundError:
        return None


def _final_path(record: Path) -> Path:
    return record.with_name(record.name + _FINAL)
