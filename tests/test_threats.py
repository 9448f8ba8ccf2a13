"""docs/threats.md names tests that exist."""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/threats.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)


@lru_cache
def defined(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize(("path", "name"), NAMED, ids=lambda part: part)
def test_a_named_test_exists(path: str, name: str) -> None:
    assert name.startswith("test_")
    assert name in defined(path)


def test_every_threat_has_a_test_and_every_word_in_the_column_is_one() -> None:
    rows = re.findall(r"^\| (\d+) \|[^|]+\|[^|]+\|([^|]+)\|$", TEXT, re.MULTILINE)
    assert [int(number) for number, _ in rows] == [*range(1, 17), *range(18, 22), 26, 28, 29, 30]
    for number, tests in rows:
        words = tests.split()
        assert words, number
        assert all(re.fullmatch(r"`tests/[\w/]+\.py::test_\w+`", word) for word in words), number
