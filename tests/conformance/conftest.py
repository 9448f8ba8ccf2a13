"""A host in a namespace of its own, and the WireGuard driver that it runs, once for each backend."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator

import pytest

from agent.drivers.base import Unsupported
from agent.drivers.wireguard import Backend, choose
from agent.drivers.wireguard.kernel import KernelWireGuard
from agent.drivers.wireguard.userspace import UserspaceWireGuard
from tests.support.netns import Namespace

Driver = KernelWireGuard | UserspaceWireGuard


@pytest.fixture(
    params=[
        pytest.param(Backend.USERSPACE, marks=pytest.mark.netns),
        pytest.param(Backend.KERNEL, marks=pytest.mark.kernel),
    ]
)
def backend(request: pytest.FixtureRequest) -> Backend:
    chosen: Backend = request.param
    if chosen is Backend.KERNEL:
        try:
            asyncio.run(_try(chosen))
        except Unsupported as error:
            if os.environ.get("SKYNETVPN_KERNEL_TESTS"):
                raise  # in the virtual machine a kernel without WireGuard is a failure
            pytest.skip(f"{error}: runs inside the virtual machine")
    return chosen


@pytest.fixture
def host(backend: Backend) -> Iterator[Namespace]:
    """The namespace that the test itself is in."""
    with Namespace("host") as namespace, namespace.entered():
        yield namespace


@pytest.fixture
def far(host: Namespace) -> Iterator[Namespace]:
    """Another host, which reaches the first at 192.0.2.1 and 2001:db8::1."""
    with Namespace("far") as namespace:
        host.connect(namespace, "192.0.2.1/24", "192.0.2.2/24", ("2001:db8::1/64", "2001:db8::2/64"))
        yield namespace


@pytest.fixture
async def driver(backend: Backend, host: Namespace) -> AsyncIterator[Driver]:
    opened = await choose(backend)
    yield opened
    await opened.close()


async def _try(backend: Backend) -> None:
    await (await choose(backend)).close()
