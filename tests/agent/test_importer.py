"""Adopting a wg-quick file: what it has is taken over, and its clients outlive the controller's first snapshot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from agent import importer
from agent.errors import AgentError
from agent.identity import Identity
from agent.state import State
from shared.desired import EMPTY_DIGEST, digest
from shared.keys import PrivateKey
from shared.protocol import Applied
from tests.agent.fleet import INTERFACE, KEY, SCOPE, Node, delta, peer, snapshot, welcome
from tests.agent.model_host import ModelPeer, ModelWireGuard

ROOT = Path(__file__).parents[2]
FIRST, SECOND = (
    peer(1, allowed_ips=("10.66.1.2/32",)),
    peer(2, allowed_ips=("10.66.1.3/32", "fd66::3/128"), keepalive=25),
)

IMPORTED = replace(INTERFACE, addresses=("10.8.0.1/24",))
OLD = peer(4, allowed_ips=("10.8.0.2/32",))


def text(*, peers: str | None = None, interface: str = "") -> str:
    known = f"""
# the phone
[Peer]
PublicKey = {FIRST.key}
AllowedIPs = 10.66.1.2/32

[Peer]
PublicKey = {SECOND.key}
AllowedIPs = 10.66.1.3/32, fd66::3/128
PersistentKeepalive = 25
"""
    return f"""[Interface]
PrivateKey = {KEY.reveal()}
ListenPort = 51820
Address = 10.66.0.1/16
Address = fd66::1/64
PostUp = echo up
{interface}
{known if peers is None else peers}"""


def written(directory: Path, content: str) -> Path:
    path = directory / "wg0.conf"
    path.write_text(content)
    return path


async def test_file_is_read_as_wg_quick_reads_it(tmp_path: Path) -> None:
    found = await importer.read(written(tmp_path, text()))
    assert found.interface == INTERFACE
    assert found.private_key == KEY
    assert found.peers == (FIRST, SECOND)
    assert found.ignored == ("postup",)
    assert KEY.reveal() not in found.describe()


async def test_an_address_that_the_kernel_gave_stays_the_kernels(tmp_path: Path) -> None:
    saved = text(interface="Address = fe80::7e86:1678:fa6:7f65/64")  # by wg-quick, of a device of wireguard-go
    found = await importer.read(written(tmp_path, saved))
    assert found.interface == INTERFACE
    assert found.ignored == ("fe80::7e86:1678:fa6:7f65/64", "postup")


async def test_imported_peers_are_served_and_outlive_the_controllers_snapshots(tmp_path: Path) -> None:
    directory = tmp_path / "agent"
    await importer.adopt(await importer.read(written(tmp_path, text())), directory)
    assert Identity(directory).wireguard_key() == KEY
    wireguard = ModelWireGuard()
    device = wireguard.create(INTERFACE, KEY)
    await wireguard.apply_peers("wg0", [FIRST, SECOND])
    wireguard.calls.clear()
    async with Node(directory, wireguard) as node:
        assert wireguard.writes() == []
        assert node.reconciler.hello().revisions == {}
        thief = peer(9, allowed_ips=FIRST.allowed_ips)
        (answer,) = await node.send(welcome(SCOPE), snapshot([INTERFACE, peer(3), thief]))
        assert isinstance(answer, Applied)
        assert [failure.key for failure in answer.failures] == [thief.key]
        await node.send(welcome(SCOPE, "other"), snapshot([INTERFACE], 2, confirmed=True))
        assert node.present() == {FIRST.public_key, SECOND.public_key}
        assert wireguard.devices["wg0"] is device
        assert all(isinstance(frame, Applied) and frame.scope == SCOPE for frame in node.frames)


async def imported(tmp_path: Path) -> Path:
    """A directory with an imported wg0 at 10.8.0.1/24 that has one peer, 10.8.0.2."""
    directory = tmp_path / "agent"
    peers = f"[Peer]\nPublicKey = {OLD.key}\nAllowedIPs = 10.8.0.2/32\n"
    path = written(
        tmp_path, f"[Interface]\nPrivateKey = {KEY.reveal()}\nListenPort = 51820\nAddress = 10.8.0.1/24\n{peers}"
    )
    await importer.adopt(await importer.read(path), directory)
    return directory


def running() -> ModelWireGuard:
    wireguard = ModelWireGuard()
    device = wireguard.create(IMPORTED, KEY)
    device.peers[OLD.public_key] = ModelPeer(OLD.allowed_ips, None, 0)
    return wireguard


async def test_imported_addresses_stay_beside_the_controllers(tmp_path: Path) -> None:
    wireguard = running()
    device = wireguard.devices["wg0"]
    both = ("10.66.0.1/16", "fd66::1/64", "10.8.0.1/24")
    async with Node(await imported(tmp_path), wireguard) as node:
        (answer,) = await node.send(welcome(SCOPE), snapshot([INTERFACE, FIRST]))
        assert answer == Applied(scope=SCOPE, revision=1, digest=digest([INTERFACE, FIRST]))
        assert wireguard.devices["wg0"] is device
        assert device.spec.addresses == both
        assert node.present() == {OLD.public_key, FIRST.public_key}
        assert node.firewall.loaded is not None
        assert node.firewall.loaded[0].addresses == both
        written_before = wireguard.writes()
        await node.reconciler.recheck()
        assert (wireguard.writes(), node.counters.drift) == (written_before, 0)
    async with Node(tmp_path / "agent", wireguard) as node:
        (answer,) = await node.send(welcome(SCOPE))
        assert answer == Applied(scope=SCOPE, revision=1, digest=digest([INTERFACE, FIRST]))
        assert wireguard.writes() == written_before


@pytest.mark.parametrize("changes", [{"name": "sky0"}, {"listen_port": 51821}, {"name": "sky0", "listen_port": 51821}])
async def test_another_interface_is_refused_until_the_operator_gives_the_imported_one(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    wireguard = running()
    other = replace(INTERFACE, **changes)
    async with Node(await imported(tmp_path), wireguard) as node:
        (answer,) = await node.send(welcome(SCOPE), snapshot([other, FIRST]))
        assert isinstance(answer, Applied)
        assert answer.digest == EMPTY_DIGEST
        first, second = answer.failures
        assert (first.key, second.key) == (other.name, FIRST.key)
        assert "--interface wg0 --port 51820" in first.message
        assert list(wireguard.devices) == ["wg0"]
        assert wireguard.devices["wg0"].spec.addresses == ("10.8.0.1/24",)
        assert node.present() == {OLD.public_key}
        assert node.counters.drift == 0
        removals = [] if other.name == "wg0" else [other]
        (answer,) = await node.send(delta(1, 2, [INTERFACE], removals))
        assert answer == Applied(scope=SCOPE, revision=2, digest=digest([INTERFACE, FIRST]))
        assert node.present() == {OLD.public_key, FIRST.public_key}
        await node.send(delta(2, 3, [other], [INTERFACE] if removals else []))
        assert node.present() == {OLD.public_key}


async def test_controllers_interface_does_not_take_the_address_of_an_imported_peer(tmp_path: Path) -> None:
    wireguard = running()
    async with Node(await imported(tmp_path), wireguard) as node:
        thief = replace(INTERFACE, addresses=("10.8.0.2/16",))
        (answer,) = await node.send(welcome(SCOPE), snapshot([thief]))
        assert isinstance(answer, Applied)
        assert "belongs to imported peer" in answer.failures[0].message
        assert node.present() == {OLD.public_key}


async def test_second_import_takes_the_place_of_the_first(tmp_path: Path) -> None:
    directory = tmp_path / "agent"
    await importer.adopt(await importer.read(written(tmp_path, text())), directory)
    await importer.adopt(await importer.read(written(tmp_path, text(peers=""))), directory)
    stored = await (state := State(directory)).open()
    await state.close()
    assert [resource.key for resource in stored.scopes["imported"].resources] == ["wg0"]


@pytest.mark.parametrize(
    ("peers", "words"),
    [
        (f"[Peer]\nPublicKey = {FIRST.key}\nAllowedIPs = 10.0.0.0/8\n", r"wg0.conf:8: .*wider"),
        ("\n\n# note\n[Peer]\nPublicKey = short\nAllowedIPs = 10.66.1.2/32\n", r"wg0.conf:11: "),
        (f"[Peer]\nPublicKey = {FIRST.key}\n", r"wg0.conf:8: allowedips is missing"),
        (f"[Peer]\nPublicKey = {FIRST.key}\nAllowedIPs = 10.66.0.1/32\n", "node itself"),
        (f"[Peer]\nPublicKey = {FIRST.key}\nAllowedIPs = 10.67.0.1/32\n", "in no network"),
        (f"[Peer]\nPublicKey = {FIRST.key}\nAllowedIPs = 10.66.1.2/32\n" * 2, "same PublicKey"),
        (
            f"[Peer]\nPublicKey = {FIRST.key}\nAllowedIPs = 10.66.1.2/32\n"
            f"[Peer]\nPublicKey = {SECOND.key}\nAllowedIPs = 10.66.1.2/32\n",
            "belongs to peer",
        ),
        ("[Nonsense]\n", "not a wg-quick file"),
    ],
)
async def test_peer_that_cannot_be_adopted_is_named_with_its_line(tmp_path: Path, peers: str, words: str) -> None:
    with pytest.raises(AgentError, match=words):
        await importer.read(written(tmp_path, text(peers=peers)))


@pytest.mark.parametrize("content", ["", "hello", "[Interface]\nListenPort = 1\n", "[Interface]\nListenPort = x\n"])
async def test_file_without_an_interface_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(AgentError, match=r"wg0\.conf"):
        await importer.read(written(tmp_path, content))


async def test_enrolled_host_keeps_its_key(tmp_path: Path) -> None:
    directory = tmp_path / "agent"
    directory.mkdir(mode=0o700)
    identity = Identity(directory)
    identity.store_wireguard_key(PrivateKey(b"\x03" * 32))
    (directory / "node.crt").write_bytes(b"enrolled")
    found = await importer.read(written(tmp_path, text()))
    with pytest.raises(AgentError, match="import before enrolling"):
        await importer.adopt(found, directory)
    assert identity.wireguard_key() != KEY


def test_command_shows_the_file_and_stores_nothing_without_a_directory(tmp_path: Path) -> None:
    path = written(tmp_path, text())
    done = subprocess.run(
        [sys.executable, "-m", "agent", "import", str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "interface wg0: port 51820" in done.stdout
    assert "2 peers" in done.stdout
    assert "nothing was stored" in done.stdout
    assert [item.name for item in tmp_path.iterdir()] == ["wg0.conf"]
