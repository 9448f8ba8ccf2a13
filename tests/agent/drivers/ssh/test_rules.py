"""The table as nft takes it, and its counters as the kernel gives them."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from agent.drivers import commands
from agent.drivers.ssh import rules
from agent.drivers.ssh.counters import Counters
from agent.drivers.ssh.rules import Client
from tests.support.netns import Namespace

pytestmark = pytest.mark.netns

TABLE = f"{rules.FAMILY} {rules.TABLE}"


def test_all_of_it_is_taken_twice() -> None:
    text = rules.render([22, 2222], [ip_address("127.0.0.53"), ip_address("2001:db8::53"), ip_address("10.0.0.2")])

    with Namespace("rules") as namespace:
        namespace.run("nft", "-f", "-", stdin=text)
        once = namespace.run("nft", "list", "ruleset")
        namespace.run("nft", "-f", "-", stdin=text)

        assert namespace.run("nft", "list", "ruleset") == once


def test_counters_are_read_by_client_and_taken_away() -> None:
    async def body() -> None:
        counters = Counters()
        try:
            assert await counters.read() == ({}, {})
            await counters.ensure(2222)
            for name, key in (("rx4", "192.0.2.7 . 40000"), ("tx4", "192.0.2.7 . 40000"), ("rx6", "2001:db8::7 . 5")):
                element = f"{{ {key} counter packets 3 bytes {len(key) << 33} }}"
                await commands.run(["nft", "add", "element", *TABLE.split(), name, element])

            rx, tx = await counters.read()

            assert rx == {Client("192.0.2.7", 40000): 17 << 33, Client("2001:db8::7", 5): 15 << 33}
            assert tx == {Client("192.0.2.7", 40000): 17 << 33}
            await counters.forget([Client("192.0.2.7", 40000), Client("192.0.2.8", 1)])
            assert await counters.read() == ({Client("2001:db8::7", 5): 15 << 33}, {})
            await counters.ensure(2223)
            assert await counters.read() == ({Client("2001:db8::7", 5): 15 << 33}, {})
            await counters.remove()
            await counters.remove()
            assert await counters.read() == ({}, {})
        finally:
            counters.close()

    with Namespace("rules") as namespace:
        namespace.call(body)


def test_a_table_that_somebody_flushed_is_loaded_again() -> None:
    async def body() -> None:
        counters = Counters()
        try:
            await counters.ensure(2222)
            before = namespace.run("nft", "list", "ruleset")
            namespace.run("nft", "flush", "ruleset")
            await counters.ensure(2222)
            assert namespace.run("nft", "list", "ruleset") == before
            namespace.run("nft", "flush", "chain", *TABLE.split(), "output")
            await counters.ensure(2222)
            assert namespace.run("nft", "list", "ruleset") == before
        finally:
            counters.close()

    with Namespace("rules") as namespace:
        namespace.call(body)
