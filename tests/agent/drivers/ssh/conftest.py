"""A node that serves SSH, and its neighbours."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agent.drivers.ssh import Ssh
from tests.support.openssh import SPEC, Net, alice, network


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    with network(tmp_path) as made:
        yield made


@pytest.fixture
async def driver(net: Net) -> AsyncIterator[Ssh]:
    """Serving, with one login: alice."""
    made = net.driver()
    await made.ensure(SPEC)
    assert await made.put([alice()]) == {}
    yield made
    for opened in net.opened:
        await opened.close()
