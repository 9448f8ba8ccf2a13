"""What the documents name is there, and what an operator can set, read or run is in the documents."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from agent.config import Config as AgentConfig
from agent.counters import Counters
from agent.metrics import render_agent, render_peers
from controller.config import Config as ControllerConfig

ROOT = Path(__file__).parent.parent
OPERATIONS = (ROOT / "docs/operations.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def leaves(settings: type[Any], table: str = "") -> Iterator[str]:
    """The dotted names of all settings; `<…>` stands for a key that the operator chooses."""
    for name, hint in get_type_hints(settings).items():
        if name not in {field.name for field in fields(settings)}:
            continue
        value = next((argument for argument in get_args(hint) if is_dataclass(argument)), None)
        if isinstance(hint, type) and is_dataclass(hint):
            yield from leaves(hint, f"{table}{name}.")
        elif isinstance(value, type):
            yield from leaves(value, f"{table}{name}.<{'contract' if name == 'rate_limits' else 'plan'}>.")
        else:
            yield table + name


def documented(heading: str) -> set[str]:
    """The names in the first column of the section's table; `.name` belongs to the table of the one before."""
    section = OPERATIONS.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    names, table = set(), ""
    for row in re.findall(r"^\| (`.+?) \|", section, re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", row):
            if not name.startswith("."):
                table = name.rpartition(".")[0]
            names.add(table + name if name.startswith(".") else name)
    return names


def stem(metric: str) -> str:
    return re.sub(r"_(total|bucket|info)$", "", metric)


@pytest.mark.parametrize(
    ("heading", "settings"),
    [("Settings of the controller", ControllerConfig), ("Settings of the agent", AgentConfig)],
)
def test_settings_and_their_tables_are_the_same(heading: str, settings: type[Any]) -> None:
    assert documented(heading) == set(leaves(settings))


def test_metrics_and_their_table_are_the_same() -> None:
    served = "".join([*render_agent(Counters(), 0), *render_peers("sky0", {}, {})])
    exported = set(re.findall(r"^# TYPE (\S+)", served, re.MULTILINE))
    for source in (ROOT / "controller").rglob("*.py"):
        exported |= set(re.findall(r'"(skynetvpn_[a-z_]+)"', source.read_text()))
    told = re.findall(r"(?<!inet )\b(?:skynetvpn|wireguard)_[a-z_]+\b", OPERATIONS)  # tables of nft are no metrics
    assert {stem(name) for name in told} == {stem(name) for name in exported}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_what_a_document_tells_to_make_is_a_target(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    told = set(re.findall(r"(?:`|^#? ?|&& )make ([a-z][a-z-]*)", document.read_text(), re.MULTILINE))
    assert told <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []
