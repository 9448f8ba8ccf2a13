"""The requirement files pin what pyproject.toml asks for, by hash and from no particular index."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {
    "agent": ("agent",),
    "controller": ("controller", "postgresql"),
    "dev": ("controller", "postgresql", "agent", "dev"),
}


@pytest.mark.parametrize("name", [*EXTRAS, "bench"])
def test_every_package_has_its_hashes_and_no_index_is_named(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    package = r"[\w.-]+(\[[\w,-]+\])?==\S+( ; [^\n]*)?( \\\n +--hash=sha256:[0-9a-f]{64})+\n"
    assert re.fullmatch(f"({package})+", text)


@pytest.mark.parametrize("name", EXTRAS)
def test_what_is_asked_for_is_pinned(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    pinned = {match[1]: match[2] for match in re.finditer(r"^([\w.-]+)(?:\[.*?\])?==(\S+)", text, re.MULTILINE)}
    asked = [*PROJECT["dependencies"]]
    for extra in EXTRAS[name]:
        asked += PROJECT["optional-dependencies"][extra]
    for requirement in map(Requirement, asked):
        assert pinned[requirement.name.lower()] in requirement.specifier, requirement
