"""The agent with nothing but what its systemd unit grants: one account, one capability, a read-only /proc/sys."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.fleet.installation import INTERFACE, INTERNET, Installation
from tests.support.host import Host

pytestmark = [pytest.mark.netns, pytest.mark.timeout(90)]

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "systemd"
ACCOUNT = "61873"  # nobody's; systemd-sysusers would take one of the system's range
CAP_NET_ADMIN = 1 << 12  # capability.h
SPACE = Path("/mnt")  # covered inside of the host only


def granted(key: str) -> str:
    """What the agent's unit says; the key stands once."""
    lines = (UNITS / "skynetvpn-agent.service").read_text().splitlines()
    (value,) = [line.partition("=")[2] for line in lines if line.startswith(f"{key}=")]
    return value


@pytest.fixture(scope="module")
def fleet(prepared: Installation) -> Installation:
    """The host is as systemd, sysusers, tmpfiles and sysctl would have prepared it."""
    host, prepared.agent_home = prepared.node, SPACE / "state"
    host.run("mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", str(SPACE))
    prepared.copy_template()
    own = (str(prepared.agent_home), f"/run/{granted('RuntimeDirectory')}")
    host.run("chown", "-R", f"{ACCOUNT}:{ACCOUNT}", *own)
    host.run("chmod", granted("StateDirectoryMode"), *own)
    open_tun(host)
    reach(host, [ROOT, Path(sys.prefix), Path(sys.base_prefix)])
    for line in (UNITS / "sysctl.d/90-skynetvpn-agent.conf").read_text().splitlines():
        if "=" in line and "*" not in line and not line.startswith("#"):
            host.run("sysctl", "-q", "-w", line.lstrip("-").replace(" ", ""))
    assert granted("ProtectKernelTunables") == "yes"
    host.run("mount", "--rbind", "/proc/sys", "/proc/sys")
    host.run("mount", "-o", "remount,bind,ro", "/proc/sys")
    prepared.start_controller()
    prepared.log_in()
    start(prepared)
    prepared.wait_online()
    return prepared


def start(fleet: Installation) -> None:
    assert granted("AmbientCapabilities") == granted("CapabilityBoundingSet")
    name = granted("CapabilityBoundingSet").removeprefix("CAP_").lower()
    sets = [word for key in ("bounding-set", "inh-caps", "ambient-caps") for word in (f"--{key}", f"-all,+{name}")]
    account = ("--reuid", ACCOUNT, "--regid", ACCOUNT, "--clear-groups", "--no-new-privs")
    fleet.start_agent(prefix=("setpriv", *account, *sets))


def open_tun(host: Host) -> None:
    """The device with the mode that tmpfiles.d gives it."""
    (rule,) = [line for line in (UNITS / "tmpfiles.d/skynetvpn-agent.conf").read_text().splitlines() if "tun" in line]
    _, path, mode, *_ = rule.split()
    host.run("mknod", "-m", mode, str(SPACE / "tun"), "c", "10", "200")
    host.run("mount", "--bind", str(SPACE / "tun"), path)


def reach(host: Host, paths: Sequence[Path]) -> None:
    """Open the way to programs that lie in somebody's home: installed they would be in /opt."""
    closed = {
        path: ancestor for path in paths for ancestor in path.parents[::-1] if not ancestor.stat().st_mode & 0o001
    }
    for number, path in enumerate(closed):
        host.run("mkdir", str(SPACE / str(number)))
        host.run("mount", "--bind", str(path), str(SPACE / str(number)))
    for ancestor in set(closed.values()):
        host.run("mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", str(ancestor))
    for number, path in enumerate(closed):
        host.run("mkdir", "-p", str(path))
        host.run("mount", "--bind", str(SPACE / str(number)), str(path))


def rights(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def programs(fleet: Installation) -> dict[str, int]:
    """The processes on the node by their names."""
    return {name: pid for pid, name in fleet.node.namespace.programs().items()}


def test_agent_and_its_tunnels_have_one_capability_and_no_account_of_power(fleet: Installation) -> None:
    fleet.connect()
    running = programs(fleet)
    for name in ("skynetvpn-agent", "wireguard-go"):
        found = rights(running[name])
        assert set(found["Uid"].split()) == set(found["Gid"].split()) == {ACCOUNT}
        assert found["Groups"].split() == []
        for kind in ("CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb"):
            assert int(found[kind], 16) == CAP_NET_ADMIN, f"{name} {kind}"
        assert found["NoNewPrivs"] == "1"


def test_it_does_all_its_work(fleet: Installation) -> None:
    mine = fleet.connect()
    with fleet.tunnel(mine) as tunnel:
        assert fleet.node.run("sysctl", "-n", "net.ipv4.ip_forward").strip() == "1"
        assert "masquerade" in fleet.node.run("nft", "list", "table", "inet", "skynetvpn")
        fleet.wait(lambda: fleet.live()[mine.id]["status"] == "connected", "the connection is not connected")
        assert fleet.delete_connection(mine.id).headers["X-Applied"] == "true"
        assert not tunnel.reaches(INTERNET)
    assert fleet.agent_metric("skynetvpn_agent_failures") == 0


def test_it_heals_its_rules_and_adopts_its_tunnels_after_a_crash(fleet: Installation) -> None:
    mine = fleet.connect()
    with fleet.tunnel(mine) as tunnel, tunnel.stream(INTERNET) as stream:
        fleet.node.run("ip", "address", "flush", "dev", INTERFACE, "scope", "global")
        fleet.node.run("wg", "set", INTERFACE, "peer", mine.public_key, "remove")
        fleet.node.run("nft", "delete", "table", "inet", "skynetvpn")
        fleet.wait(lambda: mine.public_key in fleet.peers(), "the peer is not back")
        fleet.wait(lambda: "skynetvpn" in fleet.node.run("nft", "list", "tables"), "the rules are not back")
        tunnel.restart()
        fleet.wait(lambda: tunnel.reaches(INTERNET), "packets do not pass again")
        fleet.stop_agent(signal.SIGKILL)
        before = programs(fleet)["wireguard-go"]
        start(fleet)
        fleet.wait_online()
        assert programs(fleet)["wireguard-go"] == before
        stream.flows()
