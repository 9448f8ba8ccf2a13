"""One enrolled installation per session as a template, one running copy of it per module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.fleet.installation import Installation, Template, make_template


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    return make_template(tmp_path_factory.mktemp("template"))


@pytest.fixture(scope="module")
def prepared(template: Template, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """An installation that is cabled, and nothing more."""
    with ExitStack() as stack:
        yield Installation(template, tmp_path_factory.mktemp("fleet"), stack)


@pytest.fixture(scope="module")
def fleet(prepared: Installation) -> Installation:
    """An installation that runs."""
    prepared.copy_template()
    prepared.begin()
    return prepared
