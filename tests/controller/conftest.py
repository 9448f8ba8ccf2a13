"""What the controller keeps, it keeps on either engine."""

from __future__ import annotations

import pytest

from tests.support.postgresql import ENGINES


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """Each test that asks for a database runs on both; one about a single engine says so with `only`."""
    return str(request.param)
