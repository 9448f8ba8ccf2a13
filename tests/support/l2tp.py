"""A real L2TP/IPsec client in a namespace: charon (driven by swanctl), xl2tpd and pppd with settings of their own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from agent.drivers.l2tp import privately
from tests.support.netns import CommandFailed, Namespace, wait_until

SLOWDOWN = int(os.environ.get("SKYNETVPN_TEST_SLOWDOWN", "1"))
_FASTEST = ("aes256-sha256-ecp256", "aes256gcm16")  # of IKE and of ESP


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
        within = (sys.executable, "-I", str(privately.__file__), str(self._directory / "ppp"), "/etc/ppp")
        self.namespace.popen(*within, "xl2tpd", "-D", *files)
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
        self._control("d vpn")
        wait_until(lambda: not self.ppp(), 10 * SLOWDOWN)

    def connect(self, psk: str, username: str, password: str) -> str:
        """All of it; returns the address inside the tunnel."""
        self.secure(psk)
        self.dial(username, password)
        return self.wait_for_address()

    def wait_for_address(self) -> str:
        wait_until(self.address, 20 * SLOWDOWN)
        return self.address()

    def address(self) -> str:
        words = self.namespace.run("ip", "-br", "-4", "address", "show", "up").split()
        at = next((n for n, word in enumerate(words) if word.startswith("ppp")), None)
        return words[at + 2] if at is not None and at + 2 < len(words) else ""

    def ppp(self) -> bool:
        """Whether a pppd is there, with an address or not yet."""
        return any(_comm(pid) == "pppd" for pid in self.namespace.pids())

    def ping(self, address: str, count: int = 1, size: int = 56) -> None:
        options = ("-c", str(count), "-i", "0.2", "-s", str(size), "-W", str(5 * SLOWDOWN))
        self.namespace.run("ping", *options, address, timeout=60 * SLOWDOWN)

    def _write_ppp(self, username: str, password: str) -> None:
        ppp = self._directory / "ppp"
        log = ppp / "pppd.log"
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


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


__all__ = ["SLOWDOWN", "CommandFailed", "L2tpClient"]
