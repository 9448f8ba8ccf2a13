"""servers, status and config."""

from __future__ import annotations

import os
import socket
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
from aiohttp import web

from agent.client import output
from agent.client.profile import LocalTunnel, Profile, load_or_make_key
from agent.client.tunnel import Counters

from .conftest import Cli, FakeController, server

LISTED = {
    "connection_id": "c1",
    "server_id": "s1",
    "status": "connected",
    "created_at": "2026-11-21T12:00:00Z",
    "protocol": "wireguard",
    "addresses": ["10.66.0.2/32"],
    "rx": 2048,
    "tx": 5,
    "latest_handshake": "2026-11-21T12:00:01Z",
    "a_field_of_later": True,
}


async def test_servers_are_a_table_and_the_documented_json(logged_in: Cli, controller: FakeController) -> None:
    controller.servers = [server("s1", name="fra1"), server("s2", name="ams1", status="offline")]

    text = await logged_in("servers")
    data = await logged_in("servers", "-o", "json")

    assert [line.split()[0] for line in text.out.splitlines()] == ["NAME", "fra1", "ams1"]
    assert data.json[0] == {"id": "s1", "name": "fra1", "country": "DE", "ip": "192.0.2.1", "status": "online"}


async def test_what_a_server_calls_itself_does_not_drive_the_terminal(
    logged_in: Cli, controller: FakeController
) -> None:
    controller.servers = [server("s1", name="fra\x1b[2J\n1")]

    outcome = await logged_in("servers")

    assert "\x1b" not in outcome.out
    assert len(outcome.out.splitlines()) == 2


async def test_status_joins_what_is_listed_with_the_servers_names(logged_in: Cli, controller: FakeController) -> None:
    controller.servers = [server("s1", name="fra1")]
    controller.connections = [dict(LISTED)]

    text = await logged_in("status")
    data = await logged_in("-o", "json", "status")

    assert "fra1" in text.out and "2.0 KiB" in text.out
    assert data.json[0]["server"] == "fra1" and data.json[0]["rx"] == 2048 and data.json[0]["interface"] is None


async def test_status_shows_a_tunnel_that_the_controller_has_ended(logged_in: Cli, home: Path) -> None:
    Profile.of_user().save_tunnel(LocalTunnel("c9", "s1", "fra1", "skyvpn7", "userspace", str(home / "k")))

    outcome = await logged_in("status")

    assert "disconnected" in outcome.out and "skyvpn7 (gone)" in outcome.out


@pytest.mark.parametrize("status", [502, 401])
async def test_status_shows_this_machines_tunnels_also_without_the_controller(
    logged_in: Cli, controller: FakeController, home: Path, status: int
) -> None:
    Profile.of_user().save_tunnel(LocalTunnel("c9", "s1", "fra1", "skyvpn7", "userspace", str(home / "k")))
    controller.answers["GET /connections"] = lambda: web.Response(status=status, text="away")

    outcome, text = await logged_in("-o", "json", "status"), await logged_in("status")

    assert outcome.status == (3 if status == 401 else 1)
    (row,) = outcome.json
    assert (row["server"], row["status"], row["latest_handshake"]) == ("fra1", "unknown", None)
    assert outcome.err.count("\n") == 1
    assert text.out.splitlines()[1].split() == ["fra1", "wireguard", "unknown", *"----", "skyvpn7", "(gone)", "c9"]


async def test_status_as_json_has_one_form_for_all_protocols(
    logged_in: Cli, controller: FakeController, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = Profile.of_user()
    for id, protocol in (("c1", "wireguard"), ("c2", "ssh"), ("c3", "openvpn")):
        profile.save_tunnel(
            LocalTunnel(id, "s1", "fra1", f"skyvpn{id}", protocol, str(home / id), ("10.6.0.9/32",), protocol=protocol)
        )
    began = int(datetime(2026, 11, 21, 12, 0, 7, tzinfo=UTC).timestamp())

    class Counting:
        @staticmethod
        async def counters(local: LocalTunnel) -> Counters | None:
            return {"c1": Counters(5, 6, 0), "c2": Counters(None, None, began)}.get(local.connection_id)

    monkeypatch.setattr("agent.client.means.of", lambda _local: Counting)
    reason = "the account may not connect now: it has expired"
    controller.servers = [server("s1", name="fra1")]
    controller.connections = [
        LISTED | {"connection_id": "c1"},
        LISTED | {"connection_id": "c2", "protocol": "ssh", "addresses": [], "refusal": reason},
    ]

    rows = (await logged_in("-o", "json", "status")).json

    assert len({tuple(row) for row in rows}) == 1
    assert [row["addresses"] for row in rows] == [["10.66.0.2/32"], ["10.6.0.9/32"], ["10.6.0.9/32"]]
    assert [row["status"] for row in rows] == ["connected", "connected", "disconnected"]
    assert [row["refusal"] for row in rows] == [None, reason, None]
    assert [row["local"] for row in rows] == [
        {"rx": 5, "tx": 6, "latest_handshake": None},
        {"rx": None, "tx": None, "latest_handshake": "2026-11-21T12:00:07Z"},
        None,
    ]
    assert (await logged_in("status")).out.splitlines()[-1] == reason


async def test_config_goes_to_a_private_file(logged_in: Cli, controller: FakeController, home: Path) -> None:
    controller.connections = [dict(LISTED)]
    controller.conf = "[Interface]\nAddress = 10.66.0.2/32\n"

    outcome = await logged_in("config", "--file", str(home / "tunnel.conf"))

    assert outcome.status == 0 and outcome.out == ""
    assert (home / "tunnel.conf").read_text() == controller.conf
    assert stat.S_IMODE((home / "tunnel.conf").stat().st_mode) == 0o600


async def test_config_goes_where_a_link_leads(logged_in: Cli, controller: FakeController, home: Path) -> None:
    controller.connections = [dict(LISTED)]
    controller.conf = "[Interface]\n"
    (home / "kept").mkdir()
    (home / "link.conf").symlink_to(home / "kept" / "tunnel.conf")

    outcome = await logged_in("config", "--file", str(home / "link.conf"))

    assert outcome.status == 0
    assert (home / "link.conf").is_symlink()
    assert (home / "kept" / "tunnel.conf").read_text() == controller.conf
    assert stat.S_IMODE((home / "kept" / "tunnel.conf").stat().st_mode) == 0o600


async def test_config_goes_into_a_pipe_and_does_not_replace_it(
    logged_in: Cli, controller: FakeController, home: Path
) -> None:
    controller.connections = [dict(LISTED)]
    controller.conf = "[Interface]\n"
    os.mkfifo(home / "pipe")
    reader = os.open(home / "pipe", os.O_RDONLY | os.O_NONBLOCK)

    outcome = await logged_in("config", "--file", str(home / "pipe"))

    assert outcome.status == 0
    assert os.read(reader, 100).decode() == controller.conf
    assert (home / "pipe").is_fifo()
    os.close(reader)


async def test_what_cannot_be_written_to_is_told_and_not_replaced(
    logged_in: Cli, controller: FakeController, home: Path
) -> None:
    controller.connections = [dict(LISTED)]
    controller.conf = "[Interface]\n"
    with socket.socket(socket.AF_UNIX) as special:
        special.bind(str(home / "special"))

        outcome = await logged_in("config", "--file", str(home / "special"))

    assert outcome.status == 1 and f"{home / 'special'}: No such device" in outcome.err
    assert (home / "special").is_socket()


@pytest.mark.parametrize("place", ["nowhere/x.conf", "."])
async def test_no_connection_is_opened_for_a_file_that_cannot_be_written(
    logged_in: Cli, controller: FakeController, home: Path, place: str
) -> None:
    controller.servers = [server("s1")]

    outcome = await logged_in("config", "--new", "--file", str(home / place))

    assert outcome.status == 1 and str(home / place) in outcome.err
    assert controller.requests == []


async def test_the_connection_ends_again_when_its_config_cannot_be_kept(
    logged_in: Cli, controller: FakeController, home: Path
) -> None:
    controller.servers = [server("s1")]
    (home / "gone").mkdir()

    def answer() -> web.StreamResponse:
        (home / "gone").rmdir()
        return web.Response(text="[Interface]")

    controller.answers["GET /connections/{id}/config"] = answer

    outcome = await logged_in("config", "--new", "--file", str(home / "gone" / "x.conf"))

    assert outcome.status == 1 and "No such file" in outcome.err and "ended connection c1 again" in outcome.err
    assert controller.connections == []


async def test_config_takes_in_the_key_of_this_machine(logged_in: Cli, controller: FakeController, home: Path) -> None:
    key = load_or_make_key(home / "own.key")
    Profile.of_user().save_tunnel(LocalTunnel("c1", "s1", "fra1", "skyvpn7", "userspace", str(home / "own.key")))
    controller.conf = "# fra1\n[Interface]\n# PrivateKey = (write here)\nAddress = 10.66.0.2/32\n\n[Peer]\n"

    without, with_key = await logged_in("config"), await logged_in("config", "--with-key")

    assert key.reveal() not in without.out
    assert with_key.out == f"# fra1\n[Interface]\nPrivateKey = {key.reveal()}\nAddress = 10.66.0.2/32\n\n[Peer]\n"


async def test_config_for_another_device_opens_a_connection_without_a_key(
    logged_in: Cli, controller: FakeController
) -> None:
    controller.servers = [server("s1", name="fra1", load=50), server("s2", name="ams1", load=5)]
    controller.conf = "[Interface]\nPrivateKey = x\n"

    outcome = await logged_in("config", "--new")
    named = await logged_in("config", "--new", "fra1")

    assert outcome.out == controller.conf
    assert controller.seen("POST /connections") == [
        {"server_id": "s2", "protocol": "wireguard"},
        {"server_id": "s1", "protocol": "wireguard"},
    ]
    assert "c1" in outcome.err and "c2" in named.err


async def test_config_without_an_id_needs_exactly_one_connection(logged_in: Cli, controller: FakeController) -> None:
    assert (await logged_in("config")).status == 1
    controller.connections = [dict(LISTED), LISTED | {"connection_id": "c2"}]
    assert (await logged_in("config")).status == 2
    assert (await logged_in("config", "c2")).status == 0


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 30, "5.0 GiB"), (3 << 50, "3072.0 TiB")]
)
def test_size(count: int, text: str) -> None:
    assert output.size(count) == text


@pytest.mark.parametrize(
    ("timestamp", "text"),
    [
        (None, "never"),
        ("2026-11-21T11:59:30Z", "30 s ago"),
        ("2026-11-21T12:00:30Z", "0 s ago"),
        ("2026-11-21T10:30:00+00:00", "1 h ago"),
        ("2026-11-01T12:00:00", "20 d ago"),
        ("soon", "soon"),
    ],
)
def test_age(timestamp: str | None, text: str) -> None:
    assert output.age(timestamp, datetime(2026, 11, 21, 12, tzinfo=UTC)) == text
