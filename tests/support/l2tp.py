"""L2TP's other end for tests: real clients in namespaces (charon by swanctl, xl2tpd, pppd), and a host to dial."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from agent.drivers.base import Admit, Notify, ServiceDriver
from agent.drivers.l2tp import L2tp
from shared.access import Credential
from shared.resource import Protocol
from shared.services import L2TP_PORT, L2tpServer
from tests.support.netns import CommandFailed, Namespace, wait_until

SLOWDOWN = int(os.environ.get("SKYNETVPN_TEST_SLOWDOWN", "1"))
_UP = re.compile(r"Using interface (\S+).*local  IP address (\S+)\s+remote IP address (\S+)", re.DOTALL)
IN_GUEST = os.environ.get("SKYNETVPN_KERNEL_TESTS") == "1"
_FASTEST = ("aes256-sha256-ecp256", "aes256gcm16")  # of IKE and of ESP


def require_l2tp() -> None:
    """Skip the test on a kernel without L2TP; in the virtual machine a lack is a failure."""
    try:
        socket.socket(24, socket.SOCK_DGRAM, 1).close()
    except OSError as error:
        if IN_GUEST:
            raise
        pytest.skip(f"no L2TP in this kernel ({error}): run make test-kernel")


class L2tpClient:
    """`directory` must be short: it holds a socket. The daemons end with the namespace."""

    def __init__(
        self, namespace: Namespace, directory: Path, server: str, proposals: tuple[str, str] = _FASTEST
    ) -> None:
        self.namespace = namespace
        self._directory = directory
        self._server = server
        self._proposals = proposals
        self._uri = f"unix://{directory}/vici"
        self._psk = ""  # of the security association that is there

    def start(self) -> None:
        """Start the daemons; nothing connects yet."""
        (self._directory / "ppp").mkdir(parents=True)
        conf = self._directory / "strongswan.conf"
        conf.write_text(
            "charon-systemd {\n load_modular = no\n load = random nonce openssl kernel-netlink socket-default vici\n"
            f' plugins {{ vici {{ socket = "{self._uri}" }} }}\n retransmit_tries = 1\n retransmit_timeout = 2\n}}\n'
        )
        self.namespace.popen("/usr/sbin/charon-systemd", env={"STRONGSWAN_CONF": str(conf)})
        self._write_ppp("nobody", "nothing")
        (self._directory / "ppp" / "xl2tpd.conf").write_text(
            f"[global]\nport = 1701\n[lac vpn]\nlns = {self._server}\npppoptfile = /etc/ppp/options.vpn\n"
        )
        files = ("-c", "/etc/ppp/xl2tpd.conf", "-p", "/etc/ppp/xl2tpd.pid", "-C", "/etc/ppp/control")
        own_etc = ("unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/ppp && exec "$@"')
        self.namespace.popen(*own_etc, str(self._directory / "ppp"), "xl2tpd", "-D", *files, stderr=subprocess.DEVNULL)
        wait_until(lambda: (self._directory / "ppp" / "control").exists(), 10 * SLOWDOWN)
        wait_until(lambda: (self._directory / "vici").exists(), 10 * SLOWDOWN)

    def secure(self, psk: str) -> None:
        """Have a security association; raise CommandFailed where the server refuses."""
        if self._psk == psk:
            return
        self.insecure()
        ike, esp = self._proposals
        conf = self._directory / "swanctl.conf"
        conf.write_text(
            f"connections {{ vpn {{\n version = 1\n proposals = {ike}\n"
            f" remote_addrs = {self._server}\n local {{ auth = psk }}\n remote {{ auth = psk }}\n"
            f" children {{ vpn {{ mode = transport\n esp_proposals = {esp}\n"
            " local_ts = dynamic[udp/1701]\n remote_ts = dynamic[udp/1701] } } } }\n"
            f"secrets {{ ike {{ secret = 0x{psk.encode().hex()} }} }}\n"
        )
        self._swanctl("--load-all", "--clear", "--file", str(conf))
        self._swanctl("--initiate", "--child", "vpn", "--timeout", str(10 * SLOWDOWN))
        self._psk = psk

    def insecure(self) -> None:
        self._psk = ""
        self._swanctl("--terminate", "--ike", "vpn", "--force", check=False)

    def dial(self, username: str, password: str) -> None:
        """Ask for a session; `address` tells when there is one."""
        self._write_ppp(username, password)
        self._control("c vpn")

    def hang_up(self) -> None:
        running = self._pppds()
        self._control("d vpn")
        wait_until(lambda: not set(running).intersection(self._pppds()), 20 * SLOWDOWN)

    def connect(self, psk: str, username: str, password: str) -> str:
        """All of it; returns the address inside the tunnel."""
        self.secure(psk)
        self.dial(username, password)
        return self.wait_for_address()

    def wait_for_address(self) -> str:
        """The server may need a moment longer than the client: until a packet has come back."""
        wait_until(self.reaches_server, 20 * SLOWDOWN)
        return self.address()

    def reaches_server(self) -> bool:
        server = self.server_inside()
        asked = ("ping", "-c", "1", "-W", str(2 * SLOWDOWN), server)
        return bool(server) and " 1 received" in self.namespace.run(*asked, check=False)

    def address(self) -> str:
        """Its own inside the tunnel, "" while there is none."""
        return self._point_to_point()[1]

    def server_inside(self) -> str:
        return self._point_to_point()[2]

    def interface(self) -> str:
        return self._point_to_point()[0]

    def denied(self) -> bool:
        """Whether the server has refused the last login."""
        return "authentication failed" in self._log()

    def ppp(self) -> bool:
        """Whether a pppd is there, with an address or not yet."""
        return bool(self._pppds())

    def _pppds(self) -> list[int]:
        return [pid for pid, name in self.namespace.programs().items() if name == "pppd"]

    def ping(self, address: str, count: int = 1, size: int = 56) -> None:
        options = ("-c", str(count), "-i", "0.2", "-s", str(size), "-W", str(5 * SLOWDOWN))
        self.namespace.run("ping", *options, address, timeout=60 * SLOWDOWN)

    def _point_to_point(self) -> tuple[str, str, str]:
        """Interface, own and server's address, as pppd says it: to ask the kernel again and again is slow there."""
        text = self._log()
        found = _UP.search(text)
        return (found[1], found[2], found[3]) if found and "Connection terminated." not in text else ("", "", "")

    def _log(self) -> str:
        path = self._directory / "ppp" / "pppd.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _write_ppp(self, username: str, password: str) -> None:
        ppp = self._directory / "ppp"
        log = ppp / "pppd.log"
        log.unlink(missing_ok=True)
        (ppp / "options.vpn").write_text(
            f"name {username}\nremotename vpn\nnoauth\nmtu 1400\nmru 1400\nnodefaultroute\nnoipdefault\nnoipv6\nnoccp\n"
            f"ipcp-accept-local\nipcp-accept-remote\ndebug\nlogfile {log}\n"
        )
        escaped = password.replace("\\", "\\\\").replace('"', '\\"')
        (ppp / "chap-secrets").write_text(f'{username} vpn "{escaped}"\n')
        (ppp / "chap-secrets").chmod(0o600)

    def _control(self, line: str) -> None:
        (self._directory / "ppp" / "control").write_text(f"{line}\n")

    def _swanctl(self, *argv: str, check: bool = True) -> str:
        return self.namespace.run("swanctl", *argv, "--uri", self._uri, timeout=30 * SLOWDOWN, check=check)


# --- for the conformance suite ---

PSK = 'a "pre-shared" key # \\ of 30'
PASSWORD = 'it\'s "quoted" \\ and # spaced'
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class L2tpRig:
    """See tests/support/rig.py. Each of the clients has a host of its own: they are started when they are needed."""

    asks = False

    def __init__(self, _directory: Path) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="l2tp-"))  # the test's own is too long for a socket
        self._stack = contextlib.ExitStack()
        self._free: list[L2tpClient] = []
        self._hosts = 0

    def __enter__(self) -> Self:
        require_l2tp()
        self._stack.callback(shutil.rmtree, self._directory)
        self._node = self._stack.enter_context(Namespace("lns"))
        self._stack.enter_context(self._node.entered())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def driver(self, admit: Admit, notify: Notify) -> ServiceDriver:
        return L2tp(self._directory / "l2tp", boot_id=BOOT_ID.read_text().strip(), admit=admit, notify=notify)

    async def prepare(self, driver: ServiceDriver) -> None:
        """Nothing: its key is the pre-shared one."""

    def spec(self) -> L2tpServer:
        return L2tpServer(psk=PSK, ipv4_pool="10.71.0.0/24")

    def changed_spec(self) -> L2tpServer:
        return L2tpServer(psk="another pre-shared key", ipv4_pool="10.72.0.0/24", mtu=1300)

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(("0.0.0.0", L2TP_PORT))
            yield

    def credential(self, username: str) -> Credential:
        return Credential(protocol=Protocol.L2TP, username=username, account=1, secret=PASSWORD)

    def client(self, username: str, *, wrong: bool = False) -> L2tpLogin:
        return L2tpLogin(self, username, "a wrong one" if wrong else PASSWORD)

    def take(self) -> L2tpClient:
        if self._free:
            return self._free.pop()
        number = self._hosts = self._hosts + 1
        host = self._stack.enter_context(Namespace(f"lac{number}"))
        server = f"192.0.{number}.1"
        self._node.connect(host, f"{server}/24", f"192.0.{number}.2/24")
        client = L2tpClient(host, self._directory / f"client{number}", server)
        client.start()
        return client

    def give_back(self, client: L2tpClient) -> None:
        self._free.append(client)


class L2tpLogin:
    """See ServiceClient in tests/support/rig.py."""

    def __init__(self, rig: L2tpRig, username: str, password: str) -> None:
        self._rig = rig
        self._username = username
        self._password = password
        self._client: L2tpClient | None = None

    def connect(self) -> None:
        self._dial().wait_for_address()

    def refused(self) -> bool:
        client = self._dial()
        wait_until(lambda: client.address() or client.denied(), 20 * SLOWDOWN)
        denied = client.denied()
        self.end()
        return denied

    def passes(self) -> bool:
        return self._client is not None and self._client.reaches_server()

    def end(self) -> None:
        if self._client is not None:
            self._client.hang_up()
            self._rig.give_back(self._client)
            self._client = None

    def _dial(self) -> L2tpClient:
        client = self._client = self._rig.take()
        for psk in (PSK, self._rig.changed_spec().psk):  # whichever the server has now
            with contextlib.suppress(CommandFailed):
                client.secure(psk)
                break
        client.dial(self._username, self._password)
        return client
